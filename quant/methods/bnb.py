"""bitsandbytes checkpoints that are already quantized (``quant_method: "bitsandbytes"``).

4 bit: ``weight``, two codes a byte, **high nibble first**, over the flattened ``[out, in]`` weight, viewed as any storage dtype
(``[n / 2 / itemsize, 1]``); ``weight.absmax``, one a block of the flattened weight, which may run over the ends of rows;
``weight.quant_map``, what the 16 codes mean; ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), bytes of JSON. With double
quantization ``absmax`` is bytes: ``nested_quant_map[absmax] * nested_absmax[block of 256] + nested_offset``.

8 bit (LLM.int8): ``weight int8 [out, in]``, ``SCB float32 [out]``, ``W = weight * SCB / 127``; inputs are quantized per token,
except those of ``llm_int8_threshold`` and above. bitsandbytes takes whole columns of its batch out where one token has such an
input; here each token is computed as bitsandbytes computes it alone. Its rounding of inputs to float16 is left out.

Whether a layer is quantized is told by ``weight.absmax`` or ``SCB`` beside it: bfloat16 storage looks like a dense weight.
Source: bitsandbytes 0.50.2 (``functional.py`` ``QuantState``, ``nn/modules.py``, ``backends/default/ops.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quant import matching
from quant.base import (
    Activation,
    BadCheckpoint,
    LinearShape,
    QuantMethod,
    QuantWeight,
    Scheme,
    TensorSpec,
    UnsupportedCheckpoint,
    WeightKind,
)
from quant.methods.selection import method_of
from quant.methods.skip_list import SkipList
from quant.packing import pack_stream, swap_nibbles, unpack_stream

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__"
KINDS = {"nf4": WeightKind.NF4, "fp4": WeightKind.FP4}
LAYOUTS = {1: "col32", 2: "col_turing", 3: "col_ampere"}
"""Of ``weight_format``; 0 is plain rows."""


@dataclass(frozen=True)
class BitsAndBytes(QuantMethod):
    bits: int
    threshold: float
    skipped: SkipList
    headers: Mapping[str, TensorSpec]

    name: ClassVar[str] = "bitsandbytes"
    opaque: ClassVar[frozenset[str]] = frozenset({"weight"})

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        four, eight = bool(config.get("load_in_4bit")), bool(config.get("load_in_8bit"))
        method = method_of(config)
        if not (method.startswith("bitsandbytes") or (not method and (four or eight))):
            return None
        if not (four or eight) and "block_size" in config:
            raise UnsupportedCheckpoint(
                f"quantization_config: format {config.get('format')!r} with block_size is GPTQModel's own arrangement of "
                "bitsandbytes tensors (weight_absmax, weight_scb), which is not supported. Use a copy that Transformers wrote."
            )
        if four == eight:
            raise BadCheckpoint(
                f"quantization_config: load_in_4bit and load_in_8bit are both {four}; exactly one of them must be true."
            )
        kind = str(config.get("bnb_4bit_quant_type", "fp4")).lower()
        if four and kind not in KINDS:
            raise UnsupportedCheckpoint(
                f"bnb_4bit_quant_type {kind!r} (quantization_config) is not supported, only {' and '.join(KINDS)}."
            )
        if eight and config.get("llm_int8_has_fp16_weight"):
            raise UnsupportedCheckpoint(
                "llm_int8_has_fp16_weight: true (quantization_config) keeps float16 weights for training, it is not supported. "
                "Set it to false if the file holds int8 weights with SCB."
            )
        skipped = SkipList.of(config, ("llm_int8_skip_modules",), matching.components)
        threshold = config.get("llm_int8_threshold")
        return cls(4 if four else 8, 6.0 if threshold is None else float(threshold), skipped, headers)

    @property
    def summary(self) -> str:
        return "bitsandbytes 4 bit" if self.bits == 4 else f"bitsandbytes LLM.int8, threshold {self.threshold:g}"

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        four, eight = f"{layer}.weight.absmax" in self.headers, f"{layer}.SCB" in self.headers
        if not (four or eight):
            return None
        if (four and eight) or (8 if eight else 4) != self.bits:
            raise BadCheckpoint(
                f"{layer}: {'weight.absmax' if four else 'SCB'} is stored, but quantization_config says "
                f"load_in_{self.bits}bit. The file is not the one that the config describes."
            )
        self.skipped.require_absent(layer)
        if eight:
            activation = Activation(WeightKind.INT8, threshold=self.threshold)
            return Scheme(WeightKind.INT8, (1, shape.in_features), activation=activation)
        block = self._block_size(layer, shape)
        return Scheme(KINDS[self._quant_type(layer)], (1, block), flat=shape.in_features % block != 0)

    def dense_reason(self, layer: str) -> str:
        return self.skipped.naming(layer) or "stored dense: no weight.absmax and no SCB beside its weight"

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        return self.skipped.unmatched(layers)

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        if self.bits == 8:
            specs = {
                "weight": TensorSpec((shape.out_features, shape.in_features), torch.int8),
                "SCB": TensorSpec((shape.out_features,), torch.float32),
            }
            stored = self.headers.get(f"{layer}.weight_format")
            return specs | ({"weight_format": TensorSpec(stored.shape, torch.uint8)} if stored else {})
        count = shape.out_features * shape.in_features
        blocks = -(-count // self._block_size(layer, shape))
        weight = self.headers.get(f"{layer}.weight")
        storage = weight.dtype if weight else torch.uint8
        specs = {
            "weight": TensorSpec((-(-count // 2) // storage.itemsize, 1), storage),
            "weight.absmax": TensorSpec((blocks,), torch.float32),
            "weight.quant_map": TensorSpec((16,), torch.float32),
        }
        if f"{layer}.weight.nested_absmax" in self.headers:
            nested = self.headers[f"{layer}.weight.nested_absmax"].shape
            specs["weight.absmax"] = TensorSpec((blocks,), torch.uint8)
            specs["weight.nested_absmax"] = TensorSpec(nested, torch.float32)
            specs["weight.nested_quant_map"] = TensorSpec((256,), torch.float32)
        state = STATE + self._quant_type(layer)
        return specs | {state: TensorSpec(self.headers[f"{layer}.{state}"].shape, torch.uint8)}

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        if "SCB" in tensors:
            layout = int(tensors["weight_format"].item()) if "weight_format" in tensors else 0
            if layout:
                raise UnsupportedCheckpoint(
                    f"weight_format {layout} ({LAYOUTS.get(layout, 'unknown')}) is an arrangement for one kind of GPU, only 0 "
                    "(rows) is supported. Load the model with bitsandbytes 0.45 or newer and save it again."
                )
            codes = tensors["weight"].view(torch.uint8) ^ 128
            return QuantWeight(scheme, shape, q=codes, scale=tensors["SCB"][:, None] / 127)
        state = _read_state(next(tensor for name, tensor in tensors.items() if name.startswith(STATE)))
        _check_state(state, scheme, shape)
        count = shape.out_features * shape.in_features
        packed = swap_nibbles(tensors["weight"].contiguous().view(torch.uint8).reshape(1, -1))
        codes = unpack_stream(packed, 4, count).view(shape.out_features, shape.in_features)
        absmax = _absmax(tensors, state)
        return QuantWeight(
            scheme=scheme,
            shape=shape,
            q=pack_stream(codes, 4),
            scale=absmax if scheme.flat else absmax.view(shape.out_features, -1),
            table=tensors["weight.quant_map"],
        )

    def _quant_type(self, layer: str) -> str:
        """``nf4`` or ``fp4``, by the name under which the state is stored."""
        found = [name for name in KINDS if f"{layer}.{STATE}{name}" in self.headers]
        if len(found) != 1:
            raise BadCheckpoint(
                f"{layer}: {STATE}nf4 or ...fp4 must be stored exactly once, found {', '.join(found) or 'none'}. "
                "The file is damaged."
            )
        return found[0]

    def _block_size(self, layer: str, shape: LinearShape) -> int:
        """The block size that gives as many blocks as are stored. Only for one single block there are several, and then
        they mean the same."""
        spec, count = self.headers[f"{layer}.weight.absmax"], shape.out_features * shape.in_features
        for size in BLOCK_SIZES:
            if spec.shape == (-(-count // size),):
                return size
        raise BadCheckpoint(
            f"{layer}.weight.absmax is {spec}: {shape} has {count} weights, which no block size of {BLOCK_SIZES[0]} to "
            f"{BLOCK_SIZES[-1]} divides so. The file is damaged or of another model."
        )


def _read_state(stored: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(stored.tolist()).decode("utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"weight.quant_state is not JSON ({error}). The file is damaged.") from error
    if not isinstance(state, dict):
        raise BadCheckpoint(f"weight.quant_state holds a {type(state).__name__}, not an object. The file is damaged.")
    return state


def _check_state(state: Mapping[str, Any], scheme: Scheme, shape: LinearShape) -> None:
    """What the JSON says must be what the headers said."""
    rows = [shape.out_features, shape.in_features]
    if list(state.get("shape") or []) != rows:
        raise BadCheckpoint(f"weight.quant_state: shape is {state.get('shape')}, the layer's weight is {rows}.")
    block, count = state.get("blocksize"), math.prod(rows)
    if block != scheme.group and not (isinstance(block, int) and block >= count and scheme.group >= count):
        raise BadCheckpoint(
            f"weight.quant_state: blocksize is {block}, but absmax is stored for blocks of {scheme.group}."
        )
    if state.get("quant_type", scheme.kind.value) != scheme.kind.value:
        raise BadCheckpoint(
            f"weight.quant_state: quant_type is {state['quant_type']!r}, stored under the name {scheme.kind.value}."
        )


def _absmax(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    stored = tensors["weight.absmax"]
    if "weight.nested_absmax" not in tensors:
        return stored
    block, scales = state.get("nested_blocksize", 256), tensors["weight.nested_absmax"]
    if len(scales) != -(-len(stored) // block):
        raise BadCheckpoint(
            f"weight.nested_absmax has {len(scales)} scales, {len(stored)} of weight.absmax in blocks of {block} "
            f"(quant_state: nested_blocksize) need {-(-len(stored) // block)}."
        )
    values = tensors["weight.nested_quant_map"][stored.int()]
    return values * scales.repeat_interleave(block)[: len(stored)] + float(state.get("nested_offset", 0.0))
