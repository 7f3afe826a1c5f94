"""``y = x @ W.T`` for few rows: the weight is unpacked in registers and multiplied by tensor cores, scales come after the dot.

A program has a tile of the output and a share of the columns. Where the columns are shared out, the parts are written down,
and the program that is done last adds them up, in their order: no second launch, no zeroed output, always the same sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.gpu.device import device_of, dot_type
from quant.kernels.gpu.tuned import Config, config_for
from quant.kernels.gpu.unpack import assembly_of, name_of, offset_of, planes, subtract
from quant.kernels.planar import MOST_TILES, PlanarWeight


@triton.jit(do_not_specialize=["rows", "blocks", "share"])
def multiply_kernel(
    x, words, scale, zero, table, pairs, bias, y, parts, counters, rows, outputs, inputs, x_row, blocks, share,
    KIND: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr,
    ZERO: tl.constexpr, CENTRE: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_INPUTS: tl.constexpr, EVEN_OUTPUTS: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = PLANES * WIDTH
    GROUPS: tl.constexpr = BLOCK // GROUP if GROUPED and GROUP < BLOCK else 1  # of a block
    OF_GROUP: tl.constexpr = PLANES // GROUPS
    m = tl.program_id(1) * M + tl.arange(0, M)
    n = tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(2)
    first = split * share
    stop = tl.minimum(first + share, blocks)
    live_m, live_n = m < rows, n < outputs
    i = tl.arange(0, WIDTH)
    x_rows = x + m.to(tl.int64)[:, None] * x_row

    acc = tl.zeros([N, M] if WEIGHT_FIRST else [M, N], tl.float32)
    for block in range(first, stop):
        places = words + (block * outputs + n)[:, None] * WIDTH + i[None, :]
        if EVEN_OUTPUTS:
            word = tl.load(places, eviction_policy="evict_first")
        else:
            word = tl.load(places, mask=live_n[:, None], other=0, eviction_policy="evict_first")
        numbers = planes(word, table, pairs, KIND, DTYPE, ASSEMBLY)
        for group in tl.static_range(GROUPS):
            index = (block * BLOCK + group * GROUP) // GROUP * outputs + n if GROUPED else n
            part = tl.zeros(acc.shape, tl.float32)
            if ZERO:
                z = (tl.load(zero + index, mask=live_n, other=0).to(tl.float32) + OFFSET).to(DTYPE)[:, None]
            for member in tl.static_range(OF_GROUP):
                w = numbers[group * OF_GROUP + member]
                if ZERO:
                    w = subtract(w, z, ASSEMBLY)
                elif CENTRE != 0:
                    w = subtract(w, tl.full([N, 1], CENTRE, DTYPE), ASSEMBLY)
                k = block * BLOCK + (group * OF_GROUP + member) * WIDTH + i
                live = live_m[:, None] if EVEN_INPUTS else live_m[:, None] & (k < inputs)[None, :]
                a = tl.load(x_rows + k[None, :], mask=live, other=0.0, eviction_policy="evict_last").to(DTYPE)
                if GROUPED:
                    part = tl.dot(w, tl.trans(a), part) if WEIGHT_FIRST else tl.dot(a, tl.trans(w), part)
                else:
                    acc = tl.dot(w, tl.trans(a), acc) if WEIGHT_FIRST else tl.dot(a, tl.trans(w), acc)
            if GROUPED:
                s = tl.load(scale + index, mask=live_n, other=0.0).to(tl.float32)
                acc += part * (s[:, None] if WEIGHT_FIRST else s[None, :])

    if WEIGHT_FIRST:
        place = m.to(tl.int64)[None, :] * outputs + n[:, None]
        live = live_m[None, :] & live_n[:, None]
    else:
        place = m.to(tl.int64)[:, None] * outputs + n[None, :]
        live = live_m[:, None] & live_n[None, :]
    if SPLIT:
        size = tl.cast(rows, tl.int64) * outputs
        tl.store(parts + split * size + place, acc, mask=live)
        tl.debug_barrier()  # all of the part is written before it is counted
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") != tl.num_programs(2) - 1:
            return
        acc = tl.zeros(acc.shape, tl.float32)
        for each in range(tl.num_programs(2)):
            acc += tl.load(parts + each * size + place, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)
    if not GROUPED:
        s = tl.load(scale + n, mask=live_n, other=0.0).to(tl.float32)
        acc *= s[:, None] if WEIGHT_FIRST else s[None, :]
    if BIAS:
        b = tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)
        acc += b[:, None] if WEIGHT_FIRST else b[None, :]
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=live)


def splits_of(tiles: int, blocks: int, config: Config, processors: int) -> int:
    """Parts of the columns: enough to fill the device, each of at least ``config.blocks`` blocks."""
    if tiles > MOST_TILES:
        return 1
    return max(1, min(config.programs * processors // tiles, blocks // config.blocks, 32))


def multiply(x: Tensor, weight: PlanarWeight, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """``x [rows, in]``, float16 or bfloat16, in the order of the weight's columns."""
    (rows, inputs), outputs = x.shape, weight.shape.out_features
    device = device_of(x.device.index)
    config = config or config_for(weight.bits, rows, device.capability)
    blocks = weight.q.shape[0]
    tiles_m, tiles_n = triton.cdiv(rows, config.rows), triton.cdiv(outputs, config.outputs)
    splits = splits_of(tiles_m * tiles_n, blocks, config, device.processors)
    share = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, share)
    y = x.new_empty(rows, outputs)
    parts = y if splits == 1 else x.new_empty(splits, rows, outputs, dtype=torch.float32)
    kind = name_of(weight.scheme.kind)
    assembly = assembly_of(kind, x.dtype)
    offset = offset_of(kind, x.dtype, assembly)
    centre = 2 ** (weight.scheme.kind.bits - 1) + offset if weight.scheme.kind.is_integer else 0
    pairs = weight.q if weight.pairs is None else weight.pairs[int(x.dtype != torch.bfloat16)]
    multiply_kernel[(tiles_n, tiles_m, splits)](
        x, weight.q, weight.scale, weight.scale if weight.zero is None else weight.zero,
        weight.scale if weight.table is None else weight.table, pairs, x if bias is None else bias, y, parts,
        weight.counters, rows, outputs, inputs, x.stride(0), blocks, share,
        KIND=kind, PLANES=32 // weight.bits, WIDTH=weight.width, GROUP=weight.group, GROUPED=weight.grouped,
        ZERO=weight.zero is not None, CENTRE=centre, OFFSET=offset,
        BIAS=bias is not None, SPLIT=splits > 1, EVEN_INPUTS=inputs == weight.columns,
        EVEN_OUTPUTS=outputs % config.outputs == 0, DTYPE=dot_type(x.dtype), ASSEMBLY=assembly,
        M=config.rows, N=config.outputs, WEIGHT_FIRST=config.weight_first,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y
