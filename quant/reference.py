"""The truth: what a quantized weight is worth and what multiplying by it gives, in plain torch, on every device.

Tests and benchmarks compare with these functions, and :mod:`quant.kernels.reference` runs them where nothing faster can.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.activation import quantize_dequantize
from quant.base import QuantWeight, WeightKind
from quant.packing import E2M1_VALUES, unpack_stream


def dequantize(weight: QuantWeight) -> Tensor:
    """``W [out, in]`` in float32, columns in the layer's input order."""
    assert weight.layout == "canonical", weight.layout
    values = _values(weight) * _spread(weight, weight.scale)
    if weight.global_scale is not None:
        values *= weight.global_scale
    if weight.order is None:
        return values
    natural = torch.empty_like(values)
    natural[:, weight.order.long()] = values
    return natural


def linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """``x [.., in]`` times ``W.T``, with the weight rounded to the dtype of ``x``.

    Inputs are quantized first, where the scheme says so. They may come back in float32, which then is what is multiplied in.
    """
    activation, inputs = weight.scheme.activation, x
    if activation is not None:
        inputs = quantize_dequantize(x, activation, weight.input_scale, weight.input_zero)
    bias = None if bias is None else bias.to(inputs.dtype)
    return F.linear(inputs, dequantize(weight).to(inputs.dtype), bias).to(x.dtype)


def _values(weight: QuantWeight) -> Tensor:
    """What the codes mean before they are scaled, in float32."""
    kind, inputs = weight.scheme.kind, weight.shape.in_features
    if kind is WeightKind.FP8:
        return weight.q.to(torch.float32)
    codes = unpack_stream(weight.q, kind.bits, inputs)
    if kind.is_integer:
        zero = 2 ** (kind.bits - 1) if weight.zero is None else _spread(weight, weight.zero)
        return codes.to(torch.float32) - zero
    table = torch.tensor(E2M1_VALUES, device=codes.device) if weight.table is None else weight.table
    return table[codes.int()]


def _spread(weight: QuantWeight, blocks: Tensor) -> Tensor:
    """One number a block to one number a weight."""
    (outputs, inputs), shape = weight.scheme.block, weight.shape
    blocks = blocks.to(torch.float32)
    if weight.scheme.flat:
        count = shape.out_features * shape.in_features
        return blocks.repeat_interleave(inputs)[:count].view(shape.out_features, shape.in_features)
    rows = blocks.repeat_interleave(outputs, 0)[: shape.out_features]
    return rows.repeat_interleave(inputs, 1)[:, : shape.in_features]
