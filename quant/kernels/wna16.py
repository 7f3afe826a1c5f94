"""Weights of up to 8 bits on a GPU, in Triton: integers in groups, FP8, and 4-bit floats and tables, times inputs of 16 bits.

A few rows are multiplied by what is unpacked in registers (:mod:`quant.kernels.gpu.multiply`), more, on Hopper, by what is
scaled there as well (:mod:`quant.kernels.gpu.hopper`), many by a dense copy that is made a slice at a time
(:mod:`quant.kernels.gpu.dequantize`), as are float32 inputs. For few rows codes are multiplied as the numbers they are and
scaled in float32 after, as exactly as float32 sums; the values of NF4 and FP4 tables are rounded to the type of ``x``. In the
other ways every weight is rounded, once.

Inputs that are to be quantized are, by torch, and multiplied as the numbers that they then are: what the reference does, not
yet the product of two 8-bit numbers that the hardware could do.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.activation import quantize_dequantize
from quant.base import LinearKernel, LinearShape, QuantWeight, Scheme
from quant.kernels.planar import PlanarWeight, planar

OLDEST = (8, 0)
WIDTH, NARROW = 32, 16
"""Columns of a plane, and for groups that are no larger than the second."""
MOST_WEIGHTS = 1 << 33
"""The kernels count words in 32 bits."""


class Wna16Kernel(LinearKernel):
    """Triton itself is imported when a kernel is first launched."""

    name = "wna16"
    summary = "Triton, unpacked in registers; many rows by dequantized slices"

    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        if refusal := no_triton(device):
            return refusal
        if scheme.flat and shape.in_features % scheme.group:
            return f"wants rows of whole groups, {scheme.group} does not divide {shape.in_features} inputs"
        if shape.in_features * shape.out_features > MOST_WEIGHTS:
            return f"counts up to {MOST_WEIGHTS} weights, {shape} are {shape.in_features * shape.out_features}"
        return None

    def prepare(self, weight: QuantWeight) -> QuantWeight:
        group = min(weight.scheme.group, weight.shape.in_features)
        return planar(weight, NARROW if group <= NARROW else WIDTH)

    def apply(self, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, PlanarWeight), weight.layout
        outputs, inputs = weight.shape.out_features, weight.shape.in_features
        if x.shape[-1] != inputs or x.device != weight.device:
            raise ValueError(f"x is {list(x.shape)} on {x.device}, the weight is {weight.shape} on {weight.device}")
        rows, activation = x.reshape(-1, inputs), weight.scheme.activation
        if not len(rows):
            return x.new_empty(*x.shape[:-1], outputs)
        if activation is not None:  # may give float32
            rows = quantize_dequantize(rows, activation, weight.input_scale, weight.input_zero)
        rows = weight.inputs(rows).contiguous()
        with on(x.device):
            y = product(rows, weight, bias)
        return y.to(x.dtype).view(*x.shape[:-1], outputs)


def product(x: Tensor, weight: PlanarWeight, bias: Tensor | None) -> Tensor:
    """``x [rows, in]``, in the order of the columns: the way that is the fastest for so many rows."""
    from quant.kernels.gpu import hopper, tuned
    from quant.kernels.gpu.multiply import multiply

    rows = len(x)
    if x.dtype != torch.float32 and rows <= tuned.FEW_ROWS[weight.bits]:
        return multiply(x, weight, bias)
    if rows <= tuned.WIDE_ROWS[weight.bits] and hopper.takes(x, weight):
        return hopper.multiply_wide(x, weight, bias)
    if x.dtype != torch.float32 and rows <= tuned.MOST_ROWS:
        return multiply(x, weight, bias)
    return by_slices(x, weight, bias)


def by_slices(x: Tensor, weight: PlanarWeight, bias: Tensor | None) -> Tensor:
    """``x [rows, in]``, in the order of the columns, times the dequantized weight."""
    from quant.kernels.gpu.dequantize import dequantize
    from quant.kernels.gpu.tuned import DENSE_BYTES

    outputs, inputs = weight.shape.out_features, x.shape[1]
    bias = None if bias is None else bias.to(x.dtype)
    count = min(outputs, max(1, DENSE_BYTES // (256 * weight.columns * x.dtype.itemsize)) * 256)
    if count == outputs:
        return F.linear(x, dequantize(weight, 0, outputs, x.dtype)[:, :inputs], bias)
    y = x.new_empty(len(x), outputs)
    for first in range(0, outputs, count):
        here = slice(first, min(first + count, outputs))
        dense = dequantize(weight, first, here.stop - first, x.dtype)[:, :inputs].t()
        if bias is None:
            torch.mm(x, dense, out=y[:, here])
        else:
            torch.addmm(bias[here], x, dense, out=y[:, here])
    return y


def no_triton(device: torch.device) -> str | None:
    """Why no Triton kernel runs on this device."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"  # on any device, for tests
    if device.type != "cuda" and not interpreting:
        return f"runs on a CUDA device, not on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'relinear[gpu]'"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"needs compute capability 8.0, and this device has {capability[0]}.{capability[1]}"
    return None


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
