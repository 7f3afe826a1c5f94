"""Served throughput and latency against ``transformers serve`` and against the offline engine, in one run.

    python -m benchmarks.serve [--shape demo|1b|tiny] [--rounds 3] [--concurrency 1 8 32] [--plot serve.svg]

Four take turns with the same prompts, answers of the same length and, over HTTP, the same client and the same requests to
/v1/completions: relinear serving the AWQ checkpoint and the bf16 one, ``transformers serve --continuous-batching`` with the
bf16 one, and relinear's engine without a server with the AWQ one. No prompt comes twice, so no prefix is found in a cache;
no token ends an answer. The client runs on the server's cores. Numbers are medians over the rounds.

Answers are checked against plain Transformers: where one is not what the model says, by more than rounding can tip, its server
gets no number and the run fails. "Overhead" is how much longer the server took than the engine alone, for the same work.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import serve_models
from benchmarks.answers import TIE, largest_gap, plain_model
from benchmarks.serve_models import random_prompts, tokens_of
from benchmarks.serve_systems import BLOCK, PEER, Run, Server, System, commands, offline, served
from benchmarks.timing import print_json
from runtime import LLM
from runtime.bench_figure import comparison_figure

OFFLINE = "relinear offline awq"
MOST_FOREIGN = 0.05
"""Of the processors' time, taken by others: more than that and a number is marked."""


@dataclass(frozen=True)
class Plan:
    """What one shape is asked: ``prompt`` and ``new`` tokens, ``waves`` of as many requests as go at a time, and how many
    answers of each server and concurrency are checked."""

    prompt: int
    new: int
    waves: dict[int, int]
    checked: int
    rounds: int


PLANS = {
    "demo": Plan(128, 128, {1: 4, 8: 4, 32: 2}, checked=16, rounds=3),
    "1b": Plan(64, 32, {1: 3, 8: 2, 32: 1}, checked=4, rounds=2),
    "tiny": Plan(8, 8, {1: 1, 8: 1, 32: 1}, checked=32, rounds=1),
}


def measure(
    plan: Plan, systems: dict[str, System], vocabulary: int, rounds: int, every: Sequence[int]
) -> dict[Any, Any]:
    """``{concurrency: {system: [Run of each round]}}``; a warm-up of each goes before."""
    runs: dict[int, dict[str, list[Run]]] = {at_a_time: {name: [] for name in systems} for at_a_time in every}
    for number in range(rounds + 1):
        for at_a_time in every:
            count = at_a_time * (plan.waves.get(at_a_time, 2) if number else 1)
            new = plan.new if number else min(plan.new, 4)
            prompts = random_prompts(count, plan.prompt, vocabulary, seed=1000 * number + at_a_time)
            for name, system in systems.items():
                before, own = psutil.cpu_times(), processor_seconds()
                run = system([(prompt, new) for prompt in prompts], at_a_time)
                taken = busy_seconds(before) - (processor_seconds() - own)
                run.result["foreign_load"] = max(0.0, taken / run.result["duration_s"] / (psutil.cpu_count() or 1))
                if number:
                    runs[at_a_time][name].append(run)
        say(f"round {number} of {rounds} is done" if number else "warm")
    return runs


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def processor_seconds() -> float:
    """Of this process and its children, the servers."""
    here = psutil.Process()
    return sum(
        process.cpu_times().user + process.cpu_times().system for process in (here, *here.children(recursive=True))
    )


def busy_seconds(before: Any) -> float:
    now = psutil.cpu_times()
    return sum(getattr(now, part) - getattr(before, part) for part in ("user", "system", "nice", "softirq", "steal"))


def gaps(folders: dict[str, Path], runs: dict[Any, Any], checked: int) -> dict[tuple[int, str], float]:
    """The largest gap (:func:`largest_gap`) of some answers, by concurrency and server."""
    found = {}
    for kind, folder in folders.items():
        model = plain_model(folder, kind == "awq")
        for at_a_time, systems in runs.items():
            for name, repeated in systems.items():
                if name.endswith(kind) and repeated[-1].texts:
                    last = repeated[-1]
                    pairs = list(zip(last.prompts, map(tokens_of, last.texts), strict=True))[:checked]
                    found[at_a_time, name] = max(largest_gap(model, *pair) for pair in pairs)
        del model
        gc.collect()
    return found


