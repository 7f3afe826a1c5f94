"""Recurrent layers of unmodified models, each sequence of a packed forward with its own states.

A mixer of Transformers takes one cache object and knows nothing of packed sequences. So its ``forward`` is answered here:
the rows of a packed forward are handed to it sequence by sequence, those of all decoding sequences stacked as one batch,
each time with a cache object that holds the states of just these (:mod:`attention.states`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention.base import UnsupportedAttention
from attention.call import Original
from attention.states import MixerSpec, RecordedStates, Segment, SequenceStates, StateCache

_METHODS = {"get_conv_state", "get_recurrent_state", "get_linear_cache", "has_previous_state"}
_CACHE_ARGUMENTS = ("cache_params", "past_key_values")


def keeps_state(module: nn.Module) -> bool:
    """Whether this is a mixer: one that asks its cache for a state."""
    methods = (inspect.unwrap(method) for method in vars(type(module)).values() if inspect.isfunction(method))
    return any(_METHODS & set(method.__code__.co_names) for method in methods)


def record(name: str, forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[MixerSpec, Any]:
    """What a mixer on the meta device keeps, and its answer to a first call."""
    states = RecordedStates()
    arguments = _bind(forward, args, kwargs)
    out = _call(forward, arguments, states)
    states.again = True
    with _WatchStates(states):
        _call(forward, arguments, states)
    specs = tuple(states.specs[key] for key in sorted(states.specs))
    return MixerSpec(name, specs, continues=states.used >= set(states.specs)), out


class _WatchStates(TorchFunctionMode):
    """Sees which states enter an operation: one that does not is forgotten by the continuation."""

    def __init__(self, states: RecordedStates) -> None:
        super().__init__()
        self.states = states

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # a shape or a dtype is no use of the values
            self.states.sees([*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))


def serve(
    forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any], cache: StateCache, segments: Sequence[Segment]
) -> Any:
    """The answer of a mixer to a packed call, [1, T, ...], its states read and written."""
    arguments = _bind(forward, args, kwargs)
    total = sum(segment.size for segment in segments)
    decoding = [segment for segment in segments if segment.size == 1 and not segment.fresh]
    groups = [[segment] for segment in segments if segment.size > 1 or segment.fresh]
    out: Any = None
    for group in [decoding, *groups] if decoding else groups:
        states = SequenceStates(cache, group)
        rows = torch.tensor([range(segment.start, segment.start + segment.size) for segment in group])
        part = _call(forward, {name: _take(value, rows, total) for name, value in arguments.items()}, states)
        states.store()
        out = _merge(out, part, rows, total)
    return out


def _bind(forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    variable = [p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    for name in variable:
        arguments |= arguments.pop(name, {})
    cache = [name for name in _CACHE_ARGUMENTS if name in bound.signature.parameters]
    if len(cache) != 1:
        raise UnsupportedAttention("a recurrent layer that takes no cache object is not supported")
    arguments[cache[0]] = None
    return arguments


def _call(forward: Original, arguments: dict[str, Any], states: SequenceStates) -> Any:
    return forward(**{name: states if name in _CACHE_ARGUMENTS else value for name, value in arguments.items()})


def _take(value: Any, rows: Tensor, total: int) -> Any:
    """The rows [n, count] of everything that has a row per token: [1, T, ...] -> [n, count, ...]."""
    if isinstance(value, Tensor) and value.shape[:2] == (1, total):
        return value[0][rows.to(value.device)]
    if isinstance(value, list | tuple):
        return type(value)(_take(item, rows, total) for item in value)
    return value


def _merge(out: Any, part: Any, rows: Tensor, total: int) -> Any:
    """Put the answer for ``rows`` into ``out``, which is made for the first; what has no row per token is left out."""
    if isinstance(part, tuple):
        outs = out if out is not None else (None,) * len(part)
        return tuple(_merge(place, item, rows, total) for place, item in zip(outs, part, strict=True))
    if not isinstance(part, Tensor) or part.shape[:2] != rows.shape:
        return None
    if out is None:
        out = part.new_empty(1, total, *part.shape[2:])
    out[0, rows.to(part.device)] = part
    return out
