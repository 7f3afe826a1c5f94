"""Which layer goes wrong first: every decoder layer of the candidate is given what the reference's layer was given.

So an error is the layer's own and not what came from the layers before. What is measured is the layer's update of the hidden
state, not the state itself, which would hide it: the signal-to-quantization-noise ratio ``10 log10(|u|² / |u - u'|²)`` in
decibels. 6 dB is one bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerError:
    """A decoder layer and its SQNR in dB; infinite if both sides agree to the bit, minus infinity if the reference's
    layer does nothing and the candidate's does."""

    name: str
    sqnr: float

    def data(self) -> dict[str, Any]:
        return {"name": self.name, "sqnr_db": self.sqnr if math.isfinite(self.sqnr) else None}


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name: the longest list of modules, which in every decoder of Transformers is that of its layers."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    name = max(lists, key=lambda name: len(lists[name]), default=None)
    return {} if name is None else {f"{name}.{place}": layer for place, layer in enumerate(lists[name])}


class LayerErrors:
    """Collects while the reference runs; ``watching`` costs one more pass of the candidate's layers."""

    def __init__(self, reference: nn.Module, candidate: nn.Module):
        self._pairs = list(zip(decoder_layers(reference).items(), decoder_layers(candidate).values(), strict=True))
        self._signal = [0.0] * len(self._pairs)
        self._noise = [0.0] * len(self._pairs)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(self._hook(place, other), with_kwargs=True)
            for place, ((_, layer), other) in enumerate(self._pairs)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, place: int, other: nn.Module) -> Any:
        dtype = next((p.dtype for p in other.parameters() if p.is_floating_point()), torch.float32)

        def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            theirs = other.forward(*_cast(args, dtype), **_cast(kwargs, dtype))  # no hooks: it may be the same layer
            update, found = (first_output(out).double() - given.double() for out in (output, theirs))
            self._signal[place] += update.square().sum().item()
            self._noise[place] += (update - found).square().sum().item()

        return compare

    def result(self) -> tuple[LayerError, ...]:
        return tuple(
            LayerError(name, _decibels(signal, noise))
            for ((name, _), _), signal, noise in zip(self._pairs, self._signal, self._noise, strict=True)
        )


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def first_output(output: Any) -> Tensor:
    """The hidden states that a layer gives, alone or before others."""
    return output if isinstance(output, Tensor) else output[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors, wherever they are in arguments, in the dtype of the other side."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if type(value) in (tuple, list) else value
