"""A client that takes nothing of its answer is let go; one that takes it is not."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest
import uvicorn

from runtime.server import connection

PATIENCE, ANSWER_SECONDS = 0.3, 1.0


@pytest.mark.parametrize("takes", [False, True])
def test_an_answer_does_not_wait_for_ever_to_be_taken(takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_SECONDS", PATIENCE)
    ended: asyncio.Future[tuple[str, float]]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        started = time.monotonic()
        await receive()
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while time.monotonic() - started < ANSWER_SECONDS and not gone.done():
            await send({"type": "http.response.body", "body": bytes(1 << 18), "more_body": True})
            await asyncio.sleep(0.001)
        ended.set_result(("dropped" if gone.done() else "taken", time.monotonic() - started))
        gone.cancel()

    async def run() -> tuple[str, float]:
        nonlocal ended
        ended = asyncio.get_running_loop().create_future()
        listener = socket.create_server(("127.0.0.1", 0))
        settings = uvicorn.Config(answer, http=connection.PatientProtocol, lifespan="off", log_config=None)
        server = uvicorn.Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        if not takes:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            async with asyncio.timeout(10):
                while takes and not ended.done():
                    await reader.read(1 << 20)
                return await ended
        finally:
            writer.transport.abort()
            server.should_exit = server.force_exit = True
            await serving

    outcome, seconds = asyncio.run(run())
    assert outcome == ("taken" if takes else "dropped")
    assert (PATIENCE <= seconds < ANSWER_SECONDS) is not takes
