"""Rows of a weight, dense: for so many rows of ``x`` that a large matrix product is worth more than not writing them down."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.gpu.unpack import name_of, number
from quant.kernels.planar import PlanarWeight

OUTPUTS = 32
"""Of a program, which takes a block of columns."""


@triton.jit
def dequantize_kernel(
    words, scale, zero, table, dense, first, count, outputs, columns,
    KIND: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    CENTRE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 32 // BITS
    block = tl.program_id(0)
    row = tl.program_id(1) * N + tl.arange(0, N)
    live, n = row < count, first + row
    i = tl.arange(0, WIDTH)
    word = tl.load(words + (block * outputs + n)[:, None] * WIDTH + i[None, :], mask=live[:, None], other=0)
    for plane in tl.static_range(PLANES):
        start = (block * PLANES + plane) * WIDTH
        values = number(word, plane * BITS, table, KIND, tl.float32)
        index = start // GROUP * outputs + n
        if ZERO:
            values -= tl.load(zero + index, mask=live, other=0).to(tl.float32)[:, None]
        else:
            values -= CENTRE
        values *= tl.load(scale + index, mask=live, other=0.0).to(tl.float32)[:, None]
        places = dense + row.to(tl.int64)[:, None] * columns + (start + i)[None, :]
        tl.store(places, values.to(dense.dtype.element_ty), mask=live[:, None])


def dequantize(weight: PlanarWeight, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Outputs ``first ... first + count - 1``, ``[count, columns]`` in the order of the weight's columns."""
    dense = torch.empty(count, weight.columns, dtype=dtype, device=weight.device)
    kind = weight.scheme.kind
    dequantize_kernel[(weight.q.shape[0], triton.cdiv(count, OUTPUTS))](
        weight.q, weight.scale, weight.scale if weight.zero is None else weight.zero,
        weight.scale if weight.table is None else weight.table, dense, first, count, weight.shape.out_features,
        weight.columns, KIND=name_of(kind), BITS=weight.bits, WIDTH=weight.width, GROUP=weight.group,
        ZERO=weight.zero is not None, CENTRE=2 ** (kind.bits - 1) if kind.is_integer else 0, N=OUTPUTS, num_warps=4,
    )  # fmt: skip
    return dense
