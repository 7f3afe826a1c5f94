"""Where recurrent layers keep what they know of a sequence: states of a fixed size, beside the pages of the KV cache.

A *mixer* (Mamba, gated delta rule, short convolution, lightning attention, ...) has no keys. It keeps, per sequence, the
last inputs of its convolution and a recurrent state, and each forward replaces both. ::

    pool[state]  [slots, *shape]      one tensor per state of each mixer; a running sequence owns one slot in all of them

Nothing is initialised, counted or freed here: a sequence that starts never reads its slot, which holds what another left.
A state cannot be shared between sequences as blocks can, nor taken back to an earlier token.

:class:`SequenceStates` is what a mixer sees: an object with the few methods of Transformers' caches that mixers use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from attention.base import AttentionError


class StateKey(NamedTuple):
    """One state: ``kind`` is ``conv`` or ``recurrent``, ``layer`` the model's number of the layer; some have several."""

    kind: str
    layer: int
    number: int = 0


@dataclass(frozen=True)
class StateSpec:
    """The shape and dtype of a state of one sequence."""

    key: StateKey
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MixerSpec:
    """The states of one mixer. ``continues``: it can take several tokens after the first ones; else only one at a time,
    so that a prompt has to be computed in one piece."""

    name: str
    states: tuple[StateSpec, ...]
    continues: bool


def bytes_per_sequence(mixers: Sequence[MixerSpec]) -> int:
    return sum(state.nbytes for mixer in mixers for state in mixer.states)


class Segment(NamedTuple):
    """The rows of one sequence in a packed forward, ``size`` from row ``start`` on. ``fresh``: it has no state yet."""

    slot: int
    start: int
    size: int
    fresh: bool


class StateCache:
    """The states of a whole model, for ``slots`` sequences at once."""

    def __init__(self, mixers: Sequence[MixerSpec], slots: int, device: torch.device | str) -> None:
        self.pool = {
            state.key: torch.empty(slots, *state.shape, dtype=state.dtype, device=device)
            for mixer in mixers
            for state in mixer.states
        }


class SequenceStates:
    """The states of sequences that a mixer computes together, each one token further or one alone.

    States are handed out as copies, which mixers may change in place; :meth:`store` writes them back.
    """

    def __init__(self, cache: StateCache, segments: Sequence[Segment]) -> None:
        self._pool = cache.pool
        self._fresh = segments[0].fresh
        assert len(segments) == 1 or not any(segment.fresh or segment.size > 1 for segment in segments)
        self._slots = [segment.slot for segment in segments]
        self._held: dict[StateKey, Tensor] = {}

    def _get(self, key: StateKey) -> Tensor | None:
        if key not in self._pool:
            raise AttentionError(
                f"a layer asks for its {key.kind} state {key.number} of layer {key.layer}, never recorded"
            )
        if key not in self._held and not self._fresh:
            pool = self._pool[key]
            self._held[key] = pool[torch.tensor(self._slots, device=pool.device)]
        return self._held.get(key)

    def _set(self, key: StateKey, state: Tensor) -> None:
        pool = self._pool[key]
        if state.shape != (len(self._slots), *pool.shape[1:]):
            raise AttentionError(
                f"{key} is {list(state.shape)}, but {[len(self._slots), *pool.shape[1:]]} was recorded"
            )
        self._held[key] = state.to(pool.dtype)

    def store(self) -> None:
        """Write back what the mixer has changed."""
        for key, state in self._held.items():
            pool = self._pool[key]
            pool[torch.tensor(self._slots, device=pool.device)] = state

    # What mixers call ---------------------------------------------------------------------------------------------

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._get(StateKey("conv", layer_idx, state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """The inputs [n, channels, tokens] after those before them; the last of them are kept."""
        key = StateKey("conv", layer_idx, state_idx)
        past = self._get(key)
        width = self._pool[key].shape[-1]
        if past is None:
            inputs = functional.pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        else:
            inputs = torch.cat([past.to(conv_states.dtype), conv_states], dim=-1)
        self._set(key, inputs[..., -width:])
        return inputs

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._get(StateKey("recurrent", layer_idx, state_idx))

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self._set(StateKey("recurrent", layer_idx, state_idx), recurrent_states)
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, state: Tensor) -> None:
        self.update_recurrent_state(state, layer_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    # What mixers read where the cache has no methods to get a state (Transformers 5.17) --------------------------------

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return not self._fresh

    @property
    def layers(self) -> _ByNumber:
        return _ByNumber(self._layer)

    def _layer(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(
            conv_states=_ByNumber(partial(self.get_conv_state, number)),
            recurrent_states=_ByNumber(partial(self.get_recurrent_state, number)),
            record_past=self.is_recording_past(number),
        )


class _ByNumber:
    """``read(number)`` written as ``self[number]``: only what a mixer reads is handed out."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self._read = read

    def __getitem__(self, number: int) -> Any:
        return self._read(number)


class RecordedStates(SequenceStates):
    """Learns the states of a mixer that runs on the meta device, and which of them it uses in a continuation."""

    def __init__(self) -> None:
        self.specs: dict[StateKey, StateSpec] = {}
        self.again = False  # the second call, which continues the first
        self.handed: dict[int, tuple[StateKey, Tensor]] = {}
        self.used: set[StateKey] = set()

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.again

    def _get(self, key: StateKey) -> Tensor | None:
        if not self.again or key not in self.specs:
            return None
        spec = self.specs[key]
        state = torch.empty(1, *spec.shape, dtype=spec.dtype, device="meta")
        self.handed[id(state)] = key, state
        return state

    def _set(self, key: StateKey, state: Tensor) -> None:
        self.specs[key] = StateSpec(key, tuple(state.shape[1:]), state.dtype)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        key = StateKey("conv", layer_idx, state_idx)
        self.used.add(key)
        width = conv_kernel_size or conv_states.shape[-1]
        if not self.again:
            self._set(key, conv_states.new_empty(*conv_states.shape[:-1], width))
        return conv_states if not self.again else functional.pad(conv_states, (width, 0))

    def sees(self, arguments: Sequence[object]) -> None:
        """Note the states among the arguments of an operation."""
        for argument in arguments:
            if isinstance(argument, Tensor) and id(argument) in self.handed:
                self.used.add(self.handed[id(argument)][0])
            elif isinstance(argument, list | tuple):
                self.sees(argument)
