"""Prefill and decode of the whole engine against what a user would pick instead, in one run.

    python -m benchmarks.engine [--models demo 1b 135m] [--rounds 3] [--peers NAME ...] [--python PACKAGE=PYTHON ...]

Peers (``benchmarks.engine_peers``) take turns, each in a process of its own that is stopped while the others run: relinear with
the AWQ checkpoint, as it is, with every layer by itself (--no-fuse --no-native) and with inputs and head rounded to int8
(--activation-quantization, --lm-head-quantization), relinear with the bf16 one, Transformers with both, llama.cpp with its own
4-bit file, vLLM with both. A peer that is not installed is named with the line that installs
it; ``--python vllm=.../bin/python`` names the Python of an environment that has it.

Measured are a prompt of 512 tokens until its first new token; decoding after a prompt of 128, by 1, 2, 4 and 8 sequences; 8
requests of 128 tokens from end to end; the load and the most memory that the process ever had, with pages of mapped files.
Numbers are medians over the rounds. Beside them stands the bound: decoding cannot be faster than reading the weights once a
step at the bandwidth that this run measured, prefill not faster than its multiplications at the rate measured for bf16.
A peer whose greedy answers are not the model's, by more than rounding can tip, gets no number and fails the run; llama.cpp's
file is another quantization, so its answers have nothing to be compared with.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch.nn import functional as F

from benchmarks import random_llama
from benchmarks.answers import ROUNDED_TIE, TIE, largest_gap, plain_model
from benchmarks.engine_peers import PEERS
from benchmarks.pythons import add_python_argument, has_package, python_of
from benchmarks.serve_models import random_prompts
from benchmarks.timing import measure, print_json, reader
from runtime.checkpoint import locate

PREFILL, PROMPT, NEW, BATCHES = 512, 128, 64, (1, 2, 4, 8)
END_TO_END = "8 requests"
METRICS = ("prefill", *(f"decode {batch}" for batch in BATCHES), END_TO_END)
SHOWN = ("prefill", "decode 1", "decode 8", END_TO_END)
BASELINE, OURS, GGUF_SOURCE = "transformers bf16", "runtime", "bf16"
ROOT = Path(__file__).parents[1]


class PeerFailed(RuntimeError):
    """Says what it printed last."""


class Worker:
    """A peer that has loaded and waits to be asked. ``paths`` are of the checkpoints; a GGUF file is added if it is needed,
    beside bf16's."""

    def __init__(self, peer: str, paths: dict[str, Path], pythons: list[str]):
        kind, python = PEERS[peer].checkpoint, python_of(PEERS[peer].package, pythons)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        if kind not in paths:
            self._convert(kind, paths, python)
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.engine_peers", peer, str(paths[kind])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        self.loaded = self._answer()
        self.peak = 0

    def _convert(self, kind: str, paths: dict[str, Path], python: str) -> None:
        path = paths[GGUF_SOURCE].with_name(f"{paths[GGUF_SOURCE].name}.{kind}")
        quantization = kind.partition(".")[0].upper()
        convert = [python, "-m", "benchmarks.gguf_llama", str(paths[GGUF_SOURCE]), str(path), quantization]
        if subprocess.run(convert, cwd=ROOT, check=False, stdout=self.log, stderr=self.log).returncode:
            self._fail()
        paths[kind] = path

    def _fail(self) -> NoReturn:
        self.log.seek(0)
        raise PeerFailed(self.log.read()[-2000:].strip().rpartition("\n")[2])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._fail()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def generate(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the new tokens."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        self.process.send_signal(signal.SIGCONT)
        answer = self._answer()
        self.process.send_signal(signal.SIGSTOP)  # some poll while they wait
        if [len(row) for row in answer["tokens"]] != [new] * len(prompts):
            raise PeerFailed(f"it gave {[len(row) for row in answer['tokens']]} tokens, not {new} each")
        self.peak = answer["peak"]
        return answer["seconds"], answer["tokens"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def tokens_per_second(worker: Worker, vocabulary: int) -> dict[str, float]:
    """One sample of every metric."""

    def seconds(batch: int, length: int, new: int) -> float:
        return worker.generate(random_prompts(batch, length, vocabulary, seed=batch), new)[0]

    rates = {"prefill": PREFILL / seconds(1, PREFILL, 1)}
    for batch in BATCHES:
        first, whole = seconds(batch, PROMPT, 1), seconds(batch, PROMPT, NEW)
        rates[f"decode {batch}"] = batch * (NEW - 1) / (whole - first)
    rates[END_TO_END] = BATCHES[-1] * NEW / whole
    return rates


def ceilings() -> tuple[float, float]:
    """Bytes a second read from memory, and bf16 multiply-adds a second, measured now."""
    size, width = 64 << 20, 2048
    weight, x = (torch.randn(width, width, dtype=torch.bfloat16) for _ in range(2))
    timings = measure({"read": reader(size), "multiply": lambda: F.linear(x, weight)})
    return size / timings["read"].seconds, width**3 / timings["multiply"].seconds


def folders(model: str, scratch: Path) -> dict[str, Path]:
    """The checkpoint of each kind."""
    if model == "demo":
        bundled = {"awq": locate("demo"), "bf16": locate("demo-bf16")}
        return {kind: Path(shutil.copytree(path, scratch / kind)) for kind, path in bundled.items()}
    return {
        kind: random_llama.write(random_llama.SHAPES[model], scratch / kind, quantized=kind == "awq")
        for kind in ("awq", "bf16")
    }


def available(peers: Sequence[str], pythons: list[str]) -> list[str]:
    """Those whose package is installed; the others are named."""
    found = []
    for name in peers:
        peer = PEERS[name]
        if has_package(python_of(peer.package, pythons), peer.package):
            found.append(name)
        else:
            print(f"{name} is left out, {peer.package} is not installed: {peer.install}", file=sys.stderr)
    return found


def gaps(kind: str, folder: Path, answers: dict[str, tuple[list[list[int]], list[list[int]]]]) -> dict[str, float]:
    """By how many nats an answer's tokens are less likely than the likeliest (:func:`largest_gap`), of each peer."""
    model = plain_model(folder, kind == "awq")
    found = {
        peer: max(largest_gap(model, *pair) for pair in zip(*asked, strict=True))
        for peer, asked in answers.items()
        if PEERS[peer].checkpoint == kind
    }
    del model
    gc.collect()
    return found


def run(model: str, peers: Sequence[str], pythons: list[str], rounds: int, scratch: Path) -> dict[str, Any]:
    """Measure one model and print its table."""
    paths = folders(model, scratch)
    vocabulary = json.loads((paths["bf16"] / "config.json").read_text())["vocab_size"]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    answers, rates = {}, []
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in peers:
            try:
                worker = stack.enter_context(Worker(name, paths, pythons))
                for batch, length in ((1, PREFILL), (BATCHES[-1], PROMPT)):
                    prompts = random_prompts(batch, length, vocabulary, seed=batch)
                    answers[name] = prompts, worker.generate(prompts, 4)[1]
            except PeerFailed as error:
                if PEERS[name].package == OURS:
                    raise
                print(f"{model}: {name} is left out: {error}", file=sys.stderr)
                continue
            workers[name] = worker
            print(f"{model}: {name} is ready", file=sys.stderr)
        for number in range(rounds):
            rates.append(ceilings())
            for name, worker in workers.items():
                samples[name].append(tokens_per_second(worker, vocabulary))
            print(f"{model}: round {number + 1} of {rounds} is done", file=sys.stderr)
    bandwidth, multiply = (statistics.median(column) for column in zip(*rates, strict=True))
    found = {name: gap for kind in ("awq", "bf16") for name, gap in gaps(kind, paths[kind], answers).items()}
    wrong = {name: gap for name, gap in found.items() if not gap <= (ROUNDED_TIE if PEERS[name].rounds else TIE)}
    for name, gap in wrong.items():
        print(f"{model}: {name} is WRONG: answers are off by {gap:.2f} nats")
    linear = linear_weights(paths["bf16"])
    nbytes = {name: step_bytes(workers, name, linear) for name in workers}
    rows = {
        name: {
            "rates": {metric: statistics.median(sample[metric] for sample in samples[name]) for metric in METRICS},
            "bounds": {"prefill": multiply / linear}
            | {f"decode {batch}": batch * bandwidth / nbytes[name] for batch in BATCHES},
            "step_bytes": nbytes[name],
            "load": worker.loaded["load"],
            "peak": worker.peak,
        }
        for name, worker in workers.items()
        if name not in wrong
    }
    result = {"bandwidth": bandwidth, "multiply_adds": multiply, "weights": linear, "wrong": wrong, "peers": rows}
    print_table(model, result)
    return result


def linear_weights(bf16: Path) -> int:
    """Weights that multiply: all but the norms. The embedding is the head's as well."""
    stored = sum(file.stat().st_size for file in bf16.glob("*.safetensors"))
    return stored // torch.bfloat16.itemsize


def step_bytes(workers: dict[str, Worker], peer: str, linear: int) -> int:
    """Bytes of weights that one decoding step reads: as the peer tells, or one with the same checkpoint, or all in bf16."""
    alike = [peer, *(name for name in workers if PEERS[name].checkpoint == PEERS[peer].checkpoint)]
    told = (workers[name].loaded["step_bytes"] for name in alike)
    return next((nbytes for nbytes in told if nbytes), linear * torch.bfloat16.itemsize)


def print_table(model: str, result: dict[str, Any]) -> None:
    print(
        f"\n{model}: {result['weights'] / 1e6:.0f} M weights; read {result['bandwidth'] / 1e9:.1f} GB/s, "
        f"bf16 {2 * result['multiply_adds'] / 1e12:.2f} TFLOP/s"
    )
    print(
        f"{'tokens/s (x ' + BASELINE + ', of bound)':<40}" + "".join(f"{m:>24}" for m in SHOWN) + "    load s  peak GiB"
    )
    baseline = result["peers"].get(BASELINE, {}).get("rates", {})
    for name, row in result["peers"].items():
        cells = []
        for metric in SHOWN:
            rate, bound = row["rates"][metric], row["bounds"].get(metric)
            notes = [f"{rate / baseline[metric]:.2f}x"] if baseline else []
            notes += [f"{rate / bound:3.0%}"] if bound else []
            cells.append(f"{rate:.1f} ({', '.join(notes)})")
        print(
            f"{name:<40}" + "".join(f"{cell:>24}" for cell in cells) + f"{row['load']:10.1f}{row['peak'] / 2**30:10.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("demo", *random_llama.SHAPES), default=["demo", "135m", "1b"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    add_python_argument(parser)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    peers = available(arguments.peers, arguments.python)
    results = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = run(name, peers, arguments.python, arguments.rounds, Path(scratch))
    print_json("engine", models=results)
    return 1 if any(result["wrong"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
