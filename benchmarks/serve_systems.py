"""The systems of ``benchmarks.serve``: servers in processes of their own, and the engine without one."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from transformers.utils.import_utils import is_serve_available

from benchmarks.serve_models import text_of
from runtime import LLM, SamplingParams
from runtime.bench import serving_summary
from runtime.bench_client import Target, run_load

PEER = "transformers serve bf16"
START_SECONDS = 180.0
BLOCK = 16
"""Tokens of a block of the peer's cache."""

Load = list[tuple[list[int], int]]
"""Prompts, and how many tokens each is to get."""


class Server:
    """A server in a process of its own, ready when this returns."""

    def __init__(self, command: Sequence[str], port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server
        self.process = psutil.Popen(command, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.log.seek(0)
                raise RuntimeError(f"{' '.join(command)} did not start:\n{self.log.read()[-4000:]}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except psutil.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


@dataclass
class Run:
    """What one system did with one load: the summary of ``bench serving``, and the answers' texts (none offline)."""

    prompts: list[list[int]]
    result: dict[str, Any]
    texts: list[str] = field(default_factory=list)


System = Callable[[Load, int], Run]
"""Does a load, so many requests at a time."""


def served(server: Server, load: Load, concurrency: int) -> Run:
    target = Target(server.url, "vllm", ignore_eos=False)
    answers, seconds = run_load([(text_of(prompt), new) for prompt, new in load], target, concurrency=concurrency)
    for answer, (_, new) in zip(answers, load, strict=True):
        if answer.error or answer.tokens != new:
            raise RuntimeError(f"{server.url}: {answer.error or f'{answer.tokens} tokens, not {new}'}")
    return Run([prompt for prompt, _ in load], serving_summary(answers, seconds), [answer.text for answer in answers])


def offline(llm: LLM, load: Load, concurrency: int) -> Run:
    """As many at a time as the client asks for: answers of one length end together, so a wave follows a wave."""
    started = time.perf_counter()
    for first in range(0, len(load), concurrency):
        wave = load[first : first + concurrency]
        params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for _, new in wave]
        llm.generate([prompt for prompt, _ in wave], params)
    seconds = time.perf_counter() - started
    tokens = sum(new for _, new in load)
    result = {"completed": len(load), "duration_s": seconds, "output_throughput": tokens / seconds}
    return Run([prompt for prompt, _ in load], result)


def commands(folders: dict[str, Path], tokens: int, most: int) -> dict[str, tuple[int, list[str]]]:
    """Of every server: its port and how it is started, with room for ``tokens`` tokens of ``most`` sequences."""
    found = {}
    for kind in ("awq", "bf16"):
        port = free_port()
        arguments = f"serve --port {port} --max-total-tokens {tokens} --max-running-requests {most}".split()
        found[f"relinear serve {kind}"] = (
            port,
            [sys.executable, "-m", "runtime", *arguments, "--model-path", str(folders[kind])],
        )
    if is_serve_available():
        port = free_port()
        arguments = f"--continuous-batching --device cpu --dtype bfloat16 --host 127.0.0.1 --port {port}".split()
        arguments += f"--cb-block-size {BLOCK} --cb-num-blocks {tokens // BLOCK} --cb-max-batch-tokens 2048".split()
        start = "from transformers.cli.transformers import main; main()"
        found[PEER] = (port, [sys.executable, "-c", start, "serve", str(folders["bf16"]), *arguments])
    else:
        print(f"{PEER}: not installed; pip install 'transformers[serving]'", file=sys.stderr)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
