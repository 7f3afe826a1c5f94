"""One request fails inside the server, in the forward pass, in its text, in memory: it gets the error, and nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.runtime.served import GREEDY, LONG, Served, events, read_stream, until

# Which request it happens to is told by its seed.
FAULTS = """
import torch, runtime.runner as r, runtime.engine as e, runtime.grammar as g, runtime.server.service as s
planned = []
run, forward, delta, add, compile_, encode = (
    r.Runner.run, r.Runner._forward, e.Engine._delta, e.Engine.add, g.GrammarCompiler.compile, s.Service.encode
)
def remember(self, plan):
    planned[:] = [chunk.request.params.seed for chunk in plan if chunk.samples]
    return run(self, plan)
def poison(self, *arguments):
    logits = forward(self, *arguments)
    if 1 in planned:
        values = logits.values.clone()
        values[[row for row, seed in enumerate(planned) if seed == 1]] = torch.nan
        return type(logits).of(values)
    return logits
def unreadable(self, request, *arguments):
    if request.params.seed == 2 and len(request.output) > 3:
        raise RuntimeError('unreadable')
    return delta(self, request, *arguments)
def full(self, prompt, params, matcher=None):
    if params.seed == 3:
        raise MemoryError('allocator')
    return add(self, prompt, params, matcher)
def large(self, wanted):
    if wanted.get('regex') == 'full':
        raise MemoryError('allocator')
    return compile_(self, wanted)
async def long(self, prompt, **options):
    if prompt == 'full':
        raise MemoryError('allocator')
    return await encode(self, prompt, **options)
r.Runner.run, r.Runner._forward, e.Engine._delta, e.Engine.add = remember, poison, unreadable, full
g.GrammarCompiler.compile, s.Service.encode = large, long
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served(faulty=FAULTS) as served:
        yield served
        served.until_idle()
        assert served.stop() == 0, served.log


@pytest.mark.parametrize(
    ("fields", "message", "in_stream"),
    [
        ({"seed": 1}, "NaN or infinite", True),
        ({"seed": 2}, "unreadable", True),
        ({"seed": 3}, "failed unexpectedly", False),
        ({"structured_outputs": {"regex": "full"}}, "failed unexpectedly", False),
        ({"prompt": "full"}, "failed unexpectedly", False),
    ],
    ids=("logits", "text", "queue", "grammar", "tokens"),
)
def test_it_fails_alone(server: Served, fields: dict[str, Any], message: str, in_stream: bool) -> None:
    body = {**GREEDY, **fields}
    other = {**LONG, "max_tokens": 60}
    expected = server.post("/v1/completions", {**other, "stream": False}).json()["choices"][0]["text"]
    descriptors, tasks, counted = server.descriptors, server.tasks, server.metric("nan_logits_total")
    pieces: list[dict[str, Any]] = []
    beside = read_stream(server, other, pieces)
    failed = server.post("/v1/completions", body)
    assert failed.status_code == 500
    assert message in failed.json()["error"]["message"]
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == (200 if in_stream else 500)
        if in_stream:
            assert message in list(events(response))[-1]["error"]["message"]
    beside.join()
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
    server.until_idle()
    assert server.metric("nan_logits_total") - counted == (2 if "NaN" in message else 0)
    assert server.get("/health").status_code == 200
    until(lambda: server.descriptors <= descriptors + 1)
    until(lambda: server.tasks <= tasks)
    good = server.post("/v1/completions", {**other, "stream": False}).json()["choices"][0]
    assert (good["text"], good["finish_reason"]) == (expected, "length")
