"""The truth as a kernel: last in the list, slow, never refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.base import LinearKernel, LinearShape, QuantWeight, Scheme
from quant.reference import linear


class ReferenceKernel(LinearKernel):
    """Dequantizes the whole weight on every call, in plain torch."""

    name = "reference"
    joins = False
    summary = "torch, dequantizes on every call"

    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        return None

    def apply(self, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)
