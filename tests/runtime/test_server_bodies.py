"""Requests that are wrong, too large or not allowed: answered, or refused with the reason, and nobody else's problem."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from tests.runtime.served import GREEDY, PLAIN, Served, raw, until
from tests.runtime.unharmed import small_server, unharmed

JSON = {"content-type": "application/json"}


server = pytest.fixture(scope="module")(small_server)
nothing_is_left = pytest.fixture(autouse=True)(unharmed)


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
