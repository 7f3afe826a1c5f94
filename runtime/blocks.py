"""Who owns which block of the KV cache, and what it holds. Knows no torch: a block is a number, its tensors live in
``attention.KVCache``.

The layers of a model are in one or several groups (``attention.layout``), and a request holds a table of blocks for each. A
group whose layers look back only so far gives back what is behind its reach as the request grows; what was given back
is :data:`GONE` in the table.

A full block stays findable by what it holds until it is needed for something else, least recently used first. What it holds
depends on everything before it, so its key is the serial number of the tokens before it and its own token ids: two prefixes
share a key only if every token is the same. Serial numbers are never given twice, so a key can outlive what was before it
without ever meaning another prefix. A request can start after a cached prefix if each group still has what the next token
sees: all blocks, or those within its reach.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attention.base import Reach
from runtime.request import Request

Root = tuple[str, int]
Key = tuple[int | Root, tuple[int, ...]]
GONE = -1


@dataclass(eq=False)
class _Cached:
    """What is known of the tokens of ``key``: the block of each group that holds them, if it is still there."""

    key: Key
    serial: int
    blocks: list[int | None]


class Prefix(NamedTuple):
    """The first tokens of a request, as far as they are cached: a table for each group, and the serial numbers."""

    tables: list[list[int]]
    chain: list[int]


def most_blocks(tokens: int, size: int, reaches: Sequence[Reach], longest_chunk: int | None) -> int:
    """The most blocks of ``size`` tokens that a sequence of ``tokens`` tokens holds at once, in all groups, if no more than
    ``longest_chunk`` tokens (``None``: any number) are computed at once."""
    whole = -(-tokens // size)

    def of(reach: Reach) -> int:
        if reach.most is None or longest_chunk is None:
            return whole
        span = reach.most - 1 + longest_chunk
        return min(whole, (span - 2) // size + 2)  # that many tokens, wherever they begin

    return sum(map(of, reaches))


class BlockPool:
    """``count`` blocks of ``size`` tokens. A request holds blocks in the order of its tokens; full ones may be shared.

    ``reaches`` says how far back each group of layers looks. ``queries`` tokens were looked
    for in the cache, ``hits`` of them were found.
    """

    def __init__(
        self,
        count: int,
        size: int,
        *,
        caching: bool = True,
        reaches: Sequence[Reach] = (Reach(),),
        longest_chunk: int | None = None,
    ):
        self.count = count
        self.size = size
        self.caching = caching
        self.reaches = list(reaches)
        self.longest_chunk = longest_chunk
        self.queries = 0
        self.hits = 0
        self._holders = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._index: dict[Key, _Cached] = {}
        self._held: dict[int, tuple[_Cached, int]] = {}  # and the group
        self._serials = itertools.count()

    @property
    def free(self) -> int:
        """Blocks that no request holds; some of them may still be found in the cache."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def most_blocks(self, tokens: int) -> int:
        return most_blocks(tokens, self.size, self.reaches, self.longest_chunk)

    # The cache ----------------------------------------------------------------------------------------------------

    def match(self, request: Request) -> Prefix:
        """The blocks that hold the first tokens of ``request``; at least one token is left to be computed."""
        found: list[_Cached] = []
        if self.caching and not request.scores_prompt:
            parent: int | Root = self._root(request)
            for start in range(0, len(request) - self.size, self.size):
                cached = self._index.get((parent, tuple(request.ids(start, start + self.size))))
                if cached is None:
                    break
                found.append(cached)
                parent = cached.serial
        found = found[: self._usable(found)]
        tables = [[GONE if block is None else block for block in group] for group in self._by_group(found)]
        for group, table in enumerate(tables):
            behind = self._behind(group, len(found) * self.size)
            table[:behind] = [GONE] * behind
        return Prefix(tables, [cached.serial for cached in found])

    def _by_group(self, found: Sequence[_Cached]) -> list[list[int | None]]:
        return [[cached.blocks[group] for cached in found] for group in range(len(self.reaches))]

    def _usable(self, found: Sequence[_Cached]) -> int:
        """How many of ``found`` can be started from: the blocks that the next token sees must be there, in every group."""
        usable = 0
        unbroken = [0] * len(self.reaches)  # from where on all blocks are there
        for count, cached in enumerate(found, 1):
            for group, block in enumerate(cached.blocks):
                if block is None:
                    unbroken[group] = count
            if all(start <= self._behind(group, count * self.size) for group, start in enumerate(unbroken)):
                usable = count
        return usable

    def _behind(self, group: int, position: int) -> int:
        """How many blocks no query at ``position``, or after it, sees in a group."""
        return self.reaches[group].first(position) // self.size

    def fits(self, tokens: int, found: Prefix) -> bool:
        """Whether a request of ``tokens`` tokens, which starts with ``found``, has room."""
        held = [block for table in found.tables for block in table if block != GONE]
        unheld = sum(self._holders[block] == 0 for block in held)
        return self.most_blocks(tokens) - len(held) <= self.free - unheld

    def adopt(self, request: Request, found: Prefix) -> None:
        """Start ``request``, which holds nothing, with blocks that :meth:`match` found just now."""
        request.blocks = found.tables
        request.chain = found.chain
        request.computed = len(found.chain) * self.size
        for block in self._blocks_of(request):
            self._free.pop(block, None)
            self._holders[block] += 1
        if request.started is None and self.caching and not request.scores_prompt:
            self.queries += len(request)
            self.hits += request.computed

    def register(self, request: Request, tokens: int) -> None:
        """Make the full blocks among the first ``tokens`` tokens findable.

        Tokens of the coming forward pass count: every layer writes all keys before it reads any. So the samples of one
        prompt share it although they start together. Nothing that is registered may be taken back before that pass.
        """
        if not self.caching:
            return
        for index in range(len(request.chain), tokens // self.size):
            parent = request.chain[-1] if request.chain else self._root(request)
            key = (parent, tuple(request.ids(index * self.size, (index + 1) * self.size)))
            cached = self._index.get(key)
            if cached is None:
                cached = self._index[key] = _Cached(key, next(self._serials), [None] * len(self.reaches))
            for group, table in enumerate(request.blocks):
                if cached.blocks[group] is None:
                    cached.blocks[group] = table[index]
                    self._held[table[index]] = (cached, group)
            request.chain.append(cached.serial)

    def forget(self, blocks: Iterable[int] | None = None) -> None:
        """Make blocks (default: all) unfindable; who holds them keeps them."""
        for block in list(self._held) if blocks is None else blocks:
            if block in self._held:
                cached, group = self._held.pop(block)
                cached.blocks[group] = None
                if not any(block is not None for block in cached.blocks):
                    del self._index[cached.key]

    def forget_tokens(self, request: Request) -> None:
        """Let nobody start from anything that ``request`` has computed, whether it still holds the blocks or not."""
        serials = set(request.chain)
        self.forget([block for block, (cached, _) in self._held.items() if cached.serial in serials])

    @staticmethod
    def _root(request: Request) -> Root:
        return request.params.cache_salt or "", request.factors

    # Ownership ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _blocks_of(request: Request) -> Iterator[int]:
        return (block for table in request.blocks for block in table if block != GONE)

    def give_back(self, request: Request) -> None:
        """Take back what is behind the reach of every token that ``request`` has still to compute; it stays findable."""
        for group, (reach, table) in enumerate(zip(self.reaches, request.blocks, strict=False)):
            if reach.bounded:
                behind = self._behind(group, request.computed)
                index = behind - 1
                while index >= 0 and table[index] != GONE:
                    self._put_back(table[index])
                    table[index] = GONE
                    index -= 1

    def grow(self, request: Request, tokens: int) -> bool:
        """Give ``request`` room for its first ``tokens`` tokens; ``False``, and nothing changes, if too few are free."""
        if not request.blocks:
            request.blocks = [[] for _ in self.reaches]
        wanted = self.blocks_for(tokens)
        if sum(max(0, wanted - len(table)) for table in request.blocks) > self.free:
            return False
        for table in request.blocks:
            for _ in range(wanted - len(table)):
                block, _ = self._free.popitem(last=False)
                self.forget([block])
                self._holders[block] = 1
                table.append(block)
        return True

    def _put_back(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=block in self._held)

    def release(self, request: Request) -> None:
        """Take all blocks back; full ones stay findable."""
        # From the end: a block is worth nothing once the one before it has gone, so it has to go first.
        for row in reversed(list(zip(*request.blocks, strict=True))):
            for block in row:
                if block != GONE:
                    self._put_back(block)
        request.blocks = []
        request.chain.clear()
        request.computed = 0

    def check(self, live: Iterable[Request]) -> None:
        """Every block is held by as many live requests as it says, or free; raises :class:`AssertionError` otherwise."""
        holders = Counter(block for request in live for block in self._blocks_of(request))
        free = {block for block in range(self.count) if holders[block] == 0}
        if any(self._holders[block] != holders[block] for block in range(self.count)) or free != set(self._free):
            raise AssertionError(
                f"KV blocks leaked or shared: {len(holders)} held and {self.free} free of {self.count}, "
                f"{sum(self._holders)} holders counted and {holders.total()} found"
            )
        found = {
            block: (cached, group)
            for cached in self._index.values()
            for group, block in enumerate(cached.blocks)
            if block is not None
        }
        if found != self._held or any(cached.key != key for key, cached in self._index.items()):
            raise AssertionError("the prefix cache's index and its blocks disagree")
