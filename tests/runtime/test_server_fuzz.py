"""Bodies nobody would think of: by Hypothesis around the fields there are, and by Schemathesis from the server's own schema.

Whatever comes, the server answers in its own words, holds no block afterwards and serves the next request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from runtime.server.foreign_fields import REFUSED
from runtime.server.protocol import ChatRequest, CompletionRequest, GenerateRequest, NativeSampling
from tests.runtime.served import Served

GREEDY = {"prompt": "def main():\n", "max_tokens": 8, "temperature": 0}
ROUTES = {
    "/v1/completions": ("prompt", CompletionRequest),
    "/v1/chat/completions": ("messages", ChatRequest),
    "/generate": ("text", GenerateRequest),
}
SHORT = {"max_tokens": 3, "max_new_tokens": 3}
BOUNDED = settings(
    deadline=None, derandomize=True, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served("--request-timeout", "5") as served:
        yield served
        served.until_idle()
        assert served.stop() == 0, served.log
        assert "Traceback" not in served.log


@pytest.fixture(scope="module")
def connection(server: Served) -> Iterator[httpx.Client]:
    expected = server.post("/v1/completions", GREEDY).json()["choices"][0]["text"]
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made
        assert made.post("/v1/completions", json=GREEDY).json()["choices"][0]["text"] == expected


def checked(answer: httpx.Response) -> httpx.Response:
    """An answer that this server means to give."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("\n\n")
        assert "data: [DONE]" in answer.text or '"error"' in answer.text
    return answer


LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-3, 40) | st.floats() | st.text(max_size=12)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TOKENS = st.lists(st.integers(-1, 4200), max_size=6)
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=20) | TOKENS | st.lists(TOKENS, max_size=3),
    "text": st.text(max_size=20) | st.lists(st.text(max_size=5), max_size=3),
    "input_ids": TOKENS | st.lists(TOKENS, max_size=3),
    "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": VALUES})),
    "n": st.integers(0, 3), "temperature": st.floats(0, 3), "top_p": st.floats(0, 1.1), "top_k": st.integers(-1, 9),
    "stream": st.booleans(), "echo": st.booleans(), "logprobs": st.integers(0, 3) | st.booleans(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
    "logit_bias": st.dictionaries(st.integers(-1, 4100).map(str), st.floats(-200, 200, allow_nan=False), max_size=3),
    "regex": st.text(alphabet="ab[](){}*+?|\\1,", max_size=10),
    "structured_outputs": st.fixed_dictionaries({"json": VALUES}),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "json_schema"])}),
    "stream_options": st.just({"include_usage": True}),
}  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """A prompt, few tokens, and some of the fields, most of them near what they should be."""
    prompt, model = ROUTES[path]
    body = {prompt: draw(PLAUSIBLE[prompt])}
    inner = body.setdefault("sampling_params", {}) if path == "/generate" else body
    for place, fields in ((body, model), (inner, NativeSampling if path == "/generate" else model)):
        names = [*fields.model_fields, *REFUSED] if place is body else list(fields.model_fields)
        for name in draw(st.lists(st.sampled_from(names), max_size=5, unique=True)):
            place[name] = draw(PLAUSIBLE.get(name, VALUES) if draw(st.integers(0, 3)) else VALUES)
    target = inner if isinstance(inner, dict) else body
    for name, value in SHORT.items():
        if (name == "max_new_tokens") == (path == "/generate"):
            target[name] = value
    return body


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_around_the_fields(connection: httpx.Client, path: str) -> None:
    statuses = []

    @settings(BOUNDED, max_examples=50)
    @given(bodies(path))
    def fuzz(body: dict[str, Any]) -> None:
        content = json.dumps(body)  # NaN, infinity and half surrogate pairs as they are
        answer = connection.post(path, content=content, headers={"content-type": "application/json"})
        statuses.append(checked(answer).status_code)

    fuzz()
    assert {200, 400} <= set(statuses), "some are answered and some are refused"


def test_bytes_that_are_no_body(connection: httpx.Client) -> None:
    @settings(BOUNDED, max_examples=15)
    @given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
    def fuzz(content: bytes) -> None:
        for path in ROUTES:
            answer = connection.post(path, content=content, headers={"content-type": "application/json"})
            assert checked(answer).status_code == 400

    fuzz()


def test_the_schema_says_what_happens(server: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = list(schema.get_all_operations())
    paths = {operation.ok().path for operation in operations}
    assert {*ROUTES, "/tokenize", "/v1/models/{name}", "/health", "/metrics", "/flush_cache"} <= paths
    checks = (
        not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    )  # fmt: skip

    for found in operations:
        operation = found.ok()

        @settings(BOUNDED, max_examples=6)
        @given(operation.as_strategy())
        def fuzz(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict):
                case.body |= {name: value for name, value in SHORT.items() if name in case.body}
            case.call_and_validate(checks=checks, timeout=30)

        fuzz()
    server.until_idle()
