"""Dense linear layers as the engine runs them: several that are given the same input at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.siblings import Siblings, joined_bias


class DenseLinear(nn.Linear):
    """An ``nn.Linear`` that may have siblings. What others see of it (parameters, names, sizes) is unchanged."""

    siblings: Siblings | None = None
    place = 0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.siblings is None else self.siblings.part(self.place, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DenseLinear:
        self.siblings = None  # what moves has memory of its own
        super()._apply(fn, recurse)
        return self


def take_over(layer: nn.Linear) -> DenseLinear:
    """The same layer, object and parameters, as a :class:`DenseLinear`."""
    layer.__class__ = DenseLinear
    return cast(DenseLinear, layer)


@torch.no_grad()
def join_dense(layers: Sequence[nn.Linear]) -> None:
    """Make siblings of layers that are given the same input: their weights become parts of one, in no more memory than
    before."""
    taken = [take_over(layer) for layer in layers]
    sizes = [layer.out_features for layer in taken]
    weight = torch.cat([layer.weight for layer in taken])
    bias = joined_bias([layer.bias for layer in taken], sizes)
    siblings = Siblings(lambda x: F.linear(x, weight, bias), sizes)
    for place, (layer, part) in enumerate(zip(taken, weight.split(sizes), strict=True)):
        layer.weight = nn.Parameter(part, requires_grad=False)
        layer.siblings, layer.place = siblings, place
