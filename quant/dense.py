"""Dense linear layers as the engine runs them: by the fastest product there is, and several with one input at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.kernels import dense
from quant.siblings import Siblings, joined_bias


class DenseLinear(nn.Linear):
    """An ``nn.Linear`` that the engine took over. What others see of it (parameters, names, sizes) is unchanged. For
    inference: no gradients flow where C multiplies."""

    native = False
    """Whether C may multiply."""
    siblings: Siblings | None = None
    place = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.siblings is not None:
            return self.siblings.part(self.place, x)
        return _multiply(x, self.weight, self.bias, self.native)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DenseLinear:
        self.siblings = None  # what moves has memory of its own
        super()._apply(fn, recurse)
        self.native = self.native and dense.takes(self.weight)
        return self


def take_over(layer: nn.Linear) -> DenseLinear:
    """The same layer, object and parameters, as a :class:`DenseLinear`."""
    layer.__class__ = DenseLinear
    return cast(DenseLinear, layer)


@torch.no_grad()
def join_dense(layers: Sequence[DenseLinear]) -> None:
    """Make siblings of layers that are given the same input: their weights become parts of one, in no more memory than
    before."""
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    bias = joined_bias([layer.bias for layer in layers], sizes)
    native = all(layer.native for layer in layers)
    siblings = Siblings(lambda x: _multiply(x, weight, bias, native), sizes)
    for place, (layer, part) in enumerate(zip(layers, weight.split(sizes), strict=True)):
        layer.weight = nn.Parameter(part, requires_grad=False)
        layer.siblings, layer.place = siblings, place


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, native: bool) -> Tensor:
    return dense.linear(x, weight, bias) if native else F.linear(x, weight, bias)
