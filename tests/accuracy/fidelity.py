"""Runtime fidelity, in one table: every format, with every kernel that takes it here, on every path through the engine, against
one reference, plain Transformers with dequantized weights. All in float32, so that nothing but the order of additions may
differ. What quantizes inputs runs weight-only: another dtype would move its codes (``test_quantized_inputs``).

Each path is looked at while it runs: a prefill of one piece, a mixed batch that was none, or a preemption that did not happen
is an error of the table.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import torch
import uvicorn
from torch import Tensor, nn

from quant.linear import QuantLinear
from runtime import LLM, EngineConfig, SamplingParams, load_model
from runtime.graphs import Logits
from runtime.request import Request
from runtime.runner import Runner, StepResult
from runtime.scheduler import Plan
from runtime.server.app import build_app
from runtime.server.metrics import Metrics
from runtime.server.options import ServerOptions
from runtime.worker import Worker
from tests.formats import CASES
from tests.runtime.test_engine import dequantized

LARGEST = 1e-10
"""Mean KL in nats: the order of additions in float32 gives 1e-12, a single weight that is one step off 2e-7 and more."""
CACHE_LOSS = (1e-5, 5e-4)
"""Mean KL that an int8 cache costs these models, from and to."""
KERNELS = (None, "reference")
"""What multiplies and what attends: the preferred ones, and the references."""
DENSE = "demo-bf16"
MODELS: dict[str, str | Path] = {case.checkpoint: case.folder for case in CASES} | {"demo": "demo", DENSE: DENSE}

BUDGET = 32
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "weight_only": True,
    "kv_cache_dtype": "fp32",  # two checkpoints ask for FP8: test_kv_scales
    "skip_tokenizer_init": True,
    "startup_check": False,
    "max_num_batched_tokens": BUDGET,
    "max_total_tokens": 160,
}
SCORE = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)


def answer(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def prompts(path: int, *lengths: int) -> list[list[int]]:
    """Token ids that no other path's prompts begin with."""
    starts = range(17 * path, 17 * path + len(lengths))
    return [
        [(5 * start + 11 * i * i + i) % 512 for i in range(size)] for start, size in zip(starts, lengths, strict=True)
    ]


@dataclass(frozen=True)
class Row:
    """One model with one kernel: mean KL by path, and whether every likeliest token was the reference's; the cache's apart."""

    model: str
    kernels: str
    kl: dict[str, float]
    same: bool

    @property
    def failures(self) -> list[str]:
        low, high = CACHE_LOSS
        wrong = [path for path, kl in self.kl.items() if not (low < kl < high if path == CACHE else kl < LARGEST)]
        return wrong + ([] if self.same else ["likeliest tokens"])


@dataclass
class Watch:
    """Every row of logits that engines read, by the prompt it belongs to and in order, and the chunks of every step."""

    rows: dict[tuple[int, ...], list[Tensor]]
    steps: list[list[int]]

    def clear(self) -> None:
        self.rows.clear()
        self.steps.clear()


@contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch({}, [])
    read, run = Runner._read, Runner.run

    def reading(wanted: list[tuple[Request, int, int | None]], logits: Logits) -> StepResult:
        for (request, _, _), row in zip(wanted, logits.values, strict=False):
            watch.rows.setdefault(tuple(request.prompt), []).append(row.double().log_softmax(-1))
        return read(wanted, logits)

    def running(self: Runner, plan: Plan) -> StepResult:
        watch.steps.append([chunk.size for chunk in plan])
        return run(self, plan)

    with mock.patch.object(Runner, "_read", staticmethod(reading)), mock.patch.object(Runner, "run", running):
        yield watch


Answered = list[tuple[list[int], list[int]]]
"""Prompts, each with the tokens that followed."""


def prefill(llm: LLM, watch: Watch) -> Answered:
    asked = prompts(0, 24, 24, 24)
    for one in asked:
        llm.generate(one, SCORE)
    assert watch.steps == [[24]] * 3
    return [(one, []) for one in asked]


def chunked(llm: LLM, watch: Watch) -> Answered:
    asked = prompts(1, 50, 70)
    for one in asked:
        llm.generate(one, SCORE)
    assert watch.steps == [[32], [18], [32], [32], [6]]
    return [(one, []) for one in asked]


def decode(llm: LLM, watch: Watch) -> Answered:
    found = _answers(llm, prompts(2, 8, 9, 10), 8)
    assert watch.steps[1:] == [[1, 1, 1]] * 7
    return found


def mixed(llm: LLM, watch: Watch) -> Answered:
    found = _answers(llm, prompts(3, 5, 40, 40), 6)
    assert any(1 in step and max(step) > 1 for step in watch.steps)
    return found


def prefix_hit(llm: LLM, watch: Watch) -> Answered:
    begun = prompts(4, 40, 40)
    llm.generate(begun, answer(1))
    watch.clear()
    asked = [one + more for one, more in zip(begun, prompts(5, 6, 7), strict=True)]
    outputs = llm.generate(asked, answer(6))
    assert [output.cached_tokens for output in outputs] == [32, 32]
    return [(one, output.outputs[0].token_ids) for one, output in zip(asked, outputs, strict=True)]


def evicted(llm: LLM, watch: Watch) -> Answered:
    """Prefixes whose pages others have written over since."""
    begun = prompts(8, 40, 40)
    llm.generate(begun, answer(1))
    for other in prompts(9, 60, 60, 60):
        llm.generate(other, answer(1))
    watch.clear()
    asked = [one + more for one, more in zip(begun, prompts(10, 6, 7), strict=True)]
    outputs = llm.generate(asked, answer(6))
    assert [output.cached_tokens for output in outputs] == [0, 0]
    return [(one, output.outputs[0].token_ids) for one, output in zip(asked, outputs, strict=True)]


