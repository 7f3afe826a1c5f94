"""What kernels that multiply have in common: values of groups, and columns that are shared out.

Where columns are shared out, the parts are written down, and the program that is done last adds them up, in their order: no
second launch, no zeroed output, always the same sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.tuned import Config
from quant.kernels.planar import MOST_TILES


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
