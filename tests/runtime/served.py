"""A real server in a process of its own, and what tests ask of it."""

from __future__ import annotations

import json
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

CHAT_TEMPLATE = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
GREEDY = {"prompt": "def main():\n", "max_tokens": 12, "temperature": 0}
LONG = {"prompt": "import os\n", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
START_SECONDS = 60.0
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Given to every call over http: without one, each would read all certificates of this machine first, for 20 ms."""
COUNT_TASKS = """
import asyncio, gc, os, signal
def count(*_):
    os.write(2, b"frozen: %d\\ntasks: %d\\n" % (gc.get_freeze_count(), len(asyncio.all_tasks())))
signal.signal(signal.SIGUSR1, count)
"""


class Served:
    """``relinear serve`` on a free port. ``wait=False`` does not wait until the model is loaded; ``faulty`` is Python that
    runs in the process first."""

    def __init__(self, *flags: str, model: str = "demo", wait: bool = True, faulty: str = ""):
        self.folder = tempfile.TemporaryDirectory()
        template = Path(self.folder.name) / "template.jinja"
        template.write_text(CHAT_TEMPLATE)
        arguments = ["serve", "--model-path", model, "--port", "0", "--dtype", "float32"]
        if "--chat-template" not in flags:
            arguments += ["--chat-template", str(template)]
        code = f"import sys\n{COUNT_TASKS}\n{faulty}\nfrom runtime.cli import main\nsys.exit(main({[*arguments, *flags]!r}))"
        self._log = Path(self.folder.name) / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
        self.url = self._await(r"listening: (https?://[^\s;]+)")
        if wait:
            self._await(r"(ready):")

    def _await(self, pattern: str) -> str:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if found := re.search(pattern, self.log):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} from the server:\n{self.log}")

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **{"verify": PLAIN, **options})

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **{"verify": PLAIN, **options})

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = re.findall(rf"^relinear:{name}(?:{{.*}})? (\S+)$", self.get("/metrics").text, re.MULTILINE)
        return sum(map(float, lines))

    def until_idle(self, seconds: float = 10.0) -> None:
        """Wait until no block is held and nothing runs or waits."""
        end = time.monotonic() + seconds
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while any(self.metric(name) for name in names):
            assert time.monotonic() < end, f"not idle: {[(name, self.metric(name)) for name in names]}"
            time.sleep(0.05)

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def tasks(self) -> int:
        """Tasks of the event loop."""
        before = self.log.count("\ntasks: ")
        self.process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + 10
        while self.log.count("\ntasks: ") == before:
            assert time.monotonic() < end, "the event loop does not run"
            time.sleep(0.01)
        return int(re.findall(r"^tasks: (\d+)$", self.log, re.MULTILINE)[-1])

    @property
    def frozen(self) -> int:
        """Objects that the garbage collector no longer looks at."""
        assert self.tasks
        return int(re.findall(r"^frozen: (\d+)$", self.log, re.MULTILINE)[-1])

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        """Send a signal and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what takes a moment, as the end of a task does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of the server-sent events, without the end mark."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def read_stream(server: Served, body: dict[str, Any], into: list[dict[str, Any]]) -> threading.Thread:
    """Read a stream to its end on a thread of its own; returns once its first event is there."""

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            for piece in events(response):
                into.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    while not into and thread.is_alive():
        time.sleep(0.01)
    return thread


def raw(server: Served, content: bytes, seconds: float = 2.0) -> socket.socket:
    """A connection on which this has been sent."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=seconds)
    connection.sendall(content)
    return connection


def post_bytes(fields: dict[str, Any]) -> bytes:
    content = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + content
