"""When what the engine's thread gives comes to the event loop."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from runtime import worker as module
from runtime.config import EngineConfig
from runtime.request import Delta, FinishReason, SamplingParams
from runtime.stream import Stream
from runtime.worker import Worker

INTERVAL = 0.2


def test_short_steps_share_a_piece_but_beginnings_and_ends_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECES_PER_SECOND", 1 / INTERVAL)
    stamps: list[float] = []
    pieces: list[tuple[float, Delta]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        worker = Worker(EngineConfig("demo"), on_delta=lambda stream, delta, when: stamps.append(when))
        worker._loop = loop
        worker._delivered = loop.time()  # another stream has just got a piece
        stream = Stream(worker, [[1]], SamplingParams(), None, loop.create_future())
        worker._routes[7] = (stream, 0)
        started = time.monotonic()

        def steps() -> None:
            for token in range(4):
                worker._send([Delta(7, 0, text=str(token), token_ids=[token])])
                time.sleep(0.01)
            time.sleep(INTERVAL)  # a long step: what came before it does not wait for its end
            worker._send([Delta(7, 0, text="4", token_ids=[4], finish_reason=FinishReason.LENGTH)])

        thread = loop.run_in_executor(None, steps)
        while read := await stream.read():
            pieces.extend((time.monotonic() - started, delta) for _, delta in read)
        await thread

    asyncio.run(run())
    assert [delta.text for _, delta in pieces] == ["0", "123", "4"]
    begin, middle, end = (when for when, _ in pieces)
    assert begin < INTERVAL / 2
    assert INTERVAL * 0.9 <= middle < end
    assert len(stamps) == 5  # metrics count steps, not pieces
    assert all(later - earlier >= 0.009 for earlier, later in itertools.pairwise(stamps))
