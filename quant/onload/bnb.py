"""bitsandbytes' own quantization, by the library itself: the same codes and scales, bit for bit.

NF4 and FP4 in blocks of 64 weights, which may run on over the ends of rows; double quantization rounds the scales to 8 bits as
well (they are kept as the float32 numbers that then come out: it changes values, not memory). LLM.int8: ``round(w * 127 /
max|w|)`` of a row in float16; inputs as in :mod:`quant.methods.bnb`. Source: bitsandbytes 0.50.2 (``functional.py``
``quantize_4bit``, ``nn/modules.py`` ``Int8Params``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from quant.base import Activation, LinearShape, QuantWeight, Scheme, UnsupportedCheckpoint, WeightKind, canonical_specs
from quant.methods.bnb import KINDS
from quant.onload.base import WEIGHTS_AT_ONCE, OnLoad
from quant.onload.options import Options
from quant.packing import pack_stream, swap_nibbles, unpack_stream

BLOCK, NESTED_BLOCK = 64, 256


def create(options: Options, dense: Mapping[str, str], dtype: torch.dtype) -> OnLoad:
    """4 bits, NF4, unless the options say otherwise. Raises :class:`UnsupportedCheckpoint`."""
    if find_spec("bitsandbytes") is None:
        raise UnsupportedCheckpoint(
            "--quantization bitsandbytes quantizes with the library, which is not installed: pip install bitsandbytes."
        )
    eight = bool(options.load_in_8bit)
    if eight and options.load_in_4bit:
        raise UnsupportedCheckpoint("load_in_4bit and load_in_8bit exclude each other; give one of them.")
    if options.load_in_4bit is False and not eight:
        raise UnsupportedCheckpoint("load_in_4bit is false and load_in_8bit is not true; one of them must be.")
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant") if eight else ("llm_int8_threshold",):
        if getattr(options, name) is not None:
            raise UnsupportedCheckpoint(f"{name} means nothing for load_in_{'8' if eight else '4'}bit; leave it out.")
    if eight:
        return LLMInt8(dense, dtype, 6.0 if options.llm_int8_threshold is None else float(options.llm_int8_threshold))
    kind = options.bnb_4bit_quant_type or "nf4"
    if kind not in KINDS:
        raise UnsupportedCheckpoint(f"bnb_4bit_quant_type must be {' or '.join(KINDS)}, not {kind!r}.")
    return FourBit(dense, dtype, KINDS[kind], bool(options.bnb_4bit_use_double_quant))


@dataclass(frozen=True)
class FourBit(OnLoad):
    kind: WeightKind
    double: bool

    name: ClassVar[str] = "bitsandbytes"

    @property
    def summary(self) -> str:
        double = ", double quantization" if self.double else ""
        return f"bitsandbytes {self.kind.value}, blocks of {BLOCK}{double}, quantized while loading"

    def scheme(self, shape: LinearShape) -> Scheme:
        return Scheme(self.kind, (1, BLOCK), flat=shape.in_features % BLOCK != 0)

    def quantize(self, weight: Tensor, scheme: Scheme, shape: LinearShape) -> QuantWeight:
        from bitsandbytes.functional import get_4bit_type, quantize_4bit

        inputs, specs = shape.in_features, canonical_specs(scheme, shape)
        q = torch.empty(specs["q"], dtype=torch.uint8, device=weight.device)
        scales = []
        # Whole blocks at a time, wherever rows end.
        rows = max(BLOCK, WEIGHTS_AT_ONCE // inputs // BLOCK * BLOCK)
        for start in range(0, shape.out_features, rows):
            part = weight[start : start + rows].contiguous()
            packed, state = quantize_4bit(part, blocksize=BLOCK, quant_type=self.kind.value, compress_statistics=False)
            codes = unpack_stream(swap_nibbles(packed.view(1, -1)), 4, part.numel())
            q[start : start + rows] = pack_stream(codes.view(-1, inputs), 4)
            scales.append(state.absmax)
        scale = torch.cat(scales)
        if self.double:
            scale = _rounded_twice(scale)
        table = get_4bit_type(self.kind.value, device=str(weight.device))
        return QuantWeight(scheme, shape, q, scale.view(specs["scale"]), table=table)


def _rounded_twice(absmax: Tensor) -> Tensor:
    """What is left of the scales after they were quantized to 8 bits around their mean."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = absmax.mean()
    codes, state = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return dequantize_blockwise(codes, state) + offset


@dataclass(frozen=True)
class LLMInt8(OnLoad):
    threshold: float

    name: ClassVar[str] = "bitsandbytes"

    @property
    def summary(self) -> str:
        return f"bitsandbytes LLM.int8, threshold {self.threshold:g}, quantized while loading"

    def scheme(self, shape: LinearShape) -> Scheme:
        activation = Activation(WeightKind.INT8, threshold=self.threshold)
        return Scheme(WeightKind.INT8, (1, shape.in_features), activation=activation)

    def quantize(self, weight: Tensor, scheme: Scheme, shape: LinearShape) -> QuantWeight:
        from bitsandbytes.functional import int8_vectorwise_quant

        q = torch.empty(canonical_specs(scheme, shape)["q"], dtype=torch.uint8, device=weight.device)
        scales = []
        rows = max(1, WEIGHTS_AT_ONCE // shape.in_features)
        for start in range(0, shape.out_features, rows):
            codes, absmax, _ = int8_vectorwise_quant(weight[start : start + rows].to(torch.float16).contiguous())
            q[start : start + rows] = codes.view(torch.uint8) ^ 128
            scales.append(absmax)
        return QuantWeight(scheme, shape, q, torch.cat(scales)[:, None] / 127)
