"""What one client may hold of a server, and what it leaves when the process is stopped or killed under it: memory, descriptors,
tasks, the port."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.runtime.served import GREEDY, LONG, Served, events, post_bytes, raw, until

IMPATIENT = "import runtime.server.connection as c\nc.WRITE_SECONDS = 1.5"
FEW = 64
"""Descriptors: enough for half as many connections."""
LARGE = {
    "text": "import os\n", "stream": True, "return_logprob": True, "top_logprobs_num": 20,
    "sampling_params": {"max_new_tokens": 900, "temperature": 0, "ignore_eos": True},
}  # fmt: skip
"""Cumulative, so that its events have some hundred megabytes if they are kept."""


def greedy(server: Served) -> str:
    return str(server.post("/v1/completions", GREEDY).json()["choices"][0]["text"])


def deaf(server: Served, body: dict[str, Any], nbytes: int = 4096) -> socket.socket:
    """A client of ``/generate`` with room for ``nbytes``, that does not read by itself."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, nbytes)
    connection.connect((host, int(port)))
    connection.sendall(post_bytes(body).replace(b"/v1/completions", b"/generate", 1))
    return connection


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served("--watchdog-timeout", "3", faulty=IMPATIENT) as served:
        yield served


def test_who_never_reads_holds_little_and_not_for_ever(server: Served) -> None:
    expected = greedy(server)
    server.post("/generate", {**LARGE, "stream": False})  # what all of this touches once
    descriptors, tasks, memory = server.descriptors, server.tasks, server.rss_bytes
    connections = [deaf(server, LARGE) for _ in range(4)]
    while server.metric("num_requests_running") < 4:
        time.sleep(0.01)
    assert greedy(server) == expected
    server.until_idle(seconds=60)  # all of it has been generated, none of it read
    assert server.rss_bytes < memory + 64 * 2**20
    until(lambda: server.descriptors <= descriptors)  # they are dropped although they stay
    assert server.log.count("dropped a client that took nothing") == 4
    assert "Traceback" not in server.log
    until(lambda: server.tasks <= tasks)
    for connection in connections:
        connection.close()
    assert greedy(server) == expected


def test_who_reads_slowly_but_steadily_is_not_dropped(server: Served) -> None:
    sampling = {**LARGE["sampling_params"], "max_new_tokens": 300}
    connection = deaf(server, {**LARGE, "sampling_params": sampling}, nbytes=2**17)
    connection.settimeout(10)
    content, slow_until = b"", time.monotonic() + 4  # longer than a deaf one is waited for
    while b"[DONE]" not in content[-100:]:
        slow = time.monotonic() < slow_until
        piece = connection.recv(2**14 if slow else 2**20)
        assert piece, "dropped"
        content += piece
        time.sleep(0.02 if slow else 0)
    assert json.loads(content.split(b"data: ")[-2].splitlines()[0])["meta_info"]["completion_tokens"] == 300
    connection.close()


def test_a_stopped_process_goes_on_where_it_was(server: Served) -> None:
    expected = greedy(server)
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "max_tokens": 300}, timeout=30) as response:
        pieces = events(response)
        text = next(pieces)["choices"][0]["text"]
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(4.5)  # longer than the watchdog waits
        server.process.send_signal(signal.SIGCONT)
        text += "".join(piece["choices"][0]["text"] for piece in pieces)
    assert (
        text
        == server.post("/v1/completions", {**LONG, "max_tokens": 300, "stream": False}).json()["choices"][0]["text"]
    )
    time.sleep(1.5)
    assert server.get("/health").status_code == 200, server.log
    assert greedy(server) == expected


def test_after_kill_minus_nine_streams_are_broken_and_descriptors_may_be_few(server: Served) -> None:
    expected, port = greedy(server), server.url.rpartition(":")[2]
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=30) as response:
        pieces = events(response)
        next(pieces)
        server.stop(signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):  # not an end that looks like one
            list(pieces)
        with Served("--port", port, faulty=_few()) as again:
            assert again.url == server.url
            assert f"{FEW} descriptors (ulimit -n) are enough for {FEW // 2} connections" in again.log
            assert greedy(again) == expected
            _idle_connections_make_room(again, expected)
            _connections_at_work_do_not(again, expected)
            assert again.stop() == 0
            assert "Traceback" not in again.log, again.log[-6000:]


def test_without_a_descriptor_it_says_so_and_goes_on() -> None:
    """Nothing kept in reserve, and connections that leave the count before they leave the process."""
    none_left = f"{_few()}\nimport runtime.server.connection as c\nc.RESERVED_DESCRIPTORS = 0"
    with Served(faulty=none_left) as server:
        expected = greedy(server)
        idle = [raw(server, b"", 10) for _ in range(3 * FEW)]
        until(lambda: "no new connection could be accepted" in server.log)
        for connection in idle:
            connection.close()
        assert greedy(server) == expected
        assert server.log.count("no new connection could be accepted") < 50
        assert server.stop() == 0
        assert "Traceback" not in server.log


def _few() -> str:
    return f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({FEW}, {FEW}))"


def _idle_connections_make_room(server: Served, expected: str) -> None:
    before, tasks = server.descriptors, server.tasks
    idle = [raw(server, b"", 10) for _ in range(3 * FEW)]
    assert greedy(server) == expected
    for connection in idle:
        connection.close()
    until(lambda: server.descriptors <= before + 1)
    until(lambda: server.tasks <= tasks)


def _connections_at_work_do_not(server: Served, expected: str) -> None:
    working = [raw(server, post_bytes({**LONG, "prompt": f"import {n}\n"}), 10) for n in range(FEW // 2)]
    for connection in working[:4]:
        assert b"200 OK" in connection.recv(1000)
    until(lambda: server.descriptors >= FEW // 2)
    refused = raw(server, post_bytes(GREEDY), 10)
    answer = refused.recv(4000)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after" in answer
    assert f"all {FEW // 2} connections are in use" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    for connection in [*working, refused]:
        connection.close()
    server.until_idle()
    assert greedy(server) == expected
