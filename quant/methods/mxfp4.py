"""MXFP4 checkpoints (``quant_method: "mxfp4"``), as OpenAI's gpt-oss: the experts are E2M1 in blocks of 32 inputs, all else is
dense.

The file stacks the experts of a layer; one of them has ``blocks uint8 [1, out, in / 32, 16]``, two codes a byte, low nibble
first, and ``scales uint8 [1, out, in / 32]``, powers of two: ``W = value * 2 ** (scale - 127)``. Inputs are left alone.
Source: Transformers 5.23 ``integrations/mxfp4.py`` (``convert_moe_packed_tensors``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quant import matching
from quant.base import BadCheckpoint, LinearShape, QuantMethod, QuantWeight, Scheme, TensorSpec, WeightKind
from quant.float8 import canonical_scale
from quant.methods.selection import method_of
from quant.methods.skip_list import SkipList

BLOCK = 32


@dataclass(frozen=True)
class MXFP4(QuantMethod):
    skipped: SkipList
    headers: Mapping[str, TensorSpec]

    name: ClassVar[str] = "mxfp4"

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        if method_of(config) != cls.name:
            return None
        return cls(SkipList.of(config, ("modules_to_not_convert",), matching.transformers), headers)

    @property
    def summary(self) -> str:
        return "mxfp4 experts"

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        found = [local for local in ("blocks", "scales") if f"{layer}.{local}" in self.headers]
        if not found:
            return None
        if len(found) == 1:
            other = "scales" if found == ["blocks"] else "blocks"
            raise BadCheckpoint(f"{layer}: {found[0]} is there but {other} is missing. The file is damaged.")
        if shape.in_features % BLOCK:
            raise BadCheckpoint(f"{layer}: {shape.in_features} inputs do not divide into MXFP4's blocks of {BLOCK}.")
        self.skipped.require_absent(layer)
        return Scheme(WeightKind.E2M1, (1, BLOCK))

    def dense_reason(self, layer: str) -> str:
        return self.skipped.naming(layer) or "stored dense: no blocks and scales for it"

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        return self.skipped.unmatched(layers)

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        blocks = (1, shape.out_features, shape.in_features // BLOCK)
        return {
            "blocks": TensorSpec((*blocks, BLOCK // 2), torch.uint8),
            "scales": TensorSpec(blocks, torch.uint8),
        }

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        scale = (shape.out_features, shape.in_features // BLOCK)
        q = tensors["blocks"].reshape(shape.out_features, -1)
        return QuantWeight(scheme, shape, q=q, scale=canonical_scale(tensors["scales"], scale))
