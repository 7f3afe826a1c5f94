"""Round-to-nearest: every weight by itself to the nearest number that its block's scale can express.

Integers, asymmetric: ``scale = (max - min) / (2 ** bits - 1)`` of a group, its range widened to hold zero, and ``zero =
round(-min / scale)``. Symmetric: ``scale = max|w| / (2 ** (bits - 1) - 0.5)``. Scales are rounded to the dtype of the weight
first, and codes are found with what is left of them, as compressed-tensors and GPTQModel do.

FP8: ``scale = max|w| / 448`` of an output, float32, as vLLM's per-channel weights. E2M1 (MXFP4): 32 inputs under a power of
two, the one that compressed-tensors 0.20.0 takes (``mxfp_utils.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.activation import E2M1_MAX, FP8_MAX, nonzero, power_exponent, round_to
from quant.base import Activation, LinearShape, QuantWeight, Scheme, WeightKind, canonical_specs
from quant.onload.base import WEIGHTS_AT_ONCE, OnLoad
from quant.packing import E2M1_VALUES, pack_stream


@dataclass(frozen=True)
class Rounding(OnLoad):
    """``group`` inputs share a scale, -1 is all of a row; where it does not divide them, its largest divisor that does.
    ``symmetric`` matters for integers."""

    kind: WeightKind
    group: int
    symmetric: bool = True
    activation: Activation | None = None

    name: ClassVar[str] = "rounded"

    @property
    def summary(self) -> str:
        group = "one scale an output" if self.group == -1 else f"group {self.group}"
        symmetry = f", {'symmetric' if self.symmetric else 'asymmetric'}" if self.kind.is_integer else ""
        inputs = f", inputs {self.activation}" if self.activation else ""
        return f"{self.kind.value} weights, {group}{symmetry}, rounded to nearest while loading{inputs}"

    @property
    def scale_dtype(self) -> torch.dtype:
        if self.kind.is_integer:
            return self.dtype
        return torch.float8_e8m0fnu if self.kind is WeightKind.E2M1 else torch.float32

    def scheme(self, shape: LinearShape) -> Scheme:
        zero_point = self.kind.is_integer and not self.symmetric
        return Scheme(self.kind, (1, self._group_of(shape)), zero_point=zero_point, activation=self.activation)

    def remark(self, shape: LinearShape) -> str | None:
        group, inputs = self._group_of(shape), shape.in_features
        if self.group in (-1, group):
            return None
        return f"group {group}, because {self.group} does not divide {inputs} inputs"

    def quantize(self, weight: Tensor, scheme: Scheme, shape: LinearShape) -> QuantWeight:
        return quantize(weight, scheme, shape)

    def _group_of(self, shape: LinearShape) -> int:
        inputs = shape.in_features
        if self.group == -1:
            return inputs
        if self.kind is WeightKind.E2M1:
            return self.group  # a short last block is part of the format
        return next(size for size in range(min(self.group, inputs), 0, -1) if inputs % size == 0)


def quantize(weight: Tensor, scheme: Scheme, shape: LinearShape) -> QuantWeight:
    """The nearest canonical weight of ``scheme`` (one output high, not flat) for ``weight [out, in]``."""
    rounded = _integers if scheme.kind.is_integer else {WeightKind.FP8: _fp8, WeightKind.E2M1: _e2m1}[scheme.kind]
    specs = canonical_specs(scheme, shape)
    rows = max(1, WEIGHTS_AT_ONCE // shape.in_features)
    whole: dict[str, Tensor] = {}
    for start in range(0, shape.out_features, rows):
        part = rounded(weight[start : start + rows].contiguous(), scheme)
        for name, tensor in part.items():
            target = whole.setdefault(name, torch.empty(specs[name], dtype=tensor.dtype, device=tensor.device))
            target[start : start + rows] = tensor
    return QuantWeight(scheme, shape, whole["q"], whole["scale"], whole.get("zero"))


def _integers(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    bits, grouped = scheme.kind.bits, _grouped(weight, scheme)
    largest = 2**bits - 1
    if scheme.zero_point:
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        scale = nonzero(_divided(high - low, largest).to(weight.dtype).float())
        zero = (-low / scale).round().clamp(0, largest)
    else:
        scale = nonzero(_divided(grouped.abs().amax(-1, keepdim=True), largest / 2).to(weight.dtype).float())
        zero = torch.full_like(scale, 2 ** (bits - 1))
    codes = ((grouped / scale).round_() + zero).clamp_(0, largest).to(torch.uint8)
    tensors = {"q": _packed(codes, weight, bits), "scale": scale.squeeze(-1).to(weight.dtype)}
    return tensors | ({"zero": zero.squeeze(-1).to(torch.uint8)} if scheme.zero_point else {})


def _fp8(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    wide = weight.float()
    scale = nonzero(_divided(wide.abs().amax(-1, keepdim=True), FP8_MAX))
    return {"q": (wide / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), "scale": scale}


def _e2m1(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    grouped = _grouped(weight, scheme)
    exponent = power_exponent(grouped.abs().amax(-1, keepdim=True), WeightKind.E2M1)
    values = round_to((grouped / torch.exp2(exponent)).clamp_(-E2M1_MAX, E2M1_MAX), WeightKind.E2M1)
    sizes = torch.tensor(E2M1_VALUES[:8], device=weight.device)
    codes = torch.searchsorted(sizes, values.abs()) + 8 * (values < 0)
    scale = (exponent.squeeze(-1) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return {"q": _packed(codes.to(torch.uint8), weight, 4), "scale": scale}


def _divided(tensor: Tensor, number: float) -> Tensor:
    """By a tensor: on a GPU torch multiplies by the reciprocal of a number, and the largest weight of a symmetric group,
    which lies just between two codes, would get another one than on a CPU."""
    return tensor / torch.full_like(tensor[:1], number)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """``[rows, groups, group]`` in float32, the last group filled up with zeros."""
    return F.pad(weight.float(), (0, -weight.shape[1] % scheme.group)).unflatten(-1, (-1, scheme.group))


def _packed(codes: Tensor, weight: Tensor, bits: int) -> Tensor:
    return pack_stream(codes.flatten(1)[:, : weight.shape[1]], bits)
