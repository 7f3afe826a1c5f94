"""What clients do in a soak: ask and read, leave, dawdle, err. Each returns what became of it; :class:`Violation` if that may
not be."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from tests.soak.answers import Question

LONG = {"prompt": "import os\n", "max_tokens": 700, "temperature": 0, "ignore_eos": True}
BUSY = (429,)

Client = Callable[[httpx.AsyncClient, list[Question], random.Random], Awaitable[str]]


class Violation(Exception):
    """Something that may not happen."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Violation(message)


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream. Raises :class:`Violation` for an end without its mark."""
    ended = False
    async for line in response.aiter_lines():
        ended = ended or line == "data: [DONE]"
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Interrupted(event["error"]["message"])
            yield event
    require(ended, "a stream ended without [DONE]")


class Interrupted(Exception):
    """A stream that ended with an error event, or a 503: right while the server ends, and only then."""


async def notice_end(response: httpx.Response) -> None:
    """For the client's hooks."""
    if response.status_code == 503:
        raise Interrupted("503")


async def ask(client: httpx.AsyncClient, questions: list[Question], chance: random.Random) -> str:
    question = chance.choice(questions)
    response = await client.post(question.route, json=question.body)
    if response.status_code in BUSY:
        return "refused 429"
    answer = question.text(_ok(response).json())
    require(answer == question.answer, f"{question.route} {question.body}: {answer!r}, offline {question.answer!r}")
    return f"answered {question.route}"


async def stream(client: httpx.AsyncClient, questions: list[Question], chance: random.Random, pause: float = 0) -> str:
    question, text = chance.choice(questions), ""
    async with client.stream("POST", question.route, json={**question.body, "stream": True}) as response:
        if response.status_code in BUSY:
            return "refused 429"
        if response.status_code != 200:
            await response.aread()
            _ok(response)
        async for event in events(response):
            piece = question.text(event)
            text = piece if question.cumulative else text + piece
            await asyncio.sleep(pause)
    require(
        text == question.answer, f"{question.route} streamed {question.body}: {text!r}, offline {question.answer!r}"
    )
    return f"streamed {question.route}"


async def dawdle(client: httpx.AsyncClient, questions: list[Question], chance: random.Random) -> str:
    outcome = await stream(client, questions, chance, pause=0.02)
    return outcome.replace("streamed", "read slowly")


async def leave(client: httpx.AsyncClient, questions: list[Question], chance: random.Random) -> str:
    """Go at a moment of chance: in the queue, before the first token, or in the middle."""
    body = {
        **LONG,
        "stream": chance.random() < 0.7,
        "prompt": f"import {chance.randrange(9)}\n" * chance.choice([1, 60]),
    }
    try:
        async with asyncio.timeout(chance.choice([0.005, 0.05, 0.3, 1.5])):
            response = await client.post("/v1/completions", json=body)
    except TimeoutError:
        return "left"
    if response.status_code == 200:
        return "stayed"  # the answer was there first
    require(response.status_code in BUSY, f"{response.status_code} {response.text[:200]}")
    return "refused 429"


async def sample(client: httpx.AsyncClient, questions: list[Question], chance: random.Random) -> str:
    """Several samples of several prompts, with log-probabilities."""
    body = {"prompt": ["import os", "x ="], "n": 3, "max_tokens": 12, "temperature": 1.5, "logprobs": 3, "seed": 1}
    response = await client.post("/v1/completions", json=body)
    if response.status_code in BUSY:
        return "refused 429"
    require([choice["index"] for choice in _ok(response).json()["choices"]] == list(range(6)), "not six samples")
    return "sampled"


ERRORS: tuple[tuple[int, dict[str, Any]], ...] = (
    (400, {"content": b"{"}),
    (400, {"json": {"prompt": "x", "n": 10**6}}),
    (400, {"json": {"prompt": "word " * 40_000}}),
    (400, {"json": {"prompt": [10**9]}}),
    (400, {"json": {"prompt": "x", "structured_outputs": {"regex": "["}}}),
    (400, {"json": {"prompt": "x", "structured_outputs": {"json": {"$ref": "#/nowhere"}}}}),
    (400, {"content": b'{"prompt": ' + b"[" * 5000 + b"}"}),
    (404, {"json": {"prompt": "x", "model": "another"}}),
    (413, {"content": b"x" * 400_000}),
    (415, {"content": b"x", "headers": {"content-encoding": "gzip"}}),
    (403, {"content": b"x", "headers": {"host": "evil.example"}}),
)


async def err(client: httpx.AsyncClient, questions: list[Question], chance: random.Random) -> str:
    status, request = chance.choice(ERRORS)
    headers = {"content-type": "application/json", **request.get("headers", {})}
    response = await client.post("/v1/completions", **{**request, "headers": headers})
    require(response.status_code in (status, *BUSY), f"{status} was due: {response.status_code} {response.text[:200]}")
    require(bool(response.json()["error"]["message"]), "an error without a message")
    return f"refused {response.status_code}"


async def hang_up(client: httpx.AsyncClient, questions: list[Question], chance: random.Random) -> str:
    """Half a request on a connection of its own."""
    url = client.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    half = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
    writer.write(half[: chance.randrange(len(half))])
    await asyncio.sleep(chance.choice([0, 0.2]))
    writer.transport.abort()
    return "hung up"


async def look(client: httpx.AsyncClient, questions: list[Question], chance: random.Random) -> str:
    text = chance.choice(questions).answer
    tokens = _ok(await client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()["tokens"]
    back = _ok(await client.post("/detokenize", json={"tokens": tokens})).json()["text"]
    require(back == text, f"tokens of {text!r} are those of {back!r}")
    for path in ("/v1/models", "/server_info", "/metrics", "/version"):
        _ok(await client.get(path))
    return "looked around"


def _ok(response: httpx.Response) -> httpx.Response:
    require(response.status_code == 200, f"{response.url.path}: {response.status_code} {response.text[:300]}")
    return response


CLIENTS: dict[Client, int] = {ask: 8, stream: 8, dawdle: 2, leave: 6, sample: 2, err: 4, hang_up: 2, look: 1}
"""What each does, and how often."""
