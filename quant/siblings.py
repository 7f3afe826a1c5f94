"""Linear layers that are given the same input, multiplied at once.

The weights of siblings lie behind each other as one weight of all their outputs, which the first one holds. The model's code
is unchanged and calls one layer after the other: the first multiplies, the others find their part done if they are
handed the very tensor that the first one was. Given anything else (an adapter changed it, a hook replaced it) a layer
multiplies by itself, which costs the whole product and gives the same numbers.

Whoever makes siblings knows that their model writes nothing into the input between the calls. A part is handed out
once, and the first layer always multiplies, so no call finds what an earlier forward left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quant.base import QuantWeight

SHARED = ("order", "table", "global_scale", "input_scale", "input_zero")
"""Fields of a weight that all its outputs have in common."""


class Siblings:
    """``multiply`` gives the outputs of all layers, which have ``sizes`` of them, behind each other."""

    def __init__(self, multiply: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> None:
        self.multiply = multiply
        self.sizes = list(sizes)
        self._done: tuple[Tensor, list[Tensor | None]] | None = None
        """An input, and what nobody has asked for yet; replaced as one, for threads."""

    def part(self, index: int, x: Tensor) -> Tensor:
        """The outputs of layer ``index`` for ``x [.., in]``: a slice of a tensor."""
        if index == 0:
            y, *rest = self.multiply(x).split(self.sizes, -1)
            self._done = (x, [None, *rest])
            return y
        done = self._done
        if done is None or done[0] is not x or (found := done[1][index]) is None:
            return self.multiply(x).split(self.sizes, -1)[index]
        done[1][index] = None
        if index == len(self.sizes) - 1:
            self._done = None  # x and the parts need not live longer than the model wants them to
        return found


def joined(weights: Sequence[QuantWeight]) -> QuantWeight | str:
    """One canonical weight of all outputs, in their order; a sentence: why there is none."""
    if len({weight.scheme.block for weight in weights}) > 1 or _torn(weights):
        weights = [_row_by_row(weight) for weight in weights]
    first = weights[0]
    if any(weight.scheme != first.scheme for weight in weights):
        return "their schemes differ"
    if any(weight.shape.in_features != first.shape.in_features for weight in weights):
        return "they have different numbers of inputs"
    if first.scheme.flat and first.shape.in_features % first.scheme.group:
        return f"blocks of {first.scheme.group} weights run on over the ends of rows"
    if any(weight.scale.dtype != first.scale.dtype for weight in weights):
        return "the dtypes of their scales differ"
    for name in SHARED:
        values = [getattr(weight, name) for weight in weights]
        if values[0] is not None and not all(torch.equal(value, values[0]) for value in values):
            return f"their {name} differ"
    zeros = [weight.zero for weight in weights if weight.zero is not None]
    return replace(
        first,
        shape=replace(first.shape, out_features=sum(weight.shape.out_features for weight in weights)),
        q=torch.cat([weight.q for weight in weights]),
        scale=torch.cat([weight.scale for weight in weights]),
        zero=torch.cat(zeros) if zeros else None,
    )


def _torn(weights: Sequence[QuantWeight]) -> bool:
    """Whether a block of outputs would reach from one weight into the next."""
    return any(weight.shape.out_features % weight.scheme.block[0] for weight in weights[:-1])


def _row_by_row(weight: QuantWeight) -> QuantWeight:
    """The same with scales of its own for every output."""
    outputs, inputs = weight.scheme.block
    if outputs == 1:
        return weight

    def rows(blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(outputs, 0)[: weight.shape.out_features]

    zero = None if weight.zero is None else rows(weight.zero)
    return replace(weight, scheme=replace(weight.scheme, block=(1, inputs)), scale=rows(weight.scale), zero=zero)


def joined_bias(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """One bias, zero where a layer has none."""
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    parts = [given[0].new_zeros(n) if bias is None else bias for bias, n in zip(biases, sizes, strict=True)]
    return torch.cat(parts)
