"""The answers to one submission, between the engine's thread and whoever reads them on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.grammar import Matcher
from runtime.request import Delta, SamplingParams

if TYPE_CHECKING:
    from runtime.worker import Worker


@dataclass(eq=False)
class Stream:
    """What comes back for some prompts that were submitted together. Lives on the event loop.

    ``read`` until it returns nothing; ``close`` in any case, which aborts what has not ended. A reader that is slow gets its
    pieces merged, so what waits for it never exceeds its own answer. ``begun`` is the engine thread's: it has sent something.
    """

    worker: Worker
    prompts: Sequence[list[int]]
    params: SamplingParams
    matcher: Matcher | None
    accepted: asyncio.Future[None]
    submitted: float = field(default_factory=time.monotonic)
    token_times: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    begun: bool = False
    closed: bool = False
    left: int = 0
    error: Exception | None = None
    _pending: dict[tuple[int, int], Delta] = field(default_factory=dict)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.left = len(self.prompts) * self.params.n

    @property
    def ended(self) -> bool:
        """Every answer has been read to its end."""
        return not self.left and not self._pending

    async def read(self) -> list[tuple[int, Delta]]:
        """Wait for the next pieces, ``(position of the prompt, Delta)``; empty once all has been read."""
        while not self._pending:
            if self.error is not None:
                raise self.error
            if not self.left:
                return []
            self._ready.clear()
            await self._ready.wait()
        pending, self._pending = self._pending, {}
        return [(place, delta) for (place, _), delta in pending.items()]

    def close(self) -> None:
        """Abort what has not ended and free its blocks; may be called twice."""
        if not self.closed:
            self.closed = True
            self.worker.forget(self)

    def deliver(self, place: int, delta: Delta) -> None:
        if self.closed or self.error is not None:
            return
        known = self._pending.get((place, delta.index))
        if known is None:
            self._pending[place, delta.index] = delta
        else:
            known.merge(delta)
        self.left -= delta.finish_reason is not None
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """End with ``error``, after what has been delivered."""
        self.error = self.error or error
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._ready.set()

    def accept(self) -> None:
        if not self.accepted.done():
            self.accepted.set_result(None)
