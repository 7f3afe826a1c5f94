"""Who owns which block of the KV cache, and what it holds. Knows no torch: a block is a number, its tensors live in
``attention.KVCache``.

A full block stays findable by what it holds until it is needed for something else, least recently used first. What it holds
depends on everything before it, so its key is the serial number of the block before it and its own token ids: two prefixes
share a key only if every token is the same. Serial numbers are never given twice, so a key can outlive the block before it
without ever meaning another prefix.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from runtime.request import Request

Key = tuple[int | str, tuple[int, ...]]


class BlockPool:
    """``count`` blocks of ``size`` tokens. A request holds blocks in the order of its tokens; full ones may be shared.

    ``queries`` tokens were looked for in the cache, ``hits`` of them were found.
    """

    def __init__(self, count: int, size: int, *, caching: bool = True):
        self.count = count
        self.size = size
        self.caching = caching
        self.queries = 0
        self.hits = 0
        self._holders = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._index: dict[Key, int] = {}
        self._held: dict[int, tuple[Key, int]] = {}
        self._serials = itertools.count()

    @property
    def free(self) -> int:
        """Blocks that no request holds; some of them may still be found in the cache."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    # The cache ----------------------------------------------------------------------------------------------------

    def match(self, request: Request) -> list[int]:
        """The blocks that hold the first tokens of ``request``; at least one token is left to be computed."""
        if not self.caching or request.scores_prompt:
            return []
        parent: int | str = self._root(request)
        blocks: list[int] = []
        for start in range(0, len(request) - self.size, self.size):
            block = self._index.get((parent, tuple(request.ids(start, start + self.size))))
            if block is None:
                break
            blocks.append(block)
            parent = self._held[block][1]
        return blocks

    def fits(self, tokens: int, found: Sequence[int]) -> bool:
        """Whether a request of ``tokens`` tokens, which starts with the blocks ``found``, has room."""
        unheld = sum(self._holders[block] == 0 for block in found)
        return self.blocks_for(tokens) - len(found) <= self.free - unheld

    def adopt(self, request: Request, found: Sequence[int]) -> None:
        """Start ``request``, which holds nothing, with blocks that :meth:`match` found just now."""
        for block in found:
            self._free.pop(block, None)
            self._holders[block] += 1
        request.blocks = list(found)
        request.chain = [self._held[block][1] for block in found]
        request.computed = len(found) * self.size
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
            if key not in self._index:
                block = request.blocks[index]
                self._index[key] = block
                self._held[block] = (key, next(self._serials))
            request.chain.append(self._held[self._index[key]][1])

    def forget(self, blocks: Iterable[int] | None = None) -> None:
        """Make blocks (default: all) unfindable; who holds them keeps them."""
        for block in list(self._held) if blocks is None else blocks:
            if block in self._held:
                key, _ = self._held.pop(block)
                del self._index[key]

    @staticmethod
    def _root(request: Request) -> str:
        return request.params.cache_salt or ""

    # Ownership ----------------------------------------------------------------------------------------------------

    def grow(self, request: Request, tokens: int) -> bool:
        """Give ``request`` room for its first ``tokens`` tokens; ``False``, and nothing changes, if too few are free."""
        missing = self.blocks_for(tokens) - len(request.blocks)
        if missing > self.free:
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self.forget([block])
            self._holders[block] = 1
            request.blocks.append(block)
        return True

    def release(self, request: Request) -> None:
        """Take all blocks back; full ones stay findable."""
        # From the end: a block is worth nothing once the one before it has gone, so it has to go first.
        for block in reversed(request.blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._held)
        request.blocks.clear()
        request.chain.clear()
        request.computed = 0

    def check(self, live: Iterable[Request]) -> None:
        """Every block is held by as many live requests as it says, or free; raises :class:`AssertionError` otherwise."""
        holders = Counter(block for request in live for block in request.blocks)
        free = {block for block in range(self.count) if holders[block] == 0}
        if any(self._holders[block] != holders[block] for block in range(self.count)) or free != set(self._free):
            raise AssertionError(
                f"KV blocks leaked or shared: {len(holders)} held and {self.free} free of {self.count}, "
                f"{sum(self._holders)} holders counted and {holders.total()} found"
            )
        if {key: block for block, (key, _) in self._held.items()} != self._index:
            raise AssertionError("the prefix cache's index and its blocks disagree")
