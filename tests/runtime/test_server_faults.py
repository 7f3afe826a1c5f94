"""What clients, networks and processes do wrong. After every fault: no block held, no task or descriptor left, another
client's answer unchanged, and the next request served."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.runtime.served import PLAIN, Served, until

GREEDY = {"prompt": "def main():\n", "max_tokens": 12, "temperature": 0}
LONG = {"prompt": "import os\n", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
JSON = {"content-type": "application/json"}


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of the server-sent events, without the end mark."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def read_stream(server: Served, body: dict[str, Any], into: list[dict[str, Any]]) -> threading.Thread:
    """Read a stream to its end on a thread of its own; returns once its first event is there."""

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            for piece in events(response):
                into.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    while not into and thread.is_alive():
        time.sleep(0.01)
    return thread


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served("--max-body-bytes", "300000", "--max-running-requests", "4", "--max-queued-requests", "8") as served:
        expected = served.post("/v1/completions", GREEDY).json()["choices"][0]["text"]
        served.expected = expected  # type: ignore[attr-defined]
        before = served.rss_bytes
        yield served
        assert served.rss_bytes < before + 160 * 2**20
        assert served.stop() == 0, served.log


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    if "server" not in request.fixturenames:
        yield
        return
    server = request.getfixturevalue("server")
    server.until_idle()
    descriptors, tasks = server.descriptors, server.tasks
    yield
    server.until_idle()
    assert server.post("/v1/completions", GREEDY).json()["choices"][0]["text"] == server.expected
    until(lambda: server.descriptors <= descriptors + 1)
    until(lambda: server.tasks <= tasks)


# Requests


def body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "x", "max_tokens": 2, "temperature": 0, **fields}).encode()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b'{"prompt": "' + b"\xff\xfe" + b'"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400),
        (b'{"prompt": "x", "structured_outputs": {"json": ' + b'{"not":' * 900 + b"{}" + b"}" * 900 + b"}}", 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": "x", "temperature": Infinity}', 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "x", "max_tokens": 1, "max_tokens": 2}', 200),
        (body(n=10**6), 400),
        (body(n=0), 400),
        (body(max_tokens=-1), 400),
        (body(max_tokens=2**31), 400),
        (body(max_tokens=10**30), 400),
        (body(max_tokens="2"), 400),
        (body(top_k=-5), 400),
        (body(seed=10**30), 400),
        (body(logprobs=21), 400),
        (body(stop=["x"] * 10_000), 400),
        (body(stop=""), 400),
        (body(logit_bias={str(token): 1 for token in range(4000)}), 400),
        (body(logit_bias={"5000": 1}), 400),
        (body(logit_bias={"five": 1}), 400),
        (body(logit_bias={"5": 10**6}), 200),
        (body(stop_token_ids=[10**9]), 400),
        (body(prompt=""), 200),  # the tokenizer's token for a beginning
        (body(prompt=[]), 400),
        (body(prompt=[4096]), 400),
        (body(prompt=[-1]), 400),
        (body(prompt=[[5], []]), 400),
        (body(prompt=["x"] * 1000), 400),
        (body(prompt="x" * 200_000), 400),
        (body(prompt="word " * 50_000), 400),
        (body(prompt="<|endoftext|>" * 4), 200),
        (body(prompt="\x00\x1b[31m\r\n"), 200),
        (body(prompt="\N{PILE OF POO}" * 20, temperature=2.0), 200),
        (body(echo=True, max_tokens=0), 200),
        (body(best_of=5), 400),
        (body(suffix="x"), 400),
        (body(unheard_of=1), 400),
        (body(user="me", metadata={"a": "b"}), 200),
        (body(stream_options={"include_usage": True}), 400),
        (body(stream=True, stream_options={"include_usages": True}), 400),
        (body(guided_regex="a"), 400),
        (body(prompt_logprobs=1), 400),
        (body(prompt_logprobs=None, priority=0, request_id="x"), 200),
        (body(structured_outputs={"regex": "(a{1,1000}){1,1000}" * 20}), 200),
        (body(structured_outputs={"regex": "(x+x+)+y"}), 200),
        (body(structured_outputs={"json": {"$ref": "#"}}), 400),
        (body(structured_outputs={"json": {"type": "array", "items": {"$ref": "#"}}}), 200),
    ],
)
def test_bodies_of_every_kind(server: Served, content: bytes, status: int) -> None:
    done = httpx.post(f"{server.url}/v1/completions", content=content, headers=JSON, timeout=60, verify=PLAIN)
    assert done.status_code == status, done.text
    if status != 200:
        error = done.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    server.until_idle()


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}, 400),
        ({"role": "user"}, 200),
        ({"content": "x"}, 400),
        ({"role": "user", "content": {"a": 1}}, 400),
    ],
)
def test_messages_of_every_kind(server: Served, message: dict[str, Any], status: int) -> None:
    done = server.post("/v1/chat/completions", {"messages": [message], "max_tokens": 2})
    assert done.status_code == status, done.text
    bad = {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}
    assert "chat_template cannot be served" in server.post("/v1/chat/completions", bad).text
    bad = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tokenize": True}}
    assert "is not for templates" in server.post("/v1/chat/completions", bad).text


def test_what_the_gate_refuses(server: Served) -> None:
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, content=b"x" * 400_000, headers=JSON).status_code == 413
    chunks = (b"x" * 10_000 for _ in range(40))
    started = time.monotonic()
    assert httpx.post(url, content=chunks, headers=JSON, timeout=20).status_code == 413
    assert time.monotonic() - started < 4, "nothing is waited for once all of it has come"
    assert httpx.post(url, content=b"zip", headers={**JSON, "content-encoding": "gzip"}).status_code == 415
    assert httpx.post(url, content=body(), headers={**JSON, "host": "evil.example"}).status_code == 403
    assert httpx.post(url, content=body(), headers={"content-type": "text/plain"}).status_code == 400
    assert httpx.get(url, headers={"x": "y" * 100_000}).status_code == 431
    assert httpx.get(url).status_code == 405
    assert (
        "access-control-allow-origin"
        not in httpx.get(f"{server.url}/v1/models", headers={"origin": "http://a"}).headers
    )


def test_a_refusal_reaches_who_is_still_sending(server: Served) -> None:
    """Closed over what it had not read, the connection would be reset and the reason lost."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n"
    for extra, status in (
        (b"", b"413"),
        (b"Content-Encoding: gzip\r\n", b"415"),
        (b"Expect: 100-continue\r\n", b"413"),
    ):
        connection = raw(server, head + extra + b"\r\n", seconds=10)
        if b"Expect" in extra:
            assert connection.recv(4000).startswith(b"HTTP/1.1 " + status), "who asks is told before it sends"
        else:
            connection.sendall(b"x" * 3_000_000)
            assert connection.recv(4000).startswith(b"HTTP/1.1 " + status)
        connection.close()


