"""Decoding steps on a CPU without Python: what a step calls is written down once and called again.

A step runs through a hundred modules a layer deep in Python and comes to a few calls of C and of torch, which differ from
those of the next step in nothing but the numbers in the tensors that :mod:`runtime.graphs` keeps in their places. So the
first step of a batch size is recorded: every operator of torch by a dispatch mode, every call of C by
:mod:`quant.kernels.native`. Its intermediate tensors stay, and a replay makes the same calls on them::

    views, and memory that is only allocated     nothing to do: they stay
    operators with an ``out`` variant            that, to the tensor that the recorded call made
    others that make a tensor                    again, and a copy to that tensor
    operators that write to their arguments      again

What a recording cannot know makes it fail, and the step runs as it is: numbers that Python reads, shapes that depend on
numbers, tensors written to that are not the step's own. Before it is trusted, a recording is replayed with its tensors full
of NaN and has to give the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant.kernels import native
from runtime.memory import format_bytes

if TYPE_CHECKING:
    from runtime.graphs import Logits, Step

MOST_BYTES = 256 << 20
"""Of intermediate tensors that all recorded steps may keep, where there is as much."""

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
READ_BY_HOST = {aten.resolve_conj.default, aten.resolve_neg.default}
"""What ``tolist`` and ``numpy`` call first."""
DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class CannotReplay(Exception):
    """What in a step is not the same each time."""


class StepRecorder:
    """Makes of a step one that records itself the first time it runs, or, if that is not possible, runs as it is. The first
    step of all fails then instead, so that whoever asked for replays knows. What they all keep takes ``most_bytes`` at most."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._works = False

    def __call__(self, step: Step) -> Step:
        replay: Step | None = None

        def run() -> Logits:
            nonlocal replay
            if replay is not None:
                return replay()
            try:
                replay = self._recorded(step)
            except CannotReplay:
                if not self._works:
                    raise
                replay = step
            return replay()

        return run

    def _recorded(self, step: Step) -> Step:
        recording = Recording(self.most_bytes - self.nbytes)
        result = recording.of(step)
        wanted = [tensor.clone() for tensor in result]
        recording.spoil()
        recording.replay()
        if not all(map(_same_bits, result, wanted)):
            raise CannotReplay("its replay computes something else")
        self.nbytes += recording.nbytes
        self._works = True

        def replay() -> Logits:
            recording.replay()
            return result

        return replay


class Recording(TorchDispatchMode):
    """The calls of a function, in order, and the tensors that they made: no more than ``most_bytes`` of them."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        super().__init__()
        self.most_bytes = most_bytes
        self.nbytes = 0
        self.calls: list[Callable[[], Any]] = []
        self.made: dict[int, Tensor] = {}  # one of each storage
        self._kept: list[Any] = []

    def of(self, step: Step) -> Logits:
        """Run ``step`` and record it."""
        token = native.watcher.set(self._note_native)
        try:
            with self:
                return step()
        finally:
            native.watcher.reset(token)

    def replay(self) -> None:
        """The same calls, on what the tensors of others hold now."""
        for call in self.calls:
            call()

    def spoil(self) -> None:
        """Make everything NaN that a replay has to compute."""
        for tensor in self.made.values():
            if tensor.is_floating_point():
                memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                memory.fill_(torch.nan)

    def _note_native(self, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
        # A job may be changed for the next call.
        jobs = (getattr(argument, "_obj", None) for argument in arguments)
        copies = [
            argument if job is None else ctypes.byref(type(job).from_buffer_copy(job))
            for argument, job in zip(arguments, jobs, strict=True)
        ]
        self.calls.append(partial(_native_again, function, *copies))

    def __torch_dispatch__(
        self, operator: OpOverload, types: Any, arguments: Sequence[Any] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        _require_fixed(operator, arguments)
        schema = operator._schema
        if not schema.is_mutable and _out_variant(operator) is None:
            with self:  # of the operators that it consists of, most have an `out` variant
                result = operator.decompose(*arguments, **keywords)
            if result is not NotImplemented:
                return result
        result = operator(*arguments, **keywords)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = {_storage(leaf) for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)}
        new = [tensor for tensor in tensors if _storage(tensor) not in given]
        if operator is aten.detach_.default or (not schema.is_mutable and not new):
            return result
        self._kept.append(result)  # the memory of views is that of others
        for tensor in new:
            self._keep(tensor)
        if schema.is_mutable:
            self._require_own(operator, arguments, keywords)
            self.calls.append(partial(operator, *arguments, **keywords))
        elif operator not in ALLOCATIONS:
            self.calls.append(_again(operator, arguments, keywords, tensors))
        return result

    def _keep(self, tensor: Tensor) -> None:
        if _storage(tensor) in self.made:
            return
        self.made[_storage(tensor)] = tensor
        self.nbytes += tensor.untyped_storage().nbytes()
        if self.nbytes > self.most_bytes:
            raise CannotReplay(
                f"what has to stay takes more memory than the {format_bytes(self.most_bytes)} left for it"
            )

    def _require_own(self, operator: OpOverload, arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
        for place, argument in enumerate(operator._schema.arguments):
            if argument.is_write:
                value = arguments[place] if place < len(arguments) else keywords.get(argument.name)
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor) and _storage(tensor) not in self.made:
                        raise CannotReplay(f"{operator} writes to a tensor that outlives the step")


def _require_fixed(operator: OpOverload, arguments: Sequence[Any]) -> None:
    """Raise :class:`CannotReplay` if Python learns something about numbers."""
    if operator is aten.index.Tensor and not any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
    ):
        return
    # What is given no tensor, as when types are promoted, knows no numbers.
    asked = any(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments))
    tells = asked and any("Tensor" not in str(returned.type) for returned in operator._schema.returns)
    if tells or operator in READ_BY_HOST or not DATA_DEPENDENT.isdisjoint(operator.tags):
        raise CannotReplay(f"{operator} tells Python what a tensor holds")
    if torch.Tag.inplace_view in operator.tags and operator is not aten.detach_.default:
        raise CannotReplay(f"{operator} changes the shape of a tensor that recorded calls have")


@cache
def _out_variant(operator: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """The overload that takes the same, and tensors for its results under these names."""
    wanted = [(argument.name, str(argument.type)) for argument in operator._schema.arguments]
    packet = operator.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        taken = overload._schema.arguments
        outs = tuple(argument.name for argument in taken if argument.is_out)
        same = [(argument.name, str(argument.type)) for argument in taken if not argument.is_out] == wanted
        if same and outs and len(outs) == len(operator._schema.returns):
            return overload, outs
    return None


def _again(
    operator: OpOverload, arguments: Sequence[Any], keywords: dict[str, Any], results: Sequence[Tensor]
) -> Callable[[], Any]:
    if operator is aten._to_copy.default:
        return partial(aten.copy_.default, results[0], arguments[0])
    if (variant := _out_variant(operator)) is not None:
        overload, names = variant
        return partial(overload, *arguments, **keywords, **dict(zip(names, results, strict=True)))

    def again() -> None:
        for result, value in zip(results, tree_leaves(operator(*arguments, **keywords)), strict=True):
            result.copy_(value)

    return again


def _native_again(function: Callable[..., int], *arguments: Any) -> None:
    if function(*arguments):
        raise MemoryError("no memory for a recorded step")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same_bits(found: Tensor, wanted: Tensor) -> bool:
    if found.is_floating_point():  # NaN equals nothing
        found, wanted = found.view(torch.int32), wanted.view(torch.int32)
    return torch.equal(found, wanted)
