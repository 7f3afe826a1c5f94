"""Which tokens of which requests run in the next forward pass. Knows no torch.

A decode is a chunk of one token: there are no phases. Decodes go first, so a long prompt never stalls them; what is left
of the token budget goes to prompts, first come first served. When blocks run out the youngest request gives its blocks
back and is computed again later (its tokens are kept), so the oldest always advances and nothing can block for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from runtime.blocks import BlockPool, Prefix
from runtime.factors import Factors
from runtime.request import FinishReason, Request

SCORED_ROWS = 256
"""Longest chunk of a request whose prompt is scored: each of its rows costs a vocabulary of logits."""


class Chunk(NamedTuple):
    """Tokens ``start ... start + size`` of a request; if they are its last, a new token is sampled."""

    request: Request
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def samples(self) -> bool:
        return self.stop == len(self.request) and self.request.max_tokens > 0


Plan = list[Chunk]


class Scheduler:
    """Requests wait in order of arrival, run together, and are forgotten when they end.

    ``whole_prompts``: a prompt is computed in one piece, beyond ``max_batched_tokens`` if it must be. A running request
    owns one of ``max_running`` slots for the state of recurrent layers. A request that grows out of the rotary factors
    its tokens have been computed with starts again.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batched_tokens: int,
        max_running: int,
        *,
        whole_prompts: bool = False,
        factors: Factors | None = None,
    ):
        self.pool = pool
        self.factors = factors
        self.whole_prompts = whole_prompts
        self.max_batched_tokens = max_batched_tokens
        # A decode needs one token of the budget: more running requests than that would starve the youngest.
        self.max_running = min(max_running, max_batched_tokens)
        self._slots = list(range(self.max_running))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def live(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> Plan:
        """The chunks of the next step, blocks already reserved; empty only if there is no work."""
        if self.factors:
            self._start_again_beyond_factors(self.factors)
        budget = self.max_batched_tokens
        plan: dict[Request, Chunk] = {}
        decodes_first = sorted(self.running, key=lambda request: len(request) - request.computed > 1)
        for request in decodes_first:
            if budget and request in self.running and self._reserve(request, budget, plan):
                budget = self.max_batched_tokens - sum(chunk.size for chunk in plan.values())
        # Nothing is preempted from here on, so what the plan will compute can already be shared.
        for chunk in plan.values():
            self.pool.register(chunk.request, chunk.stop)
        while budget and self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            if self.whole_prompts and budget < min(len(request), self.max_batched_tokens):
                break
            found = self.pool.match(request)
            # Room for all of its tokens and one more: with less it would be preempted at once.
            if self.running and not self.pool.fits(len(request) + 1, found):
                break
            self.waiting.popleft()
            self._start(request, found)
            self._reserve(request, budget, plan)
            self.pool.register(request, plan[request].stop)
            budget = max(0, budget - plan[request].size)
        return list(plan.values())

    def _start_again_beyond_factors(self, factors: Factors) -> None:
        for request in reversed(self.running.copy()):
            if request.factors != factors.of(request):
                self._send_back(request)
        for request in self.waiting:
            request.factors = factors.of(request)

    def _start(self, request: Request, found: Prefix) -> None:
        self.running.append(request)
        request.slot = self._slots.pop()
        self.pool.adopt(request, found)
        if request.started is None:
            request.started = time.monotonic()
            request.cached = request.computed

    def _reserve(self, request: Request, budget: int, plan: dict[Request, Chunk]) -> bool:
        """Put the next chunk of ``request`` into the plan; the youngest others make room. ``False``: it went itself."""
        count = len(request) - request.computed
        if not self.whole_prompts:
            count = min(count, budget, SCORED_ROWS if request.scores_prompt else count)
        self.pool.give_back(request)
        while not self.pool.grow(request, request.computed + count):
            victim = self.running[-1]
            self._preempt(victim)
            plan.pop(victim, None)
            if victim is request:
                return False
        plan[request] = Chunk(request, request.computed, count)
        return True

    def _preempt(self, request: Request) -> None:
        self._send_back(request)
        self.preemptions += 1

    def _send_back(self, request: Request) -> None:
        self._stop(request)
        self.pool.release(request)
        self.waiting.appendleft(request)

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        assert request.slot is not None
        self._slots.append(request.slot)
        request.slot = None

    def commit(self, plan: Plan, sampled: Mapping[Request, int]) -> dict[Request, FinishReason]:
        """Record a finished step: appends the sampled tokens and returns the requests that ended, blocks released."""
        ended: dict[Request, FinishReason] = {}
        for request, _, count in plan:
            request.computed += count
            if request in sampled:
                reason = request.append(sampled[request])
            else:
                reason = FinishReason.LENGTH if request.computed == len(request) else None
            if reason is not None:
                ended[request] = reason
                self.remove(request)
        return ended

    def remove(self, request: Request) -> None:
        """Forget a request in any state and free its blocks; one that is already gone is no error."""
        if request in self.running:
            self._stop(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pool.release(request)
