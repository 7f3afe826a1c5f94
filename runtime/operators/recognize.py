"""What a module computes, found out by running it on a few random numbers.

No list of architectures: a candidate (by the shape of its parameters, or the names of its children, which say nothing
yet) is run on the CPU in bfloat16, whose roundings tell apart formulas that are equal in exact arithmetic.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY = "apply_rotary_pos_emb"
"""What modelling code of Transformers calls the function that rotates queries and keys."""


class Norm(NamedTuple):
    """``form``: ``rounded`` multiplies by the weight after rounding to the type of ``x``, ``late`` rounds after it,
    ``one_plus`` is late and adds 1 to the weight."""

    form: str
    eps: float


class Gate(NamedTuple):
    """``activation(gate) * up``. ``joined`` is the name of a layer that gives both, one after the other, or empty."""

    activation: str
    joined: str


def rms_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """The formulas of :class:`Norm`, as models write them."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.form == "rounded":
        return weight * wide.to(x.dtype)
    return (wide * (weight.float() + (1 if norm.form == "one_plus" else 0))).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``q, k [batch, heads, T, D]`` rotated by ``cos, sin [batch, T, D]``, the two halves of D together."""

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return rotated(q), rotated(k)


def _random(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(size))
    return torch.randn(size, generator=generator).bfloat16()


def norm_of(module: nn.Module) -> Norm | None:
    """What this RMS normalisation of the last dimension computes."""
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(parameters) != ["weight"] or not isinstance(eps, float) or module._buffers or module._modules:
        return None
    weight = parameters["weight"]
    if weight.dim() != 1 or not weight.is_floating_point():
        return None
    probe = copy.copy(module)
    other = 1 + _random(len(weight)) / 4
    probe._parameters = {"weight": nn.Parameter(other, requires_grad=False)}
    x = (
        _random(2, 3, len(weight)) * torch.tensor([1, eps**0.5, 30.0]).bfloat16()[:, None]
    )  # in the second row eps counts
    found = _result(lambda: probe(x))
    for form in ("rounded", "late", "one_plus"):
        norm = Norm(form, eps)
        if _same(found, rms_norm(x, other, norm)):
            return norm
    return None


class _Given(nn.Module):
    """Stands for a layer: gives a tensor, and keeps what it was given."""

    def __init__(self, output: Tensor | None = None) -> None:
        super().__init__()
        self.output = output
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return x if self.output is None else self.output


def gate_of(module: nn.Module) -> Gate | None:
    """What this gated MLP computes between its layers, of which the last is ``down_proj``."""
    children = dict(module.named_children())
    layers = {"gate_proj", "up_proj"} if "gate_proj" in children else {"gate_up_proj"}
    if not layers | {"down_proj"} <= children.keys():
        return None
    probe = copy.copy(module)
    gate, up, x = _random(5, 24) * 3, _random(1, 5, 24)[0], _random(5, 1, 1).view(1, 5, 1)
    given = {"down_proj": _Given()} | ({"gate_proj": _Given(gate[None]), "up_proj": _Given(up[None])})
    if "gate_up_proj" in layers:
        given = {"down_proj": _Given(), "gate_up_proj": _Given(torch.cat([gate, up], -1)[None])}
    probe._modules = {**children, **given}
    found = _result(lambda: probe(x))
    if not all(len(each.inputs) == 1 for each in given.values()) or any(given[n].inputs[0] is not x for n in layers):
        return None
    for name, activation in ACTIVATIONS.items():
        if _same(found, (activation(gate) * up)[None]):
            return Gate(name, "gate_up_proj" if "gate_up_proj" in layers else "")
    return None


def rotary_forward(module: nn.Module, rotate: Callable[..., Any]) -> Callable[..., Any] | None:
    """The ``forward`` of this module with ``rotate`` in the place of its own rotary embedding, if that is :func:`rotary`.
    Where the arguments are others than those of :func:`rotary`, ``rotate`` is to call the function given it first."""
    function = _forward_with(type(module), rotate)  # type: ignore[arg-type]
    return None if function is None else types.MethodType(function, module)


@cache
def _forward_with(kind: type[nn.Module], rotate: Callable[..., Any]) -> types.FunctionType | None:
    forward = kind.forward
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(ROTARY)
    q, k, cos, sin = _random(1, 3, 4, 16), _random(1, 2, 4, 16), _random(1, 4, 16), _random(1, 4, 16) / 2
    found = _result(lambda: original(q, k, cos, sin))  # type: ignore[misc]
    if not isinstance(found, tuple) or len(found) != 2 or not all(map(_same, found, rotary(q, k, cos, sin))):
        return None

    def rotated(*arguments: Any, **keywords: Any) -> Any:
        return rotate(original, *arguments, **keywords)

    around = {**forward.__globals__, ROTARY: rotated}
    function = types.FunctionType(forward.__code__, around, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return function


def _result(call: Callable[[], Any]) -> Any:
    try:
        with torch.inference_mode():
            return call()
    except Exception:  # whatever code does that is not what it was taken for
        return None


def _same(found: Any, wanted: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == wanted.dtype and torch.equal(found, wanted)
