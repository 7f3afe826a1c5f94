"""The truth: what a quantized weight is worth and what multiplying by it gives, in plain torch, on every device.

Tests and benchmarks compare with these functions, and :mod:`quant.kernels.reference` runs them where nothing faster can.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.base import QuantWeight
from quant.packing import unpack_stream


def dequantize(weight: QuantWeight) -> Tensor:
    """``W [out, in]`` in float32, columns in the layer's input order."""
    assert weight.layout == "canonical", weight.layout
    scheme, shape = weight.scheme, weight.shape
    codes = unpack_stream(weight.q, scheme.kind.bits, shape.in_features).to(torch.float32)
    outputs, inputs = scheme.block

    def spread(blocks: Tensor) -> Tensor:
        rows = blocks.to(torch.float32).repeat_interleave(outputs, 0)[: shape.out_features]
        return rows.repeat_interleave(inputs, 1)[:, : shape.in_features]

    zero = 2 ** (scheme.kind.bits - 1) if weight.zero is None else spread(weight.zero)
    values = (codes - zero) * spread(weight.scale)
    if weight.order is None:
        return values
    natural = torch.empty_like(values)
    natural[:, weight.order.long()] = values
    return natural


def linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """``x [.., in]`` times ``W.T``, with the weight rounded to the dtype of ``x``."""
    return F.linear(x, dequantize(weight).to(x.dtype), bias)
