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

Calls of one group keep tensors of one shape. Groups of unlike shapes still share columns, if so many calls of one are as
large as so many of another (Gemma 4: two layers with a window and keys of 256 lie in the place of one with keys of 512). A
block is then that many *pages* to its calls, who lie side by side in it::

    block of the column                7                            8
    as group 0 sees it      |   page 7 of call 0    |   page 8 of call 0    |
    as group 1 sees it      | 14 call 1 | 14 call 2 | 16 call 1 | 16 call 2 |    call 2's tensor starts a page later

So only the tables know: those of a group have their block numbers multiplied by its ``pages``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import NamedTuple, Self

from attention.base import AttentionBatch, AttentionSpec, Reach

MOST_GROUPS = 8
"""Each group costs every forward a table."""
MOST_PAGES = 16


class _Kind(NamedTuple):
    """What the calls of a group have in common."""

    reach: Reach
    shape: tuple[int, ...]  # numbers that a token takes, of each vector kept
    heads: int


@dataclass(frozen=True)
class CacheLayout:
    """``groups[call]`` and ``columns[call]`` say where a call belongs, ``places[call]`` which page of a block is its own;
    ``reaches[group]`` what the calls of a group see, ``pages[group]`` how many pages of theirs a block is."""

    groups: tuple[int, ...]
    columns: tuple[int, ...]
    places: tuple[int, ...]
    reaches: tuple[Reach, ...]
    pages: tuple[int, ...]

    @classmethod
    def single(cls, specs: Sequence[AttentionSpec]) -> Self:
        """Of calls that all keep everything."""
        columns: list[int] = []
        for call, spec in enumerate(specs):
            columns.append(call if spec.shares is None else columns[spec.shares])
        nothing = (0,) * len(specs)
        return cls(nothing, tuple(columns), nothing, (Reach(),), (1,))

    @classmethod
    def of(cls, specs: Sequence[AttentionSpec], longest: int | None = None) -> Self:
        """The layout for a model whose sequences have at most ``longest`` tokens.

        Groups share memory only if some pages of one are as large as some of the other, in keys and in values; where they
        are not, or a long sequence would waste more than windows spare, everything is kept.
        """
        reaches = [spec.reach.within(longest) for spec in specs]
        sources = [call if spec.shares is None else spec.shares for call, spec in enumerate(specs)]
        members: dict[_Kind, list[int]] = {}
        for call, (spec, reach) in enumerate(zip(specs, reaches, strict=True)):
            if spec.shares is None:
                kind = _Kind(reach, tuple(spec.kv_heads * dim for dim in spec.kept), spec.kv_heads)
                members.setdefault(kind, []).append(call)
        kinds = sorted(members, key=lambda kind: kind.reach.bounded)  # stable: those that see everything first
        pages = _pages(kinds)
        unlike_source = any(reaches[call] != reaches[source] for call, source in enumerate(sources))
        if pages is None or unlike_source or not any(reach.bounded for reach in reaches):
            return cls.single(specs)
        width = _columns([(len(members[kind]), pages[kind], kind.reach.bounded) for kind in kinds])
        lasting = [kind for kind in kinds if not kind.reach.bounded]
        of_long = sum(-(-len(members[kind]) // (width * pages[kind])) for kind in lasting) * width * pages[kinds[0]]
        if of_long * kinds[0].shape[0] >= sum(len(members[kind]) * kind.shape[0] for kind in kinds):
            return cls.single(specs)
        where: dict[int, tuple[int, int, int]] = {}
        groups: list[_Kind] = []
        for kind in kinds:
            room = width * pages[kind]
            for index, call in enumerate(members[kind]):
                if index % room == 0:
                    groups.append(kind)
                where[call] = len(groups) - 1, *divmod(index % room, pages[kind])
        group_of, column_of, place_of = zip(*(where[source] for source in sources), strict=True)
        reach_of, pages_of = zip(*((kind.reach, pages[kind]) for kind in groups), strict=True)
        return cls(group_of, column_of, place_of, reach_of, pages_of)

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """The calls of each column, those that share among them."""
        found: dict[int, list[int]] = {}
        for call, column in enumerate(self.columns):
            found.setdefault(column, []).append(call)
        return found

    def in_pages(self, batches: Sequence[AttentionBatch], block_size: int) -> list[AttentionBatch]:
        """Batches of each group that count blocks, as its calls count pages."""
        return [
            batch
            if pages == 1
            else replace(
                batch,
                slots=batch.slots + (pages - 1) * (batch.slots - batch.slots % block_size),
                block_tables=batch.block_tables * pages,
            )
            for batch, pages in zip(batches, self.pages, strict=True)
        ]


def _pages(kinds: Sequence[_Kind]) -> dict[_Kind, int] | None:
    """How many calls of each kind lie side by side, so that all kinds take as much; ``None``: there are no such numbers."""
    if len({len(kind.shape) for kind in kinds}) != 1:
        return None
    whole = lcm(*(kind.shape[0] for kind in kinds))
    found = {kind: whole // kind.shape[0] for kind in kinds}
    sizes = {tuple(count * numbers for numbers in kind.shape) for kind, count in found.items()}
    return found if len(sizes) == 1 and max(found.values()) <= MOST_PAGES else None


def _columns(kinds: Sequence[tuple[int, int, bool]]) -> int:
    """How many columns waste least, where long sequences end first, with the numbers of calls of each kind, of their pages in
    a block and whether they are bounded; in at most :data:`MOST_GROUPS` groups if possible."""

    def groups(columns: int, unbounded_only: bool = False) -> int:
        return sum(
            -(-calls // (columns * pages)) for calls, pages, bounded in kinds if not (unbounded_only and bounded)
        )

    def of_long(columns: int) -> int:
        return columns * groups(columns, unbounded_only=True)

    possible = range(1, max(-(-calls // pages) for calls, pages, _ in kinds) + 1)
    least = min(map(of_long, possible))
    choices = [columns for columns in possible if of_long(columns) == least]
    few = [columns for columns in choices if groups(columns) <= MOST_GROUPS] or choices[-1:]
    return min(few, key=lambda columns: (columns * groups(columns), -columns))