def test_a_grammar_that_fails_on_the_way_is_that_requests_400(server: Served) -> None:
    large = {"structured_outputs": {"regex": "(a{1,1000}){1,1000}" * 20}}
    # Greedy: other tokens, such as long runs of the letter, may reach max_tokens before they reach the grammar's limit.
    failed = server.post("/v1/completions", {**GREEDY, **large})
    assert (failed.status_code, failed.json()["error"]["param"]) == (400, "structured_outputs")
    assert "the grammar failed" in failed.text


def test_bodies_together_have_a_limit(server: Served) -> None:
    """Of 32 of the largest, 300 kB each here: some of 40 are refused, and small ones are served all the while."""
    before, refused = server.rss_bytes, server.metric("requests_rejected_total")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 299999\r\n\r\n"
    unfinished = [raw(server, head + b"x" * 290_000, 10) for _ in range(40)]
    until(lambda: server.metric("requests_rejected_total") > refused)
    assert server.post("/v1/completions", GREEDY).status_code == 200
    statuses = set()
    for connection in unfinished:
        connection.sendall(b"x" * 9_999)
        statuses.add(connection.recv(4000)[9:12])
        connection.close()
    assert statuses == {b"400", b"503"}, "read and judged, or refused"
    assert server.rss_bytes < before + 40 * 2**20
    server.until_idle()
    whole = {**GREEDY, "prompt": "x" * 290_000}
    assert server.post("/v1/completions", whole).status_code == 400  # read again, and judged


def test_a_request_cannot_forge_a_line_of_the_log(server: Served) -> None:
    connection = raw(server, b"GET /%0a2026-01-01%20CRITICAL%20forged%1b[31m HTTP/1.1\r\nHost: evil\r\n\r\n")
    assert b"403" in connection.recv(1000)
    connection.close()
    assert "forged" in server.log
    assert "\x1b" not in server.log
    assert not [line for line in server.log.splitlines() if line.startswith("2026-01-01")]


# Network


