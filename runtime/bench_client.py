"""The load of ``relinear bench serving``: streams over plain HTTP on threads, timed by the client."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tqdm import tqdm

from runtime.errors import Error

PATHS = {"sglang": "/generate", "vllm": "/v1/completions"}
TIMEOUT_SECONDS = 600


@dataclass
class Answer:
    """Seconds to the first piece (``first``), between pieces (``gaps``) and to the end, as the client saw them."""

    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


def run_load(
    load: Sequence[tuple[list[int], int]],
    url: str,
    backend: str,
    *,
    model: str | None,
    api_key: str | None,
    rate: float,
    concurrency: int,
    seed: int,
) -> tuple[list[Answer], float]:
    """Send every ``(prompt, tokens to generate)``; the answers and how long all of it took. Requests arrive as a Poisson
    process of ``rate`` a second, at most ``concurrency`` at a time."""
    if urlsplit(url).scheme != "http" or concurrency < 1 or not rate > 0:
        raise Error("bench serving needs an http:// URL, a positive rate and at least one request at a time.")
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    chance, lock = random.Random(seed), threading.Lock()
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool, tqdm(total=len(load), desc="requests", disable=None) as bar:

        def one(prompt: list[int], new: int) -> Answer:
            answer = _ask(url, PATHS[backend], _body(backend, prompt, new, model), headers)
            answer.tokens = new if answer.error is None else 0
            with lock:
                bar.update()
            return answer

        futures = []
        for prompt, new in load:
            futures.append(pool.submit(one, prompt, new))
            if rate != float("inf"):
                time.sleep(chance.expovariate(rate))
        answers = [future.result() for future in futures]
    return answers, time.perf_counter() - started


def _body(backend: str, prompt: list[int], new: int, model: str | None) -> dict[str, object]:
    if backend == "sglang":
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        return {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    named = {"model": model} if model else {}
    return {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True, **named}


def _ask(url: str, path: str, body: dict[str, object], headers: dict[str, str]) -> Answer:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
    answer = Answer()
    started = last = time.perf_counter()
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"HTTP {response.status}: {response.read(500).decode(errors='replace')}"
            return answer
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now = time.perf_counter()
            if line.startswith(b'data: {"error"'):
                answer.error = line.decode(errors="replace").strip()
            if answer.first:
                answer.gaps.append(now - last)
            else:
                answer.first = now - started
            last = now
    except (OSError, http.client.HTTPException) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    answer.seconds = time.perf_counter() - started
    return answer
