"""Dense weights that are stored without their zeros, put together again as Transformers reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from quant.packing import unpack_bitmask
from runtime.linear_plan import ModulePlan


class Decompress(ConversionOps):
    """``compressed [out, in / 2]`` and ``bitmask [out, ceil(in / 8)]`` to ``weight [out, in]``."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        parts: list[Tensor] = [found[0] if isinstance(found, list) else found for found in input_dict.values()]
        # Transformers casts both to the model's dtype, in which bytes are exact; the bitmask is the narrower one.
        bitmask, compressed = sorted(parts, key=lambda part: part.shape[1])
        return {"weight": unpack_bitmask(compressed, bitmask.to(torch.uint8), (len(compressed), self.columns))}


def decompressions(layers: Iterable[ModulePlan]) -> list[WeightConverter]:
    """A conversion for each layer; the file may leave out the base model's prefix, the first part of the name."""
    found = []
    for layer in layers:
        first, dot, rest = layer.name.partition(".")
        name = rf"^(?:{re.escape(first)}\.)?{re.escape(rest)}" if dot else f"^{re.escape(first)}"
        sources = [rf"{name}\.{local}$" for local in layer.stored]
        found.append(
            WeightConverter(sources, [f"{layer.name}.weight"], operations=[Decompress(layer.shape.in_features)])
        )
    return found
