"""The load of ``relinear bench serving``: streams over plain HTTP, timed by the client.

The client often shares its cores with the server it measures. So while requests run it only notes what arrived when, on
one event loop; what the bytes say is read once the clock has stopped.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from runtime.errors import Error

PATHS = {"sglang": "/generate", "vllm": "/v1/completions"}
TIMEOUT_SECONDS = 600
FOREVER = float("inf")

Prompt = str | list[int]


@dataclass
class Answer:
    """Seconds to the first piece (``first``), between pieces (``gaps``) and to the end, as the client saw them; ``text``
    and the number of ``tokens`` as the server says, or else as many as were asked for."""

    tokens: int = 0
    text: str = ""
    first: float = 0.0
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Target:
    """Where requests go: an ``http://`` URL, and which of :data:`PATHS` it serves. ``ignore_eos`` is an extension of
    OpenAI's API that servers may refuse. Raises :class:`Error`."""

    url: str
    backend: str = "sglang"
    model: str | None = None
    api_key: str | None = None
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme != "http":
            raise Error(f"bench serving needs an http:// URL, not {self.url!r}.")

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def request(self, prompt: Prompt, new: int) -> bytes:
        """A whole HTTP request for a stream of ``new`` tokens."""
        parts = urlsplit(self.url)
        body = json.dumps(self._body(prompt, new)).encode()
        headers = {
            "host": parts.netloc.rpartition("@")[2],
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        path = parts.path.rstrip("/") + PATHS[self.backend]
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode() + body

    def _body(self, prompt: Prompt, new: int) -> dict[str, Any]:
        if self.backend == "sglang":
            sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": self.ignore_eos}
            asked = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
            return {**asked, "sampling_params": sampling, "stream": True}
        named = {"model": self.model} if self.model else {}
        extension = {"ignore_eos": True} if self.ignore_eos else {}
        return {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, **extension, **named}


def run_load(
    load: Sequence[tuple[Prompt, int]], target: Target, *, concurrency: int, rate: float = FOREVER, seed: int = 1
) -> tuple[list[Answer], float]:
    """Send every ``(prompt, tokens to generate)``; the answers and how long all of it took. Requests arrive as a Poisson
    process of ``rate`` a second, at most ``concurrency`` at a time."""
    if concurrency < 1 or not rate > 0:
        raise Error("bench serving needs a positive rate and at least one request at a time.")
    started = time.perf_counter()
    transcripts = asyncio.run(_send(load, target, concurrency, rate, random.Random(seed)))
    seconds = time.perf_counter() - started
    answers = [transcript.answer(new) for transcript, (_, new) in zip(transcripts, load, strict=True)]
    return answers, seconds


async def _send(
    load: Sequence[tuple[Prompt, int]], target: Target, concurrency: int, rate: float, chance: random.Random
) -> list[Transcript]:
    room = asyncio.Semaphore(concurrency)
    with tqdm(total=len(load), desc="requests", disable=None) as bar:

        async def one(request: bytes) -> Transcript:
            async with room:
                transcript = await _ask(target.address, request)
            bar.update()
            return transcript

        tasks = []
        for prompt, new in load:
            tasks.append(asyncio.create_task(one(target.request(prompt, new))))
            if rate != FOREVER:
                await asyncio.sleep(chance.expovariate(rate))
        return await asyncio.gather(*tasks)


async def _ask(address: tuple[str, int], request: bytes) -> Transcript:
    transcript = Transcript(request)
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await asyncio.get_running_loop().create_connection(lambda: transcript, *address)
            await transcript.complete.wait()
    except (OSError, TimeoutError) as error:
        transcript.failure = f"{type(error).__name__}: {error}".rstrip(": ")
    return transcript


class Transcript(asyncio.Protocol):
    """One request, and what came back when."""

    def __init__(self, request: bytes):
        self.request = request
        self.raw = bytearray()
        self.arrivals: list[tuple[int, float]] = []  # (bytes until then, time)
        self.started = self.ended = time.perf_counter()
        self.complete = asyncio.Event()
        self.failure: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.raw += data
        self.arrivals.append((len(self.raw), time.perf_counter()))

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = time.perf_counter()
        self.failure = self.failure or (None if error is None else f"{type(error).__name__}: {error}")
        self.complete.set()

    def answer(self, new: int) -> Answer:
        """What was said; ``new`` tokens, if the server does not say how many."""
        answer = Answer(seconds=self.ended - self.started, error=self.failure)
        head, _, _ = bytes(self.raw).partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        body = b"".join(piece for _, piece in self._body())
        if answer.error is None and status != [b"200"]:
            answer.error = (
                f"HTTP {(status or [b'without an answer'])[0].decode()}: {body[:500].decode(errors='replace')}"
            )
        if answer.error is None:
            try:
                self._read_events(answer, new)
            except (ValueError, LookupError, TypeError) as error:
                answer.error = f"not a stream of events as expected: {type(error).__name__}: {error}"
        return answer

    def _read_events(self, answer: Answer, new: int) -> None:
        times: list[float] = []
        count: int | None = None
        for when, event in self._events():
            if event.get("error"):
                answer.error = json.dumps(event["error"])
                return
            if "meta_info" in event:  # SGLang's rows are cumulative
                before, count = count or 0, event["meta_info"]["completion_tokens"]
                grown = count > before
                answer.text = event.get("text") or ""
            else:
                piece = "".join(choice.get("text") or "" for choice in event["choices"])
                answer.text += piece
                grown, count = bool(piece), (event.get("usage") or {}).get("completion_tokens", count)
            if grown:
                times.append(when)
        if not times:
            answer.error = "the stream had no text"
            return
        answer.tokens = new if count is None else count
        answer.first = times[0] - self.started
        answer.gaps = [later - earlier for earlier, later in itertools.pairwise(times)]

    def _events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Server-sent events with the time when the last byte of each had come."""
        line = b""
        for when, piece in self._body():
            *whole, rest = piece.split(b"\n")
            for part in whole:
                line += part
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield when, json.loads(data)
                line = b""
            line += rest

    def _body(self) -> Iterator[tuple[float, bytes]]:
        """The parts of the body with the time when each had come, without the frames of a chunked one."""
        raw = bytes(self.raw)
        head, separator, _ = raw.partition(b"\r\n\r\n")
        place = len(head) + len(separator)
        chunked = re.search(rb"(?im)^transfer-encoding:\s*chunked", head)
        ends = [end for end, _ in self.arrivals]
        while place < len(raw):
            if chunked:
                start = raw.find(b"\r\n", place) + 2
                size = int(raw[place : start - 2].split(b";")[0] or b"0", 16) if start > 1 else 0
                if not size:
                    return
                stop, place = start + size, start + size + 2
            else:
                start, stop = place, ends[bisect.bisect_right(ends, place)]
                place = stop
            yield self.arrivals[min(bisect.bisect_left(ends, stop), len(ends) - 1)][1], raw[start:stop]
