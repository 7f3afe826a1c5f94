"""``y = x @ W.T`` for tens to hundreds of rows on Hopper: the weight is unpacked and scaled in registers, in the layout in
which the tensor cores take their left operand, while they multiply what was unpacked before.

In Gluon, Triton's language of explicit layouts: Triton itself moves what was unpacked through shared memory, and waits for
every product. Few rows have time to scale sums (:mod:`quant.kernels.gpu.multiply`), which is more exact; here the weight is
rounded to the type of ``x``, once, as in a dense copy of it.

A program has a tile of the output and a share of the columns, of which it takes a *step* of four planes at a time: all of a
word of 8-bit codes, half of those of 4-bit codes, for which there are registers. The inputs of the next steps are on their
way to shared memory meanwhile, the words of the next block to registers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quant.kernels.gpu.device import device_of, dot_type
from quant.kernels.gpu.share import codes_of, grid_of
from quant.kernels.gpu.tuned import Config, wide_config_for
from quant.kernels.gpu.unpack import interpreting, times
from quant.kernels.planar import PlanarWeight

PLANES = gl.constexpr(4)
load_tile = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared  # as of 3.9, and before
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def scaling_of(x: torch.dtype, scale: torch.dtype, shifted: bool) -> str:
    """Assembly for ``($1 + $2) * ($3 + $4)`` of pairs, where ``$4`` is what the type of ``x`` could not hold of the scale, so
    that the weight is rounded once."""
    kind, one = ("bf16x2", 0x3F803F80) if x == torch.bfloat16 else ("f16x2", 0x3C003C00)
    lines = [f"mov.b32 one, {one}; mov.b32 nothing, {0x80008000}; mov.b32 t, $1;"]
    lines += [f"fma.rn.{kind} t, $1, one, $2;"] if shifted else []
    rest = "nothing"
    if scale != x:
        lines += [f"fma.rn.{kind} rest, t, $4, nothing;"]
        rest = "rest"
    lines += [f"fma.rn.{kind} $0, t, $3, {rest};"]
    return "{ .reg .b32 t, one, nothing, rest; " + " ".join(lines) + " }"


@gluon.jit
def load_words(words, block, n, i, outputs, WIDTH: gl.constexpr):
    return gl.load(words + (block * outputs + gl.minimum(n, outputs - 1))[:, None] * WIDTH + i[None, :])


@gluon.jit
def of_groups(
    values, step, n, outputs, STEP: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, WANTED: gl.constexpr
):  # fmt: skip
    found = ()
    if WANTED:
        for group in gl.static_range(GROUPS):
            place = (step * STEP + group * GROUP) // GROUP * outputs + gl.minimum(n, outputs - 1)
            found += (gl.load(values + place).to(gl.float32),)  # type: ignore[assignment]
    return found


@gluon.jit
def four_planes(word, DTYPE: gl.constexpr, ASSEMBLY: gl.constexpr):
    return gl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,r,r", [word], dtype=times(4, DTYPE), is_pure=True, pack=2)


@gluon.jit
def scaled(
    w, scales, zeros, group: gl.constexpr, OFFSET: gl.constexpr, ZERO: gl.constexpr, SCALED: gl.constexpr,
    DTYPE: gl.constexpr, SCALING: gl.constexpr,
):  # fmt: skip
    """``(w [n, k] - zero [n] - OFFSET) * scale [n]``, of a group."""
    shift = gl.zeros_like(scales[group]) - OFFSET
    if ZERO:
        shift -= zeros[group]
    if SCALED:
        high = scales[group].to(DTYPE)
        low = (scales[group] - high.to(gl.float32)).to(DTYPE)
        numbers = gl.inline_asm_elementwise(
            SCALING, "=r,r,r,r,r", [w, shift.to(DTYPE)[:, None], high[:, None], low[:, None]],
            dtype=times(1, DTYPE), is_pure=True, pack=2,
        )  # fmt: skip
        return numbers[0]
    elif ZERO or OFFSET != 0:  # exact: integers of 8 bits
        return w + shift.to(DTYPE)[:, None]
    else:
        return w


@gluon.jit(do_not_specialize=["rows", "blocks", "share"])
def wide_kernel(
    x, words, scale, zero, bias, y, parts, counters, rows, outputs, blocks, share,
    HALVES: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr, ZERO: gl.constexpr,
    OFFSET: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr, DTYPE: gl.constexpr, ASSEMBLY: gl.constexpr,
    SCALING: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    STEP: gl.constexpr = PLANES * WIDTH
    GROUPS: gl.constexpr = STEP // GROUP if GROUPED and GROUP < STEP else 1  # of a step
    OF_GROUP: gl.constexpr = PLANES // GROUPS
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    n = gl.program_id(0) * N + gl.arange(0, N, layout=gl.SliceLayout(1, left))
    i = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, left))
    first_m = gl.program_id(1) * M
    first = gl.program_id(2) * share
    stop = gl.minimum(first + share, blocks)

    copies = gl.allocate_shared_memory(x.dtype, [STAGES, PLANES, M, WIDTH], x.layout)
    tiles = reinterpret(copies, x.dtype, [STAGES * PLANES, M, WIDTH], gl.NVMMASharedLayout(2 * WIDTH, 16, 2))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(ready.index(stage), count=1)
    hopper.fence_async_shared()
    barrier()
    for stage in gl.static_range(STAGES):
        step = first * HALVES + stage
        wanted = step < stop * HALVES
        hopper.mbarrier.expect(ready.index(stage), PLANES * M * WIDTH * 2, pred=wanted)
        load_tile(x, [step * PLANES, first_m, 0], ready.index(stage), copies.index(stage), pred=wanted)

    acc = gl.zeros([N, M], gl.float32, product)
    word = load_words(words, first, n, i, outputs, WIDTH)
    scales = of_groups(scale, first * HALVES, n, outputs, STEP, GROUP, GROUPS, True)
    zeros = of_groups(zero, first * HALVES, n, outputs, STEP, GROUP, GROUPS, ZERO)
    numbers = four_planes(word, DTYPE, ASSEMBLY)
    made = scaled(numbers[0], scales, zeros, 0, OFFSET, ZERO, GROUPED, DTYPE, SCALING)
    for block in range(first, stop):
        following_word = load_words(words, gl.minimum(block + 1, stop - 1), n, i, outputs, WIDTH)
        for half in gl.static_range(HALVES):
            step = block * HALVES + half
            following = gl.minimum(step + 1, stop * HALVES - 1)
            next_scales, next_zeros = scales, zeros
            if GROUPED:
                next_scales = of_groups(scale, following, n, outputs, STEP, GROUP, GROUPS, True)
                next_zeros = of_groups(zero, following, n, outputs, STEP, GROUP, GROUPS, ZERO)
            count = step - first * HALVES
            slot = count % STAGES
            hopper.mbarrier.wait(ready.index(slot), count // STAGES & 1)
            acc = hopper.warpgroup_mma(made, tiles.index(slot * PLANES).permute((1, 0)), acc, is_async=True)
            barrier()  # all warps have read the tile of the step before
            later = step - 1 + STAGES
            free = (count + STAGES - 1) % STAGES
            wanted = (count > 0) & (later < stop * HALVES)
            hopper.mbarrier.expect(ready.index(free), PLANES * M * WIDTH * 2, pred=wanted)
            load_tile(x, [later * PLANES, first_m, 0], ready.index(free), copies.index(free), pred=wanted)
            for plane in gl.static_range(1, PLANES):
                w = scaled(numbers[plane], scales, zeros, plane // OF_GROUP, OFFSET, ZERO, GROUPED, DTYPE, SCALING)
                tile = tiles.index(slot * PLANES + plane).permute((1, 0))
                acc = hopper.warpgroup_mma(w, tile, acc, is_async=True)
                acc, _ = hopper.warpgroup_mma_wait(1, deps=(acc, made))  # for the product before this
                made = w
            # What comes next is made while the last product runs, which must be done before its registers change hands.
            numbers = four_planes(word >> 16 if half + 1 < HALVES else following_word, DTYPE, ASSEMBLY)
            scales, zeros = next_scales, next_zeros
            w = scaled(numbers[0], scales, zeros, 0, OFFSET, ZERO, GROUPED, DTYPE, SCALING)
            acc, _ = hopper.warpgroup_mma_wait(0, deps=(acc, made))
            made = w
        word = following_word

    over: gl.constexpr = gl.SliceLayout(1, product)
    n = gl.arange(0, N, layout=over)
    if not GROUPED:
        acc *= gl.convert_layout(scales[0], over)[:, None]
    if SPLIT:  # parts lie tile by tile, so that where a thread's numbers go differs by constants
        number = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        tiles_of_part = (gl.num_programs(0) * gl.num_programs(1)).to(gl.int64)
        place = gl.arange(0, M, layout=gl.SliceLayout(0, product))[None, :] * N + n[:, None]
        gl.store(parts + (gl.program_id(2) * tiles_of_part + number) * (M * N) + place, acc)
        barrier()  # all of the part is written before it is counted
        if gl.atomic_add(counters + number, 1, sem="acq_rel") != gl.num_programs(2) - 1:
            return
        acc = gl.zeros([N, M], gl.float32, product)
        for each in range(gl.num_programs(2)):
            acc += gl.load(parts + (each * tiles_of_part + number) * (M * N) + place, cache_modifier=".cg")
        gl.store(counters + number, 0)
    n += gl.program_id(0) * N
    if BIAS:
        acc += gl.load(bias + n, mask=n < outputs, other=0.0).to(gl.float32)[:, None]
    # Neighbouring outputs to neighbouring threads.
    lines: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    result = gl.convert_layout(acc.to(y.dtype.element_ty), lines)
    n = gl.program_id(0) * N + gl.arange(0, N, layout=gl.SliceLayout(1, lines))
    m = gl.arange(0, M, layout=gl.SliceLayout(0, lines))
    live = (n < outputs)[:, None] & (m < rows - first_m)[None, :]
    start = first_m.to(gl.int64) * outputs  # of the tile; within it, places have 32 bits
    gl.store(y + start + (m[None, :] * outputs + n[:, None]), result, mask=live)


def takes(x: Tensor, weight: PlanarWeight) -> bool:
    """Whether :func:`multiply_wide` can do it: on Hopper, inputs that can be copied as tiles, scales that float16 can hold."""
    device = device_of(x.device.index)
    return (
        device.capability == (9, 0)
        and not interpreting()
        and x.dtype in (torch.bfloat16, torch.float16)
        and (x.dtype == torch.bfloat16 or weight.scale.dtype == torch.float16 or not weight.grouped)
        and weight.width == 32
        and x.shape[1] % weight.width == 0
        and x.data_ptr() % 16 == 0
    )


def multiply_wide(x: Tensor, weight: PlanarWeight, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """``x [rows, in]``, float16 or bfloat16, in the order of the weight's columns."""
    rows, outputs = len(x), weight.shape.out_features
    device = device_of(x.device.index)
    config = config or wide_config_for(rows, weight.columns * outputs)
    halves = 8 // weight.bits
    blocks = weight.q.shape[0]
    tiles_m, tiles_n, splits, share = grid_of(rows, outputs, blocks, config, device.processors)
    y = x.new_empty(rows, outputs)
    size = (splits, tiles_m * config.rows, tiles_n * config.outputs)
    parts = y if splits == 1 else x.new_empty(size, dtype=torch.float32)
    _, assembly, offset = codes_of(weight, x.dtype, PLANES.value)
    planes = x.view(rows, -1, weight.width).transpose(0, 1)
    layout = gl.NVMMASharedLayout(2 * weight.width, 16, 3)
    tile = TensorDescriptor.from_tensor(planes, [4, config.rows, weight.width], layout)
    wide_kernel[(tiles_n, tiles_m, splits)](
        tile, weight.q, weight.scale, weight.scale if weight.zero is None else weight.zero,
        x if bias is None else bias, y, parts, weight.counters, rows, outputs, blocks, share,
        HALVES=halves, WIDTH=weight.width, GROUP=weight.group, GROUPED=weight.grouped, ZERO=weight.zero is not None,
        OFFSET=offset, BIAS=bias is not None, SPLIT=splits > 1, DTYPE=dot_type(x.dtype), ASSEMBLY=assembly,
        SCALING=scaling_of(x.dtype, weight.scale.dtype, weight.zero is not None or offset != 0),
        M=config.rows, N=config.outputs, STAGES=config.stages, WARPS=config.warps, num_warps=config.warps,
    )  # fmt: skip
    return y
