"""A soak: random load against a real server for some time, with kills and restarts, and what has to hold all the while.

In rounds: load, then quiet. In the quiet every block is free, and descriptors, tasks and memory are where they were. Under load
the server is told to end, and later killed; the second half of the time is one long life, in which nothing may grow.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.runtime.served import Served
from tests.soak.answers import Question
from tests.soak.clients import CLIENTS, Interrupted, Violation, notice_end, require

FLAGS = (
    "--max-body-bytes", "300000", "--max-running-requests", "6", "--max-queued-requests", "12", "--max-total-tokens", "960",
    "--shutdown-timeout", "2",
)  # fmt: skip
"""A cache too small for six long requests: some are preempted."""
CONCURRENCY = 16
GROWTH_BYTES = 24 * 2**20
START_BYTES = 160 * 2**20
"""What the first rounds may take: threads, allocator arenas, compiled grammars."""
ENDS = ((1 / 3, signal.SIGTERM), (1 / 2, signal.SIGKILL))
"""What is sent to the server, and after which part of the time."""
GONE = (httpx.TransportError, OSError, Interrupted)


@dataclass
class Result:
    """Counts of what happened, and what should not have."""

    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    rounds: int = 0
    restarts: int = 0
    preemptions: int = 0
    rss_bytes: list[int] = field(default_factory=list)
    slowest_health_seconds: float = 0.0

    def data(self) -> dict[str, Any]:
        return {
            **vars(self),
            "outcomes": dict(sorted(self.outcomes.items())),
            "rss_bytes": self.rss_bytes[:1] + self.rss_bytes[-1:],
        }


class Soak:
    def __init__(self, questions: list[Question], seed: int = 0):
        self.questions = questions
        self.chance = random.Random(seed)
        self.result = Result()
        self._ending = False

    def run(
        self, seconds: float, round_seconds: float = 4.0, ends: Sequence[tuple[float, signal.Signals]] = ENDS
    ) -> Result:
        server, began = Served(*FLAGS), time.monotonic()
        port = server.url.rpartition(":")[2]
        pending = [(part * seconds, end) for part, end in ends]
        try:
            self._begin(server)
            began = time.monotonic()  # of the load: a start takes its own time where others work as well
            while (spent := time.monotonic() - began) < seconds:
                end = pending.pop(0)[1] if pending and spent >= pending[0][0] else None
                asyncio.run(self._round(server, round_seconds, end))
                if end is None:
                    self._check_quiet(server)
                else:
                    self._check_end(server, end)
                    server = Served(*FLAGS, "--port", port)
                    self._begin(server)
                    self.result.restarts += 1
            self._check_growth()
            require(server.stop() == 0, "the last exit status is not 0")
            self._check_log(server)
        except (Violation, AssertionError) as violation:
            self.result.violations.append(str(violation)[:2000])
        finally:
            server.__exit__(None, None, None)
        self.result.seconds = round(time.monotonic() - began, 1)
        return self.result

    def _begin(self, server: Served) -> None:
        """The life of a server that has just started."""
        self._ending = False
        self.result.rss_bytes.clear()
        asyncio.run(self._round(server, 1.0, None))  # what is made once: threads, tables, grammars
        server.until_idle()
        self._before = (self._settled_descriptors(server), server.tasks, server.rss_bytes)

    # Load ---------------------------------------------------------------------------------------------------------

    async def _round(self, server: Served, seconds: float, end: signal.Signals | None) -> None:
        """Load for some time; ``end`` is sent to the server in the middle of it."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CONCURRENCY)
        hooks = {"response": [notice_end]}
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, event_hooks=hooks) as client:
            until = time.monotonic() + seconds
            loads = [asyncio.create_task(self._load(client, server, until)) for _ in range(CONCURRENCY)]
            health = asyncio.create_task(self._watch_health(server, until))
            if end is not None:
                await asyncio.sleep(seconds / 2)
                self._ending = True
                server.process.send_signal(end)
            await asyncio.gather(*loads, health)
        self.result.rounds += 1

    async def _load(self, client: httpx.AsyncClient, server: Served, until: float) -> None:
        kinds, weights = list(CLIENTS), list(CLIENTS.values())
        while time.monotonic() < until:
            [kind] = self.chance.choices(kinds, weights)
            try:
                outcome = await kind(client, self.questions, self.chance)
            except GONE as error:
                if not self._ending:
                    raise Violation(f"{kind.__name__}: {type(error).__name__}: {error}") from error
                outcome = f"at the end of the server: {type(error).__name__}"
                await asyncio.sleep(0.05)
                if server.process.poll() is not None:
                    until = 0.0
            self.result.outcomes[outcome] += 1

    async def _watch_health(self, server: Served, until: float) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            while time.monotonic() < until:
                ending, began = self._ending, time.monotonic()
                try:
                    status = (await client.get("/health")).json()["status"]
                except httpx.TransportError:
                    require(self._ending, "no answer from /health")
                    return
                require(status == "ok" or (self._ending and status == "draining"), f"/health says {status}")
                require(status != "ok" or not ending or server.process.poll() is None, "ok after the end")
                self.result.slowest_health_seconds = max(self.result.slowest_health_seconds, time.monotonic() - began)
                await asyncio.sleep(0.2)

    # What has to hold ---------------------------------------------------------------------------------------------

    def _check_quiet(self, server: Served) -> None:
        server.until_idle()
        state = server.get("/server_info").json()["internal_states"][0]
        require(state["free_blocks"] == state["blocks"], f"{state['blocks'] - state['free_blocks']} blocks are held")
        self.result.preemptions = max(self.result.preemptions, state["preemptions"])
        descriptors, tasks, memory = self._before
        require(
            (now := self._settled_descriptors(server)) <= descriptors + 1, f"{now} descriptors, {descriptors} before"
        )
        require((now := min(server.tasks for _ in range(5))) <= tasks, f"{now} tasks, {tasks} before")
        require(server.rss_bytes < memory + START_BYTES, f"{server.rss_bytes} bytes, {memory} before")
        self.result.rss_bytes.append(server.rss_bytes)
        question = self.questions[0]
        answer = server.post(question.route, question.body).json()
        require(question.text(answer) == question.answer, "not the answer from before")
        self._check_log(server)

    @staticmethod
    def _settled_descriptors(server: Served) -> int:
        """Once connections that were just closed are gone."""
        counts = [server.descriptors]
        for _ in range(20):
            time.sleep(0.05)
            counts.append(server.descriptors)
        return min(counts)

    def _check_end(self, server: Served, end: signal.Signals) -> None:
        status = server.process.wait(20)
        require(status == (0 if end is signal.SIGTERM else -end), f"exit status {status} after {end.name}")
        self._check_log(server)
        server.__exit__(None, None, None)

    @staticmethod
    def _check_log(server: Served) -> None:
        bad = re.findall(r"^.*(?:Traceback|ERROR|CRITICAL).*$", server.log, re.MULTILINE)
        require(not bad, f"in the log: {bad[:3]}")

    def _check_growth(self) -> None:
        """From the first to the last third of the longest life."""
        rows = self.result.rss_bytes
        if len(rows) >= 9:
            third = len(rows) // 3
            growth = statistics.median(rows[-third:]) - statistics.median(rows[third : 2 * third])
            require(growth < GROWTH_BYTES, f"memory grew by {growth / 2**20:.0f} MiB: {[r >> 20 for r in rows]}")
