"""``relinear bench``: SGLang's three questions about speed, with SGLang's flags. One JSON line a run.

serving              over HTTP, as clients meet it: any server with /generate or /v1/completions; at one concurrency or several
offline-throughput   the engine and its scheduler, without HTTP
one-batch            one static batch: the time of its prompts, then of its decoding steps
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import bench_load
from runtime.bench_client import Answer, Target, run_load
from runtime.bench_figure import serving_figure
from runtime.errors import Error
from runtime.options import ENGINE, LOADING, engine_options, loading_options, pick
from runtime.parser import Parser

if TYPE_CHECKING:
    from runtime.engine import Engine

VOCABULARY = 1000
"""Of random prompts for a server whose own is not known: token ids that every model has."""


def add_parsers(parser: Parser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    serving = kinds.add_parser("serving", help="a running server, over HTTP")
    serving.set_defaults(run=bench_serving)
    serving.add_argument("--backend", choices=("sglang", "vllm"), default="sglang", help="/generate or /v1/completions")
    serving.add_argument("--base-url", metavar="URL", help="instead of --host and --port")
    serving.add_argument("--host", default="127.0.0.1", metavar="H", help="default: 127.0.0.1")
    serving.add_argument("--port", type=int, default=30000, metavar="P", help="default: 30000")
    serving.add_argument("--model", metavar="NAME", help="for /v1/completions, if the server asks for it")
    serving.add_argument("--api-key", metavar="KEY")
    serving.add_argument("--request-rate", type=float, default=float("inf"), metavar="R", help="a second; default: all")
    serving.add_argument(
        "--max-concurrency",
        type=int,
        nargs="+",
        default=[8],
        metavar="N",
        help="requests at a time; a run for each number",
    )
    serving.add_argument("--warmup-requests", type=int, default=1, metavar="N", help="not measured (default: 1)")
    serving.add_argument("--plot", metavar="FILE", help="throughput and latency against concurrency, as SVG")
    offline = kinds.add_parser("offline-throughput", help="the engine, without HTTP")
    offline.set_defaults(run=bench_offline)
    for kind in (serving, offline):
        bench_load.add_options(kind)
    batch = kinds.add_parser("one-batch", help="one static batch, or one of each size")
    batch.set_defaults(run=bench_one_batch)
    batch.add_argument("--batch-size", type=int, nargs="+", default=[8], metavar="N")
    batch.add_argument("--input-len", type=int, nargs="+", default=[64], metavar="N")
    batch.add_argument("--output-len", type=int, nargs="+", default=[64], metavar="N")
    for kind in (offline, batch):
        kind.add_argument("--model-path", "--model", required=True, metavar="M")
        loading_options(kind)
        engine_options(kind)
    for kind in (serving, offline, batch):
        kind.add_argument("--seed", type=int, default=1, metavar="S")
        kind.add_argument("--output-file", metavar="FILE", help="append the result as a JSON line")


def bench_serving(arguments: argparse.Namespace) -> int:
    url = arguments.base_url or f"http://{arguments.host}:{arguments.port}"
    target = Target(url, arguments.backend, arguments.model, arguments.api_key)
    status, results = 0, []
    if arguments.warmup_requests:
        warmup = bench_load.make_load(arguments, VOCABULARY, run=-1)[: arguments.warmup_requests]
        run_load(warmup, target, concurrency=1)
    for run, concurrency in enumerate(arguments.max_concurrency):
        load = bench_load.make_load(arguments, VOCABULARY, run)
        answers, seconds = run_load(
            load, target, concurrency=concurrency, rate=arguments.request_rate, seed=arguments.seed
        )
        if all(answer.error for answer in answers):
            raise Error(f"no request was answered by {url}: {answers[0].error}")
        result = {"backend": arguments.backend, "max_concurrency": concurrency, **serving_summary(answers, seconds)}
        status |= _finish(arguments, "serving", result)
        results.append(result)
    if arguments.plot:
        Path(arguments.plot).write_text(serving_figure(results), encoding="utf-8")
    return status


def serving_summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Counts, throughput and percentiles of latencies in milliseconds: to the first token (``ttft``), between pieces
    (``itl``), a token after the first (``tpot``) and to the end (``e2e``)."""
    good = [answer for answer in answers if answer.error is None]
    gaps = [gap for answer in good for gap in answer.gaps]
    pace = [sum(answer.gaps) / (answer.tokens - 1) for answer in good if answer.tokens > 1]
    return {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "duration_s": seconds,
        "request_throughput": len(good) / seconds,
        "output_throughput": sum(answer.tokens for answer in good) / seconds,
        **_percentiles("ttft_ms", [answer.first for answer in good]),
        **_percentiles("itl_ms", gaps),
        **_percentiles("tpot_ms", pace),
        **_percentiles("e2e_ms", [answer.seconds for answer in good]),
    }


def bench_offline(arguments: argparse.Namespace) -> int:
    from runtime.request import SamplingParams

    llm = _load(arguments)
    load = bench_load.make_load(arguments, llm.engine.vocabulary)
    params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for _, new in load]
    started = time.perf_counter()
    outputs = llm.generate([prompt for prompt, _ in load], params, use_tqdm=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    result = {
        "completed": len(outputs),
        "duration_s": seconds,
        "request_throughput": len(outputs) / seconds,
        "output_throughput": tokens / seconds,
        "total_throughput": (tokens + sum(len(output.prompt_token_ids) for output in outputs)) / seconds,
    }
    return _finish(arguments, "offline-throughput", result)


def bench_one_batch(arguments: argparse.Namespace) -> int:
    llm = _load(arguments)
    chance, status = random.Random(arguments.seed), 0
    for sizes in itertools.product(arguments.batch_size, arguments.input_len, arguments.output_len):
        status |= _finish(arguments, "one-batch", _one_batch(llm.engine, *sizes, chance))
    return status


def _one_batch(engine: Engine, count: int, input_len: int, output_len: int, chance: random.Random) -> dict[str, Any]:
    from runtime.request import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    for _ in range(count):
        engine.add([chance.randrange(engine.vocabulary) for _ in range(input_len)], params)
    started, begun, steps = time.perf_counter(), 0, []
    while begun < count and engine.has_work:
        begun += sum(bool(delta.token_ids) for delta in engine.step())
    prefill = time.perf_counter() - started
    while engine.has_work:
        before = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - before)
    median = statistics.median(steps) if steps else 0.0
    return {
        "batch_size": count,
        "input_len": input_len,
        "output_len": output_len,
        "prefill_s": prefill,
        "prefill_throughput": count * input_len / prefill,
        "median_decode_step_ms": 1000 * median,
        "decode_throughput": count / median if median else None,
    }


def _load(arguments: argparse.Namespace) -> Any:
    from runtime.llm import LLM

    llm = LLM(arguments.model_path, **pick(arguments, LOADING + ENGINE))
    print(llm.report + "\n", file=sys.stderr)
    return llm


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    shown = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    places = {kind: min(len(ordered) - 1, int(part * len(ordered))) for kind, part in shown.items()}
    return {f"{kind}_{name}": 1000 * ordered[place] if ordered else None for kind, place in places.items()}


def _finish(arguments: argparse.Namespace, kind: str, result: dict[str, Any]) -> int:
    for name, value in result.items():
        print(f"{name:<24} {value:.2f}" if isinstance(value, float) else f"{name:<24} {value}")
    if arguments.output_file:
        with Path(arguments.output_file).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"bench": kind, **result}) + "\n")
    return 1 if result.get("failed") else 0
