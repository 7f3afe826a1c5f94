"""One layer of a committed checkpoint, as a format sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from quant.base import LinearShape, QuantMethod, QuantWeight, TensorSpec

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
LAYER = "model.layers.0.self_attn.k_proj"
SHAPE = LinearShape(256, 128, bias=True)


def stored(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The quantization configuration and the tensors."""
    folder = CHECKPOINTS / name
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config, load_file(folder / "model.safetensors")


def headers_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def read(
    method: QuantMethod, tensors: dict[str, Tensor], layer: str = LAYER, shape: LinearShape = SHAPE
) -> QuantWeight:
    """The canonical weight of a layer, after the checks of header and shape that loading does."""
    scheme, specs, headers = method.scheme_for(layer, shape), method.tensors(layer, shape), headers_of(tensors)
    assert scheme is not None
    assert {local: headers.get(f"{layer}.{local}") for local in specs} == specs
    return method.repack({local: tensors[f"{layer}.{local}"] for local in specs}, scheme, shape)
