"""What clients and networks do wrong with connections: they leave, dawdle, cut off, and speak no HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import httpx
import pytest

from runtime.worker import PIECES_PER_SECOND
from tests.runtime.served import GREEDY, LONG, Served, events, post_bytes, raw, read_stream
from tests.runtime.unharmed import greedy, small_server, unharmed

server = pytest.fixture(scope="module")(small_server)
nothing_is_left = pytest.fixture(autouse=True)(unharmed)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_at_once(server: Served, stream: bool) -> None:
    connection = raw(server, post_bytes({**LONG, "stream": stream}))
    while not server.metric("num_requests_running"):
        time.sleep(0.01)
    if stream:
        assert b"200 OK" in connection.recv(1000)
    before = server.metric("aborted_total")
    connection.close()
    server.until_idle(seconds=1.0)
    assert server.metric("aborted_total") == before + 1


def test_clients_that_leave_the_queue_disturb_nobody(server: Served) -> None:
    expected = greedy(server)
    connections = [raw(server, post_bytes({**LONG, "prompt": f"import {n}\n"})) for n in range(10)]
    while server.metric("num_requests_waiting") < 6:
        time.sleep(0.01)
    for connection in connections[1:]:
        connection.close()
    assert greedy(server) == expected
    connections[0].close()


def test_too_many_are_told_to_come_later(server: Served) -> None:
    connections = [raw(server, post_bytes(LONG)) for _ in range(12)]
    while server.metric("num_requests_waiting") < 8:
        time.sleep(0.01)
    refused = server.post("/v1/completions", GREEDY)
    assert refused.status_code == 429
    assert refused.headers["retry-after"]
    assert "max_queued_requests" in refused.json()["error"]["message"]
    assert server.get("/health").status_code == 200
    for connection in connections:
        connection.close()


def test_a_slow_reader_delays_nobody_and_still_gets_everything(server: Served) -> None:
    fields = {**LONG, "max_tokens": 150}
    whole = server.post("/v1/completions", {**fields, "stream": False}).json()["choices"][0]["text"]
    slow = raw(server, post_bytes(fields), seconds=20)
    started = time.monotonic()
    server.post("/v1/completions", GREEDY)
    assert time.monotonic() - started < 5
    server.until_idle(seconds=30)  # all of it has been generated, none of it read
    content = b""
    while b"[DONE]" not in content:
        content += slow.recv(512)
    slow.close()
    pieces = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith('data: {"id')]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole


def test_what_is_no_http_is_answered_like_everything_else(server: Served) -> None:
    for content in (
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        connection = raw(server, content)
        head, _, answer = connection.recv(4000).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert json.loads(answer)["error"]["type"] == "invalid_request_error"
        assert connection.recv(10) == b""
        connection.close()


def test_two_requests_of_one_name_are_two(server: Served) -> None:
    fields = {
        "text": GREEDY["prompt"],
        "rid": "same",
        "stream": True,
        "sampling_params": {"max_new_tokens": 40, "temperature": 0},
    }
    content = post_bytes(fields).replace(b"/v1/completions", b"/generate", 1)
    both = [raw(server, content, 10) for _ in range(2)]
    ends = []
    for connection in both:
        answer = b""
        while b"[DONE]" not in answer:
            answer += connection.recv(65536)
        ends.append(json.loads([line for line in answer.split(b"\n") if line.startswith(b"data: {")][-1][6:]))
        connection.close()
    assert ends[0]["text"] == ends[1]["text"]
    assert [row["meta_info"]["id"] for row in ends] == ["same", "same"]
    assert ends[0]["meta_info"]["completion_tokens"] == 40


def test_half_requests_and_idle_connections(server: Served) -> None:
    halves = [raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le") for _ in range(20)]
    halves += [raw(server, post_bytes(GREEDY)[:-5]) for _ in range(20)]
    halves.append(
        raw(server, b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab")
    )
    assert server.post("/v1/completions", GREEDY).status_code == 200
    for half in halves:
        half.close()
    time.sleep(0.3)


def test_two_requests_in_one_packet_are_both_answered(server: Served) -> None:
    connection = raw(server, post_bytes(GREEDY) * 2, seconds=10)
    content = b""
    while content.count(b'"usage"') < 2:
        content += connection.recv(4096)
    connection.close()


def test_headers_that_do_not_come_are_not_waited_for() -> None:
    quick = "import runtime.server.connection as c\nc.HEADER_SECONDS = 1.0"
    with Served(faulty=quick) as server:
        before = server.descriptors
        began = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        whole = began + b"\r\n"
        silent, dripping, second = raw(server, b"", 10), raw(server, began, 10), raw(server, whole, 10)
        while b'"ok"' not in second.recv(4000):
            pass
        second.sendall(began)
        started = time.monotonic()
        while time.monotonic() - started < 0.8:
            dripping.sendall(b"x: y\r\n")  # every byte in time, the headers never
            time.sleep(0.1)
        long = raw(server, post_bytes({**LONG, "max_tokens": 700}), 20)
        for connection in (silent, dripping, second):
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4000):
                    pass
            connection.close()
        assert time.monotonic() - started < 5
        content = b""
        while b"[DONE]" not in content:
            content += long.recv(65536)  # an answer may take longer than headers
        long.close()
        server.until_idle()
        assert server.descriptors <= before + 1


def test_a_client_that_only_closes_its_sending_half_has_left(server: Served) -> None:
    connection = raw(server, post_bytes(LONG), seconds=10)
    assert b"200 OK" in connection.recv(1000)
    connection.shutdown(socket.SHUT_WR)
    server.until_idle(seconds=2.0)
    connection.close()


def test_leaving_takes_effect_within_a_few_steps(server: Served) -> None:
    pieces: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=20) as response:
        for piece in events(response):
            pieces.append(piece)
            if len(pieces) == 20:
                break
    server.until_idle(seconds=1.0)
    time.sleep(2 / PIECES_PER_SECOND)  # the tokens of the last step are counted with the next pieces
    generated = server.metric("generation_tokens_total")
    time.sleep(0.2)
    assert server.metric("generation_tokens_total") == generated


def test_many_idle_connections_and_bad_ones_leave_no_descriptor(server: Served) -> None:
    before = server.descriptors
    for _ in range(3):
        connections = [raw(server, content) for content in (b"", b"GET", b"\x16\x03\x01\x02", b"\0" * 99) * 40]
        assert server.post("/v1/completions", GREEDY).status_code == 200
        for connection in connections:
            connection.close()
    end = time.monotonic() + 5
    while server.descriptors > before + 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert server.descriptors <= before + 2


def test_whoever_is_served_beside_all_this_notices_nothing(server: Served) -> None:
    fields = {**LONG, "max_tokens": 300}
    whole = server.post("/v1/completions", {**fields, "stream": False}).json()["choices"][0]["text"]
    pieces: list[dict[str, Any]] = []
    beside = read_stream(server, fields, pieces)
    contents = [
        b"garbage\r\n\r\n",
        post_bytes(GREEDY)[:-5],
        post_bytes({**GREEDY, "n": 10**6}),
        post_bytes({**GREEDY, "prompt": "word " * 50_000}),
        post_bytes({**GREEDY, "structured_outputs": {"regex": "(a{1,1000}){1,1000}" * 20}}),
        post_bytes({**GREEDY, "structured_outputs": {"json": {"$ref": "#"}}}),
        post_bytes({**GREEDY, "logit_bias": {str(token): 1 for token in range(4000)}}),
        post_bytes({**GREEDY, "temperature": 2, "n": 3}),
        post_bytes({**LONG, "prompt": "x = 1\n" * 150}),
        post_bytes(GREEDY).replace(b"/v1/completions", b"/flush_cache", 1),
    ]
    while beside.is_alive():
        connections = [raw(server, content) for content in contents]
        time.sleep(0.2)
        for connection in connections:
            connection.close()
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole
