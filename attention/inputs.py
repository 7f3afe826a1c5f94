"""Which linear layers of a model are given the very same input, found out by a forward without data.

Such layers (queries, keys and values; gate and up) can be multiplied at once. The forward tells without knowing any
architecture: calls are siblings if they were handed one tensor object that nobody wrote to in between. Since a product of
several layers comes back as slices of one tensor, every linear layer gives such slices here: a model whose code cannot take
them fails now, and has no siblings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class SharedInputs:
    """``siblings``: names of layers with one input in common, in the order of their calls, once the forward is over."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[nn.Module, str] = {
            module: name for name, module in model.named_modules() if type(module) is nn.Linear
        }
        self.calls: list[tuple[str, Tensor, int]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Write down what the layers are given."""
        handles = [layer.register_forward_hook(self._note) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if inputs:
            self.calls.append((self.layers[layer], inputs[0], inputs[0]._version))
        wider = output.new_empty(*output.shape[:-1], output.shape[-1] + 1)
        return wider[..., :-1]

    @property
    def siblings(self) -> list[tuple[str, ...]]:
        times = Counter(name for name, _, _ in self.calls)
        shared: dict[tuple[int, int], list[str]] = {}
        for name, x, version in self.calls:  # which keeps every input alive, so that no two have one id
            if times[name] == 1:  # a layer that is called twice has no place in the order
                shared.setdefault((id(x), version), []).append(name)
        return [tuple(group) for group in shared.values() if len(group) > 1]
