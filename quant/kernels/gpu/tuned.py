"""Tile sizes, as data: for the bits of a stored code, by the largest number of rows that a configuration is for.

Those for Hopper are the best of a sweep on an NVIDIA H100 80GB HBM3 (Triton 3.6) at 4096 x 4096, 14336 x 4096 and
4096 x 14336, with int4 in groups of 128 and with fp8; 8 bits and 32 rows were not swept. 4 % faster for int4, and too large for
the registers with NF4 and E2M1, are tiles of 128 outputs for 32 rows, and of 128 rows for 128. For one row of int4, an H200
wants more programs than that H100 did.
``python -m benchmarks.gpu_linear --sweep`` finds better ones on the GPU at hand and prints them as they are to stand here.
``SAFE`` fits the 99 KiB of shared memory that every architecture from 8.0 on has.
"""

from __future__ import annotations

from typing import NamedTuple

MOST_ROWS = 192
"""More are multiplied by the dense weight: its making costs as much as that of a few hundred rows."""
DENSE_BYTES = 24 << 20
"""Of a dense weight at a time: it is multiplied before it leaves the second-level cache."""


class Config(NamedTuple):
    rows: int  # of a tile
    outputs: int
    warps: int
    stages: int
    weight_first: bool  # the weight is the left operand, which Hopper's tensor cores take from registers
    programs: int  # that each multiprocessor should get
    blocks: int = 1  # of columns, the fewest that a program should get


Table = dict[int, Config]

HOPPER = (9, 0)

SAFE: dict[int, Table] = {
    4: {16: Config(16, 64, 2, 3, False, 4), MOST_ROWS: Config(32, 64, 4, 2, True, 2)},
    8: {
        16: Config(16, 64, 4, 3, False, 4),
        32: Config(32, 64, 4, 3, True, 4),
        MOST_ROWS: Config(64, 64, 4, 2, True, 2),
    },
}
TABLES: dict[tuple[int, int], dict[int, Table]] = {
    HOPPER: {
        4: {
            8: Config(8, 32, 1, 3, True, 8),
            16: Config(16, 64, 2, 3, False, 4),
            32: Config(32, 64, 4, 3, True, 2),
            MOST_ROWS: Config(64, 64, 4, 3, True, 2),
        },
        8: {
            8: Config(8, 32, 2, 4, True, 4),
            16: Config(16, 64, 4, 4, False, 2),
            32: Config(32, 64, 4, 4, True, 4),
            64: Config(64, 128, 8, 4, True, 1),
            MOST_ROWS: Config(64, 128, 8, 3, True, 1),
        },
    },
}


FINE_GROUP = 128
"""4-bit integers in smaller groups than this have so many scales, zero points and sums in a block that they want tiles of their
own. These were not swept, but chosen among those that spill no registers."""
SAFE_FINE: Table = {16: Config(16, 64, 2, 3, False, 4), MOST_ROWS: Config(32, 32, 2, 2, True, 2)}
FINE: dict[tuple[int, int], Table] = {
    HOPPER: {
        8: Config(8, 64, 2, 3, True, 4),
        32: Config(16, 64, 2, 3, False, 4),
        MOST_ROWS: Config(32, 64, 4, 3, False, 2),
    },
}


def config_for(bits: int, rows: int, capability: tuple[int, int], fine: bool = False) -> Config:
    """``fine``: of integers in small groups."""
    table = FINE.get(capability, SAFE_FINE) if fine and bits == 4 else TABLES.get(capability, SAFE)[bits]
    return next((config for most, config in table.items() if rows <= most), table[max(table)])


FEW_ROWS = {4: 32, 8: 128}
"""By the bits of a stored code. More are multiplied by what was unpacked and scaled in registers, on Hopper, up to ..."""
WIDE_ROWS = {4: 2048, 8: 768}
"""... so many."""
# Of the tiles for them, those of an NVIDIA H200 (Triton 3.6) with int4 in groups of 128. Tiles of 128 rows and 256 outputs
# spill registers.
WIDE: Table = {
    32: Config(32, 64, 4, 6, True, 3),
    64: Config(64, 64, 4, 4, True, 2),
    128: Config(128, 128, 8, 3, True, 1),
    256: Config(256, 128, 8, 3, True, 1),
}
WIDE_SMALL: Table = {
    32: Config(32, 64, 4, 6, True, 2),
    64: Config(64, 64, 4, 4, True, 2),
    256: Config(128, 64, 4, 3, True, 1),
    512: Config(128, 128, 8, 3, True, 1),
    1024: Config(256, 128, 8, 3, True, 1),
}
"""For weights of up to ``SMALL`` numbers, which have few tiles."""
SMALL = 1 << 25


def wide_config_for(rows: int, weights: int) -> Config:
    table = WIDE_SMALL if weights <= SMALL else WIDE
    return next((config for most, config in table.items() if rows <= most), table[max(table)])
