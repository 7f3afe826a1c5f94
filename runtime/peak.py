"""How much memory something takes while it runs, measured.

On a CPU: what the process holds beyond pages of files, which the system drops when memory is short, and which a mapped
checkpoint consists of; sampled by a thread. On a GPU: what torch's allocator hands out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

STATUS = Path("/proc/self/status")
INTERVAL = 0.005
"""Seconds between samples."""


@dataclass
class Peak:
    """``growth``: bytes at the peak beyond those at the start; ``None``: the system does not tell."""

    growth: int | None = None


@contextmanager
def measure_peak(device: torch.device) -> Iterator[Peak]:
    """Measures until the block ends, then sets ``growth``."""
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.growth = torch.cuda.max_memory_allocated(device) - before
        return
    start = _status("RssAnon")
    if start is None:
        yield peak
        return
    largest, done = start, threading.Event()

    def sample() -> None:
        nonlocal largest
        while not done.wait(INTERVAL):
            largest = max(largest, _status("RssAnon") or 0)

    sampler = threading.Thread(target=sample, name="memory sampler", daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
    peak.growth = max(largest, _status("RssAnon") or 0) - start


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes, where the system tells; else the present one."""
    return _status("VmHWM") or int(psutil.Process().memory_info().rss)


def _status(field: str) -> int | None:
    """A size that Linux tells of this process, in bytes."""
    if not STATUS.is_file():
        return None
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")), None)
    return int(line.split()[1]) * 1024 if line else None
