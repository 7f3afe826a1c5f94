"""``y = x @ W.T`` for few rows: the weight is unpacked in registers and multiplied by tensor cores, scales come after the dot.

A program has a tile of the output and a share of the columns. Where the device can (``Device.early``), programs start while
the launch before them still makes ``x``, ask for their scales, and wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.gpu.device import device_of, dot_type
from quant.kernels.gpu.share import add_parts, codes_of, grid_of, of_group, of_groups
from quant.kernels.gpu.tuned import FINE_GROUP, Config, config_for
from quant.kernels.gpu.unpack import planes
from quant.kernels.planar import PlanarWeight

FEW = 16
"""Up to so many rows in a tile, the sums of the inputs that zero points are multiplied by are made by the tensor cores, which
have time then: a dot with ones has them in every row. For more rows, they come from a launch before."""
SUM_ROWS = 16


@triton.jit
def sums_kernel(x, sums, rows, inputs, x_row, GROUP: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    m, i = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, PADDED)
    total = tl.zeros([M], tl.float32)
    for start in range(0, GROUP, PADDED):
        k = tl.program_id(0) * GROUP + start + i
        live = (m < rows)[:, None] & ((start + i < GROUP) & (k < inputs))[None, :]
        total += tl.sum(
            tl.load(x + m.to(tl.int64)[:, None] * x_row + k[None, :], mask=live, other=0.0).to(tl.float32), 1
        )
    tl.store(sums + tl.program_id(0) * rows + m, total, mask=m < rows)


def sums_of(x: Tensor, weight: PlanarWeight) -> Tensor:
    """Of the columns of each group, or of each block where all columns are one group: float32 ``[groups, rows]``. Groups
    that only fill up a block are counted in."""
    rows, inputs = x.shape
    group, groups = (weight.group, weight.scale.shape[0]) if weight.grouped else (weight.block, weight.q.shape[0])
    sums = x.new_empty(groups, rows, dtype=torch.float32)
    sums_kernel[(groups, triton.cdiv(rows, SUM_ROWS))](
        x, sums, rows, inputs, x.stride(0), GROUP=group, PADDED=min(triton.next_power_of_2(group), 512), M=SUM_ROWS,
        num_warps=4,
    )  # fmt: skip
    return sums


@triton.jit
def across(values, FIRST: tl.constexpr):
    """Along the first dimension of a tile, or the second."""
    return values[:, None] if FIRST else values[None, :]


@triton.jit(do_not_specialize=["rows", "blocks", "share"])
def multiply_kernel(
    x, words, scale, zero, table, bias, sums, y, parts, counters, rows, outputs, inputs, x_row, blocks, share,
    KIND: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, SUMMED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_INPUTS: tl.constexpr, EVEN_OUTPUTS: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WEIGHT_FIRST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = PLANES * WIDTH
    GROUPS: tl.constexpr = BLOCK // GROUP if GROUPED and GROUP < BLOCK else 1  # of a block
    OF_GROUP: tl.constexpr = PLANES // GROUPS
    SHIFTED: tl.constexpr = ZERO or OFFSET != 0
    DOTTED: tl.constexpr = SHIFTED and not SUMMED  # ones
    SUMS: tl.constexpr = GROUP if GROUPED else BLOCK
    AHEAD: tl.constexpr = GROUPS <= 2 or M <= 16  # else there are too many to be kept in registers
    m = tl.program_id(1) * M + tl.arange(0, M)
    n = tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(2)
    first = split * share
    stop = tl.minimum(first + share, blocks)
    live_m, live_n = m < rows, n < outputs
    i = tl.arange(0, WIDTH)
    x_rows = x + m.to(tl.int64)[:, None] * x_row

    acc = tl.zeros([N, M] if WEIGHT_FIRST else [M, N], tl.float32)
    ones = tl.full([N, WIDTH], 1.0, DTYPE)
    every = tl.zeros(acc.shape, tl.float32) if DOTTED else tl.zeros([M], tl.float32)  # sum of inputs
    # What is loaded of a group is too little to be copied asynchronously, so it is asked for a block ahead.
    scales = of_groups(scale, first, n, live_n, outputs, BLOCK, GROUP, GROUPS, AHEAD)
    zeros = of_groups(zero, first, n, live_n, outputs, BLOCK, GROUP, GROUPS, AHEAD and ZERO)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    totals = of_groups(sums, first, m, live_m, rows, BLOCK, SUMS, GROUPS, AHEAD and SUMMED)
    for block in range(first, stop):
        places = words + (block * outputs + n)[:, None] * WIDTH + i[None, :]
        if EVEN_OUTPUTS:
            word = tl.load(places, eviction_policy="evict_first")
        else:
            word = tl.load(places, mask=live_n[:, None], other=0, eviction_policy="evict_first")
        following = tl.minimum(block + 1, stop - 1)
        next_scales, next_zeros = scales, zeros
        next_totals = of_groups(sums, following, m, live_m, rows, BLOCK, SUMS, GROUPS, AHEAD and SUMMED)
        if GROUPED:
            next_scales = of_groups(scale, following, n, live_n, outputs, BLOCK, GROUP, GROUPS, AHEAD)
            next_zeros = of_groups(zero, following, n, live_n, outputs, BLOCK, GROUP, GROUPS, AHEAD and ZERO)
        numbers = planes(word, table, KIND, DTYPE, ASSEMBLY, PLANES)
        for group in tl.static_range(GROUPS):
            part, total = acc, every
            if GROUPED:
                part = tl.zeros(acc.shape, tl.float32)
                total = part
            for member in tl.static_range(OF_GROUP):
                w = numbers[group * OF_GROUP + member]
                k = block * BLOCK + (group * OF_GROUP + member) * WIDTH + i
                live = live_m[:, None] if EVEN_INPUTS else live_m[:, None] & (k < inputs)[None, :]
                a = tl.load(x_rows + k[None, :], mask=live, other=0.0, eviction_policy="evict_last").to(DTYPE)
                part = tl.dot(w, tl.trans(a), part) if WEIGHT_FIRST else tl.dot(a, tl.trans(w), part)
                if DOTTED:
                    total = tl.dot(ones, tl.trans(a), total) if WEIGHT_FIRST else tl.dot(a, tl.trans(ones), total)
            if GROUPED:
                if AHEAD:
                    s = scales[group]
                else:
                    s = of_group(scale, block, group, n, live_n, outputs, BLOCK, GROUP)
                if SUMMED and AHEAD:
                    total = across(totals[group], not WEIGHT_FIRST)
                elif SUMMED:
                    total = across(of_group(sums, block, group, m, live_m, rows, BLOCK, SUMS), not WEIGHT_FIRST)
                if ZERO and AHEAD:
                    part -= total * (across(zeros[group], WEIGHT_FIRST) + OFFSET)
                elif ZERO:
                    z = of_group(zero, block, group, n, live_n, outputs, BLOCK, GROUP)
                    part -= total * (across(z, WEIGHT_FIRST) + OFFSET)
                elif SHIFTED:
                    part -= total * OFFSET
                acc += part * across(s, WEIGHT_FIRST)
            else:
                acc, every = part, total + totals[group] if SUMMED else total
        scales, zeros, totals = next_scales, next_zeros, next_totals

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if not GROUPED:
        if SHIFTED:
            every = across(every, not WEIGHT_FIRST) if SUMMED else every
            acc -= every * (across(zeros[0], WEIGHT_FIRST) + OFFSET if ZERO else OFFSET)
        acc *= across(scales[0], WEIGHT_FIRST)
    if WEIGHT_FIRST:
        place = m.to(tl.int64)[None, :] * outputs + n[:, None]
        live = live_m[None, :] & live_n[:, None]
    else:
        place = m.to(tl.int64)[:, None] * outputs + n[None, :]
        live = live_m[:, None] & live_n[None, :]
    if SPLIT:
        acc, last = add_parts(acc, parts, counters, tl.cast(rows, tl.int64) * outputs, place, live)
        if not last:
            return
    if BIAS:
        b = tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)
        acc += across(b, WEIGHT_FIRST)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=live)


def multiply(x: Tensor, weight: PlanarWeight, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """``x [rows, in]``, float16 or bfloat16, in the order of the weight's columns."""
    (rows, inputs), outputs = x.shape, weight.shape.out_features
    device = device_of(x.device.index)
    kind = weight.scheme.kind
    fine = kind.is_integer and weight.grouped and weight.group < FINE_GROUP
    config = config or config_for(weight.bits, rows, device.capability, fine)
    blocks = weight.q.shape[0]
    tiles_m, tiles_n, splits, share = grid_of(rows, outputs, blocks, config, device.processors)
    y = x.new_empty(rows, outputs)
    parts = y if splits == 1 else x.new_empty(splits, rows, outputs, dtype=torch.float32)
    name, assembly, offset = codes_of(weight, x.dtype, 32 // weight.bits)
    summed = config.rows > FEW and (offset != 0 or weight.zero is not None)
    sums = sums_of(x, weight) if summed else weight.scale
    multiply_kernel[(tiles_n, tiles_m, splits)](
        x, weight.q, weight.scale, weight.scale if weight.zero is None else weight.zero,
        weight.scale if weight.table is None else weight.table, x if bias is None else bias, sums, y, parts,
        weight.counters, rows, outputs, inputs, x.stride(0), blocks, share,
        KIND=name, PLANES=32 // weight.bits, WIDTH=weight.width, GROUP=weight.group, GROUPED=weight.grouped,
        ZERO=weight.zero is not None, OFFSET=offset, SUMMED=summed, BIAS=bias is not None, SPLIT=splits > 1,
        EVEN_INPUTS=inputs == weight.columns, EVEN_OUTPUTS=outputs % config.outputs == 0, DTYPE=dot_type(x.dtype),
        ASSEMBLY=assembly, M=config.rows, N=config.outputs, WEIGHT_FIRST=config.weight_first, EARLY=device.early,
        num_warps=config.warps, num_stages=config.stages, launch_pdl=device.early,
    )  # fmt: skip
    return y
