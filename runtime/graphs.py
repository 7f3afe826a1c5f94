"""Decoding steps as CUDA graphs: what Python and launches would cost at every step is paid once, when the engine starts. On a
CPU as a list of calls (:mod:`runtime.replay`): what Python would cost is paid the first time.

A step whose chunks all have one token differs from the next only in numbers. So they are written to tensors that stay where
they are, and the forward that reads them is captured once for each of a few batch sizes. A step takes the next larger
size; its rows that are left over compute a token of no sequence, in a *scratch block* that no sequence owns::

    [:, :size] of inputs    ids        7  31   4 |  0
                            positions  9   2  16 |  0
                            slots     57  18  80 | 96    = scratch * block_size; a row for each group of layers
    [:, :size] of tables            3  1  5 |  6         first blocks; a row is as wide as the longest sequence

What captures is handed in: on a CUDA device :class:`CudaCapture`, on a CPU a :class:`StepRecorder`; anything that returns the
function it is given runs the same steps without a graph, on any device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attention.base import AttentionBackend, AttentionBatch
from runtime.config import EngineConfig
from runtime.memory import format_bytes
from runtime.replay import MOST_BYTES, CannotReplay, StepRecorder
from runtime.scheduler import Plan

if TYPE_CHECKING:
    from runtime.runner import Runner

logger = logging.getLogger(__name__)

LARGEST_BATCH = 256
STEP = 8
LARGEST_RECORDED = 16
"""Sequences of a step on a CPU beyond which the time of Python is a small part."""
RESERVED = 256 << 20
"""Bytes for the intermediates of a step and the workspaces of libraries: what the graphs share."""
RESERVED_PER_GRAPH = 16 << 20
RESERVED_PER_LOGIT = 16
"""Each is there in the model's type and in float32, and a sort of it might be."""


class Logits(NamedTuple):
    """What a forward pass says about its rows: ``values`` float32 [rows, vocabulary]; ``verdict`` int64 [2, rows] the
    likeliest tokens, and whether all of a row is finite: one small tensor, for one copy to the host."""

    values: Tensor
    verdict: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Logits:
        values = values.float()
        return cls(values, torch.stack([values.argmax(-1), values.amax(-1).isfinite().long()]))

    def first(self, rows: int) -> Logits:
        return Logits(self.values[:rows], self.verdict[:, :rows])


Step = Callable[[], Logits]
Capture = Callable[[Step], Step]
"""Takes a function that reads and writes tensors that stay, and returns one with the same effect."""
Forward = Callable[[Tensor, Tensor, list[AttentionBatch], Tensor], Logits]
"""``ids`` [1, T], ``positions`` [1, T], the batch of each group of layers, and the rows whose logits are wanted."""


