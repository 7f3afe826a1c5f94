"""Who owns which block of the KV cache. Knows no torch: a block is a number, its tensors live in ``attention.KVCache``."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.request import Request


class BlockPool:
    """``count`` blocks of ``size`` tokens. A request holds blocks in the order of its tokens."""

    def __init__(self, count: int, size: int):
        self.count = count
        self.size = size
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def grow(self, request: Request, tokens: int) -> bool:
        """Give ``request`` room for its first ``tokens`` tokens; ``False``, and nothing changes, if too few are free."""
        missing = self.blocks_for(tokens) - len(request.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            request.blocks.append(self._free.pop())
        return True

    def release(self, request: Request) -> None:
        """Take all blocks back; what they held is lost."""
        self._free.extend(reversed(request.blocks))
        request.blocks.clear()
        request.computed = 0

    def check(self, live: Iterable[Request]) -> None:
        """Every block is free or held by exactly one live request; raises :class:`AssertionError` otherwise."""
        owned = [block for request in live for block in request.blocks] + self._free
        if sorted(owned) != list(range(self.count)):
            raise AssertionError(f"KV blocks leaked or shared: {len(owned)} accounted for, {self.count} exist")
