"""Times work on a CUDA device by its own clock.

Every candidate is captured in a graph with all its copies and repetitions, so that what launching costs the host is no part
of the number; candidates take turns; the result is the median. Copying memory and multiplying matrices say what the device
can do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.timing import Timing

Calls = Sequence[Callable[[], object]]
"""The same work on as many copies of its data, which take turns."""

LEAST_SECONDS = 2e-3
"""Of one sample, by the repetitions that it holds."""


def measure_cuda(candidates: Mapping[str, Calls], samples: int = 11) -> dict[str, Timing]:
    graphs = {name: _capture(calls) for name, calls in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(samples):
        for name, (graph, count) in graphs.items():
            seconds[name].append(_elapsed(graph.replay) / count)
    return {name: _summary(values) for name, values in seconds.items()}


def _capture(calls: Calls) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of some rounds through ``calls``, warmed up, and the number of calls in it."""
    for call in calls:  # compiles, and fills what is allocated once
        call()
    once = _elapsed(lambda: [call() for call in calls])
    rounds = max(1, min(round(LEAST_SECONDS / once), 64 // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return graph, rounds * len(calls)


def _elapsed(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def _summary(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return Timing(median, (high - low) / median, len(seconds), disturbed=False)


def copy_rate() -> float:
    """Bytes per second of copying within the device, read and written counted."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure_cuda({"copy": [lambda: target.copy_(source)]})["copy"].seconds


def matmul_rate() -> float:
    """Operations per second of a large matrix product in bfloat16."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / measure_cuda({"matmul": [lambda: a @ b]})["matmul"].seconds