class CudaCapture:
    """Captures on the device of the current stream; the graphs share one pool of memory, the largest should come first."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Step) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles, and makes what libraries make once
            with _waiting_is_an_error():  # found here, before it breaks a capture
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            result = step()
        self._pool = graph.pool()

        def replay() -> Logits:
            graph.replay()
            return result

        return replay


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def choose_capture(
    config: EngineConfig, device: torch.device, backend: AttentionBackend, recurrent: bool, scaled_together: bool
) -> Capture | str:
    """What captures the decoding steps of a model, or why nothing does. ``scaled_together``: inputs of some layers
    have one scale for all tokens of a step."""
    if device.type not in ("cuda", "cpu"):
        return f"they need a CUDA device or a CPU, not {device.type}"
    if config.disable_cuda_graph:
        return "disabled by --disable-cuda-graph"
    if recurrent:
        return "which states a recurrent layer reads is decided on the host"
    if device.type == "cpu":
        return StepRecorder() if config.native else "disabled by --no-native"
    if scaled_together:  # on a CPU every size is recorded, and no row is left over
        return "one scale for the inputs of all tokens would cover the rows that are left over"
    if not backend.capturable:
        return f"{backend.name} attention asks the device for lengths"
    return CudaCapture()


def batch_sizes(most: int) -> list[int]:
    """Sizes to capture for up to ``most`` sequences: 1, 2, 4, multiples of 8, ``most`` itself."""
    most = min(most, LARGEST_BATCH)
    return sorted({size for size in (1, 2, 4, *range(STEP, most, STEP)) if size < most} | {most})


def reserved_bytes(sizes: Sequence[int], vocabulary: int) -> int:
    """What to leave free of the device for graphs of these sizes."""
    return RESERVED + len(sizes) * RESERVED_PER_GRAPH + max(sizes) * vocabulary * RESERVED_PER_LOGIT


def recorded_bytes(spare: int) -> int:
    """What steps that are recorded on a CPU may keep of the memory that the KV cache leaves; prompts need some, too."""
    return min(MOST_BYTES, spare // 2)


def capture_decodes(runner: Runner, capture: Capture | str, most: int, longest: int) -> str:
    """Let ``runner`` decode up to ``most`` sequences of ``longest`` tokens by graphs, if that is possible. What came of it,
    for the report."""
    if runner.factors is not None and not isinstance(capture, str):
        capture = "which rotary factors a sequence takes is decided on the host"
    if isinstance(capture, str):
        return f"none: {capture}"
    recorder = capture if isinstance(capture, StepRecorder) else None
    sizes = list(range(1, min(most, LARGEST_RECORDED) + 1)) if recorder else batch_sizes(most)
    started = time.perf_counter()
    try:
        runner.capture(capture, sizes, longest)
    except CannotReplay as error:
        runner.graphs = None
        return f"none, in a decoding step {error}"
    except Exception as error:  # whatever a model does that no graph can hold; it still runs without
        logger.warning("decoding steps cannot be captured", exc_info=error)
        reason = (str(error).splitlines() or [""])[0][:200]
        return f"none, a decoding step cannot be captured: {type(error).__name__}: {reason}"
    seconds = time.perf_counter() - started
    if recorder:
        return (
            f"decoding steps of up to {sizes[-1]} sequences, recorded when the first of a size comes and replayed then, "
            f"in at most {format_bytes(recorder.most_bytes)}"
        )
    return f"decoding steps of {', '.join(map(str, sizes))} sequences, captured in {seconds:.1f} s"


class DecodeGraphs:
    """A captured forward for each of ``sizes``. ``scratch`` is a block of the cache that no sequence owns, ``blocks`` the
    most that a sequence has. Raises whatever a forward raises that cannot be captured."""

    def __init__(
        self,
        forward: Forward,
        capture: Capture,
        sizes: Sequence[int],
        *,
        block_size: int,
        groups: int,
        scratch: int,
        blocks: int,
        device: torch.device,
    ) -> None:
        self.sizes = sorted(sizes)
        self.block_size, self.scratch = block_size, scratch
        most = self.sizes[-1]
        pinned = device.type == "cuda"
        # Of one size all inputs lie in one piece, so that they are copied at once.
        self._rows_of_inputs = 2 + groups
        self._host_inputs = torch.zeros(self._rows_of_inputs * most, dtype=torch.int64, pin_memory=pinned)
        self._host_tables = torch.full((groups, most, blocks), scratch, dtype=torch.int32, pin_memory=pinned)
        self._inputs, self._tables = self._host_inputs.to(device), self._host_tables.to(device)
        self._written = [[[scratch] for _ in range(most)] for _ in range(groups)]  # in each row of the tables
        self._rows = torch.arange(most + 1, device=device)
        self._starts = self._rows.int()
        self._steps: dict[int, Step] = {}
        for size in reversed(self.sizes):
            self._write([], size)
            self._steps[size] = capture(self._step(forward, size))
        self._steps[self.sizes[0]]()  # what fails only when it runs fails now

    def _step(self, forward: Forward, size: int) -> Step:
        ids, positions, *slots = self._inputs[: self._rows_of_inputs * size].view(-1, size)

        def step() -> Logits:
            lens = (positions + 1).int()
            batches = [
                AttentionBatch(
                    slots=slots_of_group,
                    block_tables=tables[:size],
                    query_starts=self._starts[: size + 1],
                    kv_lens=lens,
                    max_query=1,
                    max_kv=tables.shape[1] * self.block_size,
                )
                for slots_of_group, tables in zip(slots, self._tables, strict=True)
            ]
            return forward(ids[None], positions[None], batches, self._rows[:size])

        return step

    def fits(self, plan: Plan) -> bool:
        """Whether this is a step for :meth:`run`."""
        return len(plan) <= self.sizes[-1] and all(chunk.size == 1 for chunk in plan)

    def run(self, plan: Plan) -> Logits:
        """Logits of every chunk, until the next call: the tensors are the graph's own."""
        size = next(size for size in self.sizes if len(plan) <= size)
        self._write(plan, size)
        return self._steps[size]().first(len(plan))

    def _write(self, plan: Plan, size: int) -> None:
        """Bring what ``size`` rows read to the device. What was copied before has been read: the host has the result."""
        spare = size - len(plan)
        ids = [chunk.request.ids(chunk.start, chunk.stop)[0] for chunk in plan]
        positions = [chunk.start for chunk in plan]
        nothing = [0] * spare
        rows = [*ids, *nothing, *positions, *nothing]
        for group, written in enumerate(self._written):
            held = [chunk.request.blocks[group] for chunk in plan]
            rows += [self._slot(table, chunk.start) for table, chunk in zip(held, plan, strict=True)]
            rows += [self.scratch * self.block_size] * spare
            tables = [*held, *[[self.scratch]] * spare]
            changed = [row for row, table in enumerate(tables) if table != written[row]]
            for row in changed:
                written[row] = list(tables[row])
                self._host_tables[group, row, : len(tables[row])] = torch.tensor(tables[row], dtype=torch.int32)
            if changed:
                self._tables[group, :size].copy_(self._host_tables[group, :size], non_blocking=True)
        inputs = len(rows)
        self._host_inputs[:inputs] = torch.tensor(rows)
        self._inputs[:inputs].copy_(self._host_inputs[:inputs], non_blocking=True)

    def _slot(self, blocks: Sequence[int], position: int) -> int:
        return blocks[position // self.block_size] * self.block_size + position % self.block_size