def summary(runs: dict[Any, Any], wrong: set[tuple[int, str]]) -> list[dict[str, Any]]:
    """A row for each concurrency and system: medians over the rounds, overhead and the ratio to the peer."""
    rows = []
    for at_a_time, systems in runs.items():
        right = {name: repeated for name, repeated in systems.items() if (at_a_time, name) not in wrong}
        for name, repeated in right.items():
            keys = repeated[0].result.keys()
            row = {key: statistics.median(run.result[key] for run in repeated) for key in keys}

            def against(
                other: str, key: str, own: list[Run] = repeated, known: dict[str, list[Run]] = right
            ) -> float | None:
                if other not in known:
                    return None
                return statistics.median(
                    run.result[key] / base.result[key] for run, base in zip(own, known[other], strict=True)
                )

            slower = against(OFFLINE, "duration_s") if name == "relinear serve awq" else None
            rows.append(
                {
                    "system": name,
                    "max_concurrency": at_a_time,
                    **row,
                    "times_peer": against(PEER, "output_throughput"),
                    "overhead": None if slower is None else slower - 1,
                }
            )
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("tokens/s", "x peer", "overhead", "TTFT ms", "TPOT ms", "ITL 99 %")
    print(f"{'at a time':>9} {'':24}" + "".join(f"{column:>10}" for column in columns))
    for row in rows:
        cells = (
            f"{row['output_throughput']:.1f}",
            _shown(row["times_peer"], "{:.2f}"),
            _shown(row["overhead"], "{:.1%}"),
            *(_shown(row.get(key), "{:.1f}") for key in ("median_ttft_ms", "median_tpot_ms", "p99_itl_ms")),
        )
        busy = " the machine was busy" if row["foreign_load"] > MOST_FOREIGN else ""
        print(f"{row['max_concurrency']:9} {row['system']:24}" + "".join(f"{cell:>10}" for cell in cells) + busy)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=PLANS, default="demo")
    parser.add_argument("--rounds", type=int, help="default: 3, of the 1B shape 2")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--plot", metavar="FILE", help="throughput and latency against concurrency, as SVG")
    arguments = parser.parse_args(argv)
    plan, most = PLANS[arguments.shape], max(arguments.concurrency)
    rounds = arguments.rounds or plan.rounds
    tokens = most * (plan.prompt + plan.new + 2 * BLOCK)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {kind: serve_models.write(arguments.shape, Path(scratch) / kind, kind) for kind in serve_models.KINDS}
        vocabulary = json.loads((folders["awq"] / "config.json").read_text())["vocab_size"]
        with ExitStack() as stack:
            systems: dict[str, System] = {}
            for name, (port, command) in commands(folders, tokens, most).items():
                say(f"starting {name}")
                systems[name] = partial(served, stack.enter_context(Server(command, port)))
            llm = LLM(str(folders["awq"]), max_total_tokens=tokens, max_num_seqs=most)
            systems[OFFLINE] = partial(offline, llm)
            runs = measure(plan, systems, vocabulary, rounds, arguments.concurrency)
        del llm, systems
        found = gaps(folders, runs, plan.checked)
    wrong = {place for place, gap in found.items() if not gap <= TIE}
    for at_a_time, name in sorted(wrong):
        print(f"{name}, {at_a_time} at a time: WRONG: answers are off by {found[at_a_time, name]:.2f} nats")
    rows = summary(runs, wrong)
    print_table(rows)
    say(f"largest gap of a checked token to the likeliest one: {max(found.values()):.3f} nats")
    if arguments.plot:
        names = [name for name in {row["system"]: None for row in rows} if name != OFFLINE]
        named = {name: [row for row in rows if row["system"] == name] for name in names}
        Path(arguments.plot).write_text(comparison_figure(named), encoding="utf-8")
    print_json("serve", shape=arguments.shape, rounds=rounds, prompt=plan.prompt, new=plan.new, table=rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
