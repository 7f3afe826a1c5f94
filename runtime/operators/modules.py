"""Puts the kernels in the place of modules that were recognised. Where a call is not what a kernel takes, the module's own
code runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from runtime.operators.recognize import ACTIVATIONS, Gate, Norm


class Kernels(Hashable, Protocol):
    """A module with kernels, for tensors of these types on one kind of device."""

    @property
    def DTYPES(self) -> tuple[torch.dtype, ...]: ...  # noqa: N802
    def rms_norm(self, x: Tensor, weight: Tensor, norm: Norm) -> Tensor: ...
    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor: ...
    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...


def use_norm(module: nn.Module, norm: Norm, kernels: Kernels) -> None:
    own = module.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        if len(arguments) != 1 or keywords:  # a gate, perhaps
            return own(*arguments, **keywords)
        (x,), weight = arguments, module.weight
        assert isinstance(weight, Tensor)
        if x.dtype != weight.dtype or x.dtype not in kernels.DTYPES or x.stride(-1) != 1:
            return own(x)
        return kernels.rms_norm(x, weight, norm)

    module.forward = forward


def use_gate(module: nn.Module, gate: Gate, kernels: Kernels) -> None:
    own = module.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        if len(arguments) != 1 or keywords:
            return own(*arguments, **keywords)
        (x,), layers = arguments, cast(Any, module)
        if gate.joined:
            first, second = getattr(layers, gate.joined)(x).chunk(2, -1)
        else:
            first, second = layers.gate_proj(x), layers.up_proj(x)
        if first.dtype not in kernels.DTYPES or first.stride(-1) != 1 or second.stride(-1) != 1:
            return layers.down_proj(ACTIVATIONS[gate.activation](first) * second)
        return layers.down_proj(kernels.gated(first, second, gate.activation))

    module.forward = forward


def rotate(
    kernels: Kernels,
    original: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *others: Any,
    **named: Any,
) -> Any:
    """``original``, unless it is asked for what the kernel computes."""
    usual = not others and named.get("unsqueeze_dim", 1) == 1 and named.keys() <= {"unsqueeze_dim"}
    if (
        not usual
        or not q.dim() == k.dim() == 4
        or not q.shape[0] == k.shape[0] == cos.shape[0] == 1
        or not q.shape[-1] == k.shape[-1] == cos.shape[-1]
        or not q.shape[2] == k.shape[2] == cos.shape[1]
        or not q.dtype == k.dtype == cos.dtype == sin.dtype
        or q.dtype not in kernels.DTYPES
        or not q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
    ):
        return original(q, k, cos, sin, *others, **named)
    return kernels.rotary(q, k, cos, sin)
