"""From the scheme that was planned by headers to the one that values show."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quant.base import BadCheckpoint, LinearShape, QuantWeight, Scheme


def settled(
    scheme: Scheme, shape: LinearShape, q: Tensor, scale: Tensor, zero: Tensor | None, order: Tensor | None
) -> QuantWeight:
    """The weight with the simplest scheme that its tensors allow.

    A plan is made before values are read and expects the harder case: zero points that all turn out to be the middle, or
    an order that turns out to be natural, are dropped. A kernel that takes a scheme takes a simpler one. The other way
    round, a checkpoint contradicts its configuration.
    """
    middle = 2 ** (scheme.kind.bits - 1)
    if zero is not None and bool((zero == middle).all()):
        zero = None
    if zero is not None and not scheme.zero_point:
        other = int((zero != middle).sum())
        raise BadCheckpoint(
            f"{other} of {zero.numel()} zero points are not {middle}, but quantization_config says that the weights are "
            "symmetric (sym: true). If they are not, set sym: false."
        )
    scheme = replace(scheme, zero_point=zero is not None, act_order=order is not None)
    return QuantWeight(scheme, shape, q, scale, zero, order)
