"""The one timer of all benchmarks.

Candidates take turns, so that a slow minute of a shared machine is slow for all; each works its way through copies of its
weights that no cache holds together; a sample during which a thread was kept from its core is dropped; the result is a
median. Reading memory takes its turn too: what it reaches is the bound that the others are compared with.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

T = TypeVar("T")

TASKS = Path("/proc/self/task")
CPU_INFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

MOST_DELAY = 0.02
"""Of a sample's time, spent waiting for a core: more than that and it is dropped."""
FEWEST = 5
"""Samples that make a median."""


@dataclass(frozen=True)
class Timing:
    """``seconds`` is the median; ``spread`` the distance between the quartiles, relative to it; ``disturbed``: it hardly
    ever had the cores to itself."""

    seconds: float
    spread: float
    samples: int
    disturbed: bool


def measure(candidates: Mapping[str, Callable[[], object]], samples: int = 15, limit: float = 60) -> dict[str, Timing]:
    """Times every candidate ``samples`` times, in turns, after one turn that does not count; on a machine too busy for
    that, for ``limit`` seconds."""
    clean: dict[str, list[float]] = {name: [] for name in candidates}
    disturbed: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    stop = time.monotonic() + limit
    while min(map(len, clean.values())) < samples and time.monotonic() < stop:
        for name, call in candidates.items():
            delay, start = _delay(), time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            kept = clean if _delay() - delay <= MOST_DELAY * seconds else disturbed
            kept[name].append(seconds)
    return {name: _summary(clean[name], disturbed[name]) for name in candidates}


def _summary(clean: list[float], disturbed: list[float]) -> Timing:
    busy = len(clean) < FEWEST
    seconds = clean + disturbed if busy else clean
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Timing(median, (high - low) / median, len(seconds), busy)


def _delay() -> float:
    """Seconds for which this process's threads were ready to run and did not; 0 where the system does not tell."""
    return sum(int((task / "schedstat").read_text().split()[1]) for task in TASKS.glob("*")) / 1e9


def in_turn(call: Callable[[T], object], items: Sequence[T]) -> Callable[[], object]:
    """Calls with the next item each time."""
    turns = itertools.cycle(items)
    return lambda: call(next(turns))


def copies_beyond_cache(nbytes: int) -> int:
    """How many copies of something have to take turns for none to be found in a cache."""
    return max(2, -(-_cold_bytes() // nbytes))


@cache
def _cold_bytes() -> int:
    """Twice the largest cache, within reason: at least 256 MB, at most 1 GB."""
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in CACHES.glob("index*/size")]
    return min(max([1 << 28, *(2 * size for size in sizes)]), 1 << 30)


def reader(nbytes: int = 32 << 20) -> Callable[[], object]:
    """A candidate that reads ``nbytes`` of memory."""
    memory = torch.ones(copies_beyond_cache(nbytes), nbytes // 4)
    return in_turn(torch.sum, list(memory))


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    models = [line.partition(":")[2].strip() for line in CPU_INFO.read_text().splitlines() if "model name" in line]
    return {
        "device": models[0] if models else platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str | None:
    """Of these sources, marked if they were changed since; ``None`` outside of a repository."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def print_json(benchmark: str, **result: Any) -> None:
    """The last line of every benchmark."""
    rounded = json.loads(json.dumps(result), parse_float=lambda number: float(f"{float(number):.4g}"))
    print(json.dumps({"benchmark": benchmark, "environment": environment(), **rounded}))