def preempted(llm: LLM, watch: Watch) -> Answered:
    before = llm.engine.stats().preemptions
    found = _answers(llm, prompts(6, 24, 24, 24, 24), 18)
    assert llm.engine.stats().preemptions > before
    return found


def _answers(llm: LLM, asked: Sequence[list[int]], tokens: int) -> Answered:
    outputs = llm.generate(list(asked), answer(tokens))
    return [(one, output.outputs[0].token_ids) for one, output in zip(asked, outputs, strict=True)]


ON_ENGINE: dict[str, Callable[[LLM, Watch], Answered]] = {
    "prefill": prefill,
    "chunked": chunked,
    "decode": decode,
    "mixed": mixed,
    "prefix hit": prefix_hit,
    "evicted": evicted,
    "preempted": preempted,
}
CACHE, HTTP = "int8 KV", "HTTP"
PATHS = (*ON_ENGINE, CACHE, HTTP)


def over_http(config: EngineConfig, watch: Watch) -> Answered:
    """Streams of a server on a socket, side by side. What arrives has to be what was computed, digit by digit; in how many
    pieces it does depends on how busy the machine is."""
    asked = prompts(7, 20, 21, 22)
    events = asyncio.run(_served(config, asked))
    found = []
    for one, received in zip(asked, events, strict=True):
        rows = received[-1]["meta_info"]["output_token_logprobs"]
        tokens = [token for _, token, _ in rows]
        computed = torch.stack(watch.rows[tuple(one)]).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (computed - torch.tensor([row[0] for row in rows])).abs().max() < 1e-5
        found.append((one, tokens))
    return found


async def _served(config: EngineConfig, asked: Sequence[list[int]]) -> list[list[dict[str, Any]]]:
    ready = asyncio.get_running_loop().create_future()
    worker = Worker(config, lambda: ready.set_result(None), ready.set_exception)
    app = build_app(worker, ServerOptions(), Metrics("model"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False))
    worker.start()
    await ready
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=60) as client:
        found = await asyncio.gather(*(_stream(client, one) for one in asked))
    server.should_exit = True
    await serving
    worker.stop()
    assert worker.join(10)
    return found


async def _stream(client: httpx.AsyncClient, prompt: list[int]) -> list[dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True, "return_logprob": True}
    async with client.stream("POST", "/generate", json=body) as response:
        return [json.loads(line[6:]) async for line in response.aiter_lines() if line.startswith("data: {")]


def measure(model: str, kernel: str | None, truth: nn.Module, paths: Sequence[str] = PATHS) -> Row:
    """Some paths of a model of :data:`MODELS`. ``truth`` is what :func:`reference` gives for it."""
    options = OPTIONS | {"kernel": kernel, "attention_backend": kernel}
    with watched() as watch:
        llm = LLM(MODELS[model], **options)

        def take(path: str) -> Answered:
            if path == CACHE:
                return chunked(LLM(MODELS[model], **options | {"kv_cache_dtype": "int8"}), watch)
            if path == HTTP:
                return over_http(EngineConfig(str(MODELS[model]), **options), watch)
            llm.engine.flush_cache()
            return ON_ENGINE[path](llm, watch)

        kl: dict[str, float] = {}
        same = True
        for path in paths:
            watch.clear()
            exact, ours = _rows(take(path), truth, watch)
            kl[path] = (exact.exp() * (exact - ours)).sum(-1).mean().item()
            same &= path == CACHE or bool((exact.argmax(-1) == ours.argmax(-1)).all())
    layers = (layer for layer in llm.engine.loaded.model.modules() if isinstance(layer, QuantLinear))
    kernels = "+".join(sorted({layer.kernel.name for layer in layers})) or "torch"
    return Row(model, kernels, kl, same)


@torch.inference_mode()
def _rows(answered: Answered, truth: nn.Module, watch: Watch) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[rows, vocabulary]`` of the reference and of the engine, of every row that the engine read."""
    exact, ours = [], []
    for prompt, tokens in answered:
        rows = torch.stack(watch.rows[tuple(prompt)])
        last = len(prompt) + len(tokens) - 1
        plain = truth(torch.tensor([prompt + tokens]), use_cache=False).logits[0].double().log_softmax(-1)
        exact.append(plain[last - len(rows) : last])
        ours.append(rows)
    return torch.cat(exact), torch.cat(ours)


def reference(model: str) -> nn.Module:
    """Plain Transformers in float32, weights dequantized."""
    kernel = None if model == DENSE else "reference"
    return dequantized(load_model(MODELS[model], kernel=kernel, dtype="float32", weight_only=True))


def table() -> Iterator[Row]:
    """Every model with every kernel; one row where the preferred one is the reference, or nothing is quantized."""
    for model in MODELS:
        truth, seen = reference(model), set()
        for kernel in kernels_of(model):
            row = measure(model, kernel, truth)
            if row.kernels not in seen:
                yield row
            seen.add(row.kernels)


def kernels_of(model: str) -> tuple[str | None, ...]:
    return KERNELS[:1] if model == DENSE else KERNELS


WIDTHS = (42, 14)


def header() -> str:
    return f"{'checkpoint':<{WIDTHS[0]}} {'kernels':<{WIDTHS[1]}} " + " ".join(f"{path:>10}" for path in PATHS)


def line(row: Row) -> str:
    cells = " ".join(f"{row.kl[path]:>10.1e}" if path in row.kl else f"{'':>10}" for path in PATHS)
    failures = f"  FAILED: {', '.join(row.failures)}" if row.failures else ""
    return f"{row.model:<{WIDTHS[0]}} {row.kernels:<{WIDTHS[1]}} {cells}{failures}"