def raw(server: Served, content: bytes, seconds: float = 2.0) -> socket.socket:
    """A connection on which this has been sent."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=seconds)
    connection.sendall(content)
    return connection


def post_bytes(fields: dict[str, Any]) -> bytes:
    content = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + content


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
    connections = [raw(server, post_bytes({**LONG, "prompt": f"import {n}\n"})) for n in range(10)]
    while server.metric("num_requests_waiting") < 6:
        time.sleep(0.01)
    for connection in connections[1:]:
        connection.close()
    answer = server.post("/v1/completions", GREEDY).json()
    assert answer["choices"][0]["text"] == server.expected  # type: ignore[attr-defined]
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


# Process


def test_the_key_the_wait_and_the_end_have_their_limits(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("first key\nsecond\n")
    flags = ("--queue-timeout", "0.1", "--max-running-requests", "1", "--shutdown-timeout", "0.1")
    with Served("--api-key-file", str(file), *flags) as server:
        headers = {"authorization": "Bearer first key"}
        routes = server.get("/openapi.json", headers=headers).json()["paths"]
        assert {"/v1/chat/completions", "/generate", "/metrics", "/ping", "/flush_cache"} <= set(routes)
        paths = {*routes, "/openapi.json", "/docs", "/v1/embeddings", "/nowhere", "//health", "/health/"} - {"/health"}
        wrong = ("Bearer wrong", "Bearer " + "x" * 20_000, "Bearer", "Basic first key", "Bearer first")
        with httpx.Client(base_url=server.url) as client:
            for method in ("GET", "POST"):
                assert {client.request(method, path).status_code for path in paths} == {401}
            assert {client.get("/metrics", headers={"authorization": key}).status_code for key in wrong} == {401}
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models", headers={"authorization": "Bearer second"}).status_code == 200
        assert "first key" not in server.log
        # And, as this server runs one request at a time: what waits for too long is sent away.
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, headers=headers) as running:
            pieces = events(running)
            next(pieces)
            waited = server.post("/v1/completions", GREEDY, headers=headers)
            assert waited.status_code == 429
            assert "queue_timeout is 0.1 s" in waited.text
            # And an answer that does not end in time after a signal ends with an error.
            server.process.terminate()
            assert "shutting down" in list(pieces)[-1]["error"]["message"]
        assert server.process.wait(20) == 0, server.log
        assert "Traceback" not in server.log


def test_after_kill_minus_nine_the_port_is_free_and_a_signal_lets_answers_end() -> None:
    with Served(wait=False) as killed:
        killed.stop(number=9)
    with Served("--port", killed.url.rpartition(":")[2]) as server:
        assert server.url == killed.url
        streams: list[list[dict[str, Any]]] = [[], [], []]
        threads = [read_stream(server, {**LONG, "max_tokens": 120}, into) for into in streams]
        server.process.terminate()
        while "draining" not in server.log:
            time.sleep(0.01)
        assert server.get("/health").json()["status"] == "draining"
        assert server.post("/v1/completions", GREEDY).status_code == 503
        assert server.process.wait(20) == 0, server.log
        for thread in threads:
            thread.join()
        assert [into[-1]["choices"][0]["finish_reason"] for into in streams] == ["length"] * 3


BROKEN = """
import runtime.runner as r, time
real, calls = r.Runner.run, []
def run(self, plan):
    if len(plan) >= {together}: calls.append(1)
    if len(calls) > 30: {what}
    return real(self, plan)
r.Runner.run = run
"""
"""Steps of at least ``together`` sequences go well 30 times."""


def test_a_failed_forward_pass_ends_every_stream_and_the_process() -> None:
    with Served(faulty=BROKEN.format(together=2, what="raise RuntimeError('the device fell off')")) as server:
        streams: list[list[dict[str, Any]]] = [[], []]
        threads = [read_stream(server, LONG, into) for into in streams]
        for thread in threads:
            thread.join()
        assert all("the device fell off" in into[-1]["error"]["message"] for into in streams)
        assert server.process.wait(20) == 70
        assert "the device fell off" in server.log


def test_a_hanging_forward_pass_is_unhealthy_and_then_ends_the_process() -> None:
    with Served("--watchdog-timeout", "3", faulty=BROKEN.format(together=1, what="time.sleep(60)")) as server:
        connection = raw(server, post_bytes(LONG))
        statuses = []
        while server.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                statuses.append(server.get("/health").json()["status"])
            time.sleep(0.1)
        connection.close()
        assert server.process.wait(20) == 70
        assert "no progress" in server.log
        assert (statuses[0], statuses[-1]) == ("ok", "stuck")


def test_loading_is_not_healthy_and_a_bad_model_ends_the_process(tmp_path: Any) -> None:
    slow = (
        "import runtime.worker as w, time\nreal = w.Engine\nw.Engine = lambda config: time.sleep(1.5) or real(config)"
    )
    with Served("--kernel", "nonsense", wait=False, faulty=slow) as server:
        answer = server.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        assert server.post("/v1/completions", GREEDY).status_code == 503
        assert server.process.wait(30) == 1
        assert "nonsense" in server.log
        assert "Traceback" not in server.log


def test_whoever_waits_for_an_engine_that_dies_is_told() -> None:
    slow_death = "(time.sleep(1.5), (_ for _ in ()).throw(RuntimeError('the device fell off')))"
    with Served(faulty=BROKEN.format(together=1, what=slow_death)) as server:
        answers: list[httpx.Response] = []
        connection = raw(server, post_bytes(LONG))
        while b"data: " not in connection.recv(4096):
            pass
        time.sleep(0.5)  # the thread hangs by now
        waiting = threading.Thread(target=lambda: answers.append(server.post("/flush_cache", {})))
        waiting.start()
        waiting.join(15)
        connection.close()
        assert [answer.status_code for answer in answers] == [503]
        assert "the device fell off" in answers[0].text
        assert server.process.wait(20) == 70
