"""What kernels that multiply have in common: values of groups, and columns that are shared out.

Where columns are shared out, the parts are written down, and the program that is done last adds them up, in their order: no
second launch, no zeroed output, always the same sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quant.kernels.gpu.tuned import Config
from quant.kernels.gpu.unpack import assembly_of, name_of, offset_of
from quant.kernels.planar import MOST_TILES, PlanarWeight


@triton.jit
def of_group(values, block, group: tl.constexpr, i, live, count, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """What a group of a block has at ``i``, of ``count``: scales, zero points, sums."""
    return tl.load(values + (block * BLOCK + group * GROUP) // GROUP * count + i, mask=live, other=0).to(tl.float32)


@triton.jit
def of_groups(
    values, block, i, live, count, BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WANTED: tl.constexpr
):  # fmt: skip
    found = ()
    if WANTED:
        for group in tl.static_range(GROUPS):
            found += (of_group(values, block, group, i, live, count, BLOCK, GROUP),)  # type: ignore[assignment]
    return found


@triton.jit
def add_parts(acc, parts, counters, size, place, live):
    """The sum of the parts of a tile at ``place`` of ``size`` numbers, and whether this program has it: the last one does."""
    tl.store(parts + tl.program_id(2) * size + place, acc, mask=live)
    tl.debug_barrier()  # all of the part is written before it is counted
    counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(2) - 1
    acc = tl.zeros(acc.shape, tl.float32)
    if last:
        for each in range(tl.num_programs(2)):
            acc += tl.load(parts + each * size + place, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)
    return acc, last


def splits_of(tiles: int, blocks: int, config: Config, processors: int) -> int:
    """Parts of the columns: enough to fill the device, each of at least ``config.blocks`` blocks."""
    if tiles > MOST_TILES:
        return 1
    return max(1, min(config.programs * processors // tiles, blocks // config.blocks, 32))


class Grid(NamedTuple):
    """Programs of a product: tiles of the rows and of the outputs, and parts of the columns, of ``share`` blocks at most."""

    tiles_m: int
    tiles_n: int
    splits: int
    share: int


def grid_of(rows: int, outputs: int, blocks: int, config: Config, processors: int) -> Grid:
    tiles_m, tiles_n = triton.cdiv(rows, config.rows), triton.cdiv(outputs, config.outputs)
    share = triton.cdiv(blocks, splits_of(tiles_m * tiles_n, blocks, config, processors))
    return Grid(tiles_m, tiles_n, triton.cdiv(blocks, share), share)


class Codes(NamedTuple):
    """How codes become numbers: what the kernels call their kind, the assembly that unpacks them, and what is to be taken
    from an unpacked number that has no zero point of its own."""

    name: str
    assembly: str
    offset: int


def codes_of(weight: PlanarWeight, dtype: torch.dtype, count: int) -> Codes:
    """``count``: planes that are unpacked at a time."""
    kind = weight.scheme.kind
    name = name_of(kind)
    assembly = assembly_of(name, dtype, weight.values, count)
    middle = 2 ** (kind.bits - 1) if weight.zero is None and kind.is_integer else 0
    return Codes(name, assembly, offset_of(name, dtype, assembly) + middle)
