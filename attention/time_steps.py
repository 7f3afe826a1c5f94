"""Time steps of Mamba-2 that a configuration bounds, bounded in every forward alike.

A Mamba-2 mixer makes its time steps ``softplus(dt + dt_bias)`` of a part ``dt`` of what ``in_proj`` returns, and keeps them
within ``time_step_limit``. Transformers does so where it computes several tokens, and not where it computes one
(``mamba2_selective_state_update`` takes no limits), so that a token decoded differs from the same token in a prompt. As
softplus rises, its argument can be bounded instead: then one token is computed as many are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def bound_time_steps(mixer: Any) -> None:
    """Let a mixer that has limits keep to them when it computes one token, too."""
    low, high = getattr(mixer, "time_step_limit", None) or (0.0, math.inf)
    if low > 0 or high < math.inf:
        mixer.in_proj.register_forward_hook(lambda module, args, projected: _bounded(mixer, projected, low, high))


def _bounded(mixer: Any, projected: Tensor, low: float, high: float) -> Tensor:
    """``projected`` [n, T, ...], its last numbers, one a head, within what gives ``low`` to ``high``, if T is 1."""
    if projected.shape[1] > 1:
        return projected
    bias = mixer.dt_bias.float()
    dt = projected[..., -bias.shape[0] :].float()
    multiplier: Any = getattr(mixer, "mup_vector", None)  # Falcon-H1 multiplies before it adds the bias
    scale = 1.0 if multiplier is None else multiplier.flatten()[-bias.shape[0] :].float()
    least, most = _argument(low) - bias, _argument(high) - bias
    dt = torch.maximum(torch.minimum(dt * scale, most), least) / scale
    return torch.cat([projected[..., : -bias.shape[0]], dt.to(projected.dtype)], -1)


def _argument(step: float) -> float:
    """What softplus makes ``step`` of."""
    if step <= 0:
        return -math.inf
    return step + math.log(-math.expm1(-step)) if step < math.inf else math.inf
