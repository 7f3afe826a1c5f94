"""Which attention calls take blocks together, and which of them share memory.

A call that sees everything needs all of a sequence's blocks; one with a window needs only those that the window reaches. So
the calls are divided into *groups*: the calls of a group have the same reach and take their blocks together, and each
group has its own table of blocks. All groups draw from one numbering, as a block is worth the same in each: as much
memory as the keys and values of ``columns`` calls take. ::

                        column 0   column 1        tensors of the cache; 2 + 3 calls see everything or 4 tokens
    group 0, all        call 0     call 4
    group 1, window 4   call 1     call 2          block 7 holds, of some sequence, what either calls 0 and 4,
    group 2, window 4   call 3     (nothing)       or calls 1 and 2, or call 3 have made of 16 tokens

This is vLLM's hybrid memory: how much of the memory is windows is decided by the sequences that run, not in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from attention.base import AttentionSpec, Reach

MOST_GROUPS = 8
"""Each group costs every forward a table."""


@dataclass(frozen=True)
class CacheLayout:
    """``groups[call]`` and ``columns[call]`` say where a call belongs, ``reaches[group]`` what the calls of a group see."""

    groups: tuple[int, ...]
    columns: tuple[int, ...]
    reaches: tuple[Reach, ...]

    @classmethod
    def single(cls, specs: Sequence[AttentionSpec]) -> Self:
        """Of calls that all keep everything."""
        columns: list[int] = []
        for call, spec in enumerate(specs):
            columns.append(call if spec.shares is None else columns[spec.shares])
        return cls((0,) * len(specs), tuple(columns), (Reach(),))

    @classmethod
    def of(cls, specs: Sequence[AttentionSpec], longest: int | None = None) -> Self:
        """The layout for a model whose sequences have at most ``longest`` tokens.

        Groups share memory only if what all calls keep has the same shape; where it does not, everything is kept. The
        number of columns divides that of the calls that see everything, so that a long sequence wastes nothing.
        """
        reaches = [spec.reach.within(longest) for spec in specs]
        sources = [call if spec.shares is None else spec.shares for call, spec in enumerate(specs)]
        keeping = [call for call, source in enumerate(sources) if call == source]
        alike = len({(specs[call].kv_heads, specs[call].kept) for call in keeping}) == 1
        unlike_source = any(reaches[call] != reaches[source] for call, source in enumerate(sources))
        if not alike or unlike_source or not any(reach.bounded for reach in reaches):
            return cls.single(specs)
        kinds = sorted(
            dict.fromkeys(reaches), key=lambda reach: reach.bounded
        )  # stable: those that see everything first
        members = {kind: [call for call in keeping if reaches[call] == kind] for kind in kinds}
        width = _columns([len(calls) for calls in members.values()], not kinds[0].bounded)
        places: dict[int, tuple[int, int]] = {}
        groups: list[Reach] = []
        for kind, calls in members.items():
            for place, call in enumerate(calls):
                if place % width == 0:
                    groups.append(kind)
                places[call] = len(groups) - 1, place % width
        group_of, column_of = zip(*(places[source] for source in sources), strict=True)
        return cls(tuple(group_of), tuple(column_of), tuple(groups))

    @cached_property
    def first_of_column(self) -> list[int]:
        """For each call the first one in its column, which decides what the column holds."""
        firsts: dict[int, int] = {}
        return [firsts.setdefault(column, call) for call, column in enumerate(self.columns)]

    @property
    def firsts(self) -> list[int]:
        return sorted(set(self.first_of_column))


def _columns(counts: Sequence[int], first_sees_all: bool) -> int:
    """How many columns waste least with calls of ``counts`` kinds, in at most :data:`MOST_GROUPS` groups if possible."""
    choices = [count for count in range(1, max(counts) + 1) if not first_sees_all or counts[0] % count == 0]

    def groups(columns: int) -> int:
        return sum(-(-count // columns) for count in counts)

    few = [columns for columns in choices if groups(columns) <= MOST_GROUPS] or choices[-1:]
    return min(few, key=lambda columns: (columns * groups(columns), -columns))
