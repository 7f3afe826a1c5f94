"""A kernel that multiplies in float32, and one whose groups take their neighbours' scales."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.base import LinearKernel, LinearShape, QuantWeight, Scheme
from quant.reference import dequantize


class ToyKernel(LinearKernel):
    name = "toy"

    @property
    def summary(self) -> str:
        return "toy, float32"

    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        return "leaves inputs as they are" if scheme.activation else None

    def apply(self, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
        return F.linear(x.float(), dequantize(weight), None if bias is None else bias.float()).to(x.dtype)


class WrongKernel(ToyKernel):
    name = "toy-wrong"

    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        return super().refuses(scheme, shape, device) or (None if scheme.kind.bits == 4 else "takes 4 bits only")

    def prepare(self, weight: QuantWeight) -> QuantWeight:
        return replace(weight, scale=weight.scale.roll(1, 0).contiguous())
