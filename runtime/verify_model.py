"""A whole loaded model against Transformers with dequantized weights, in float32: logits, every decoder layer, every linear.

One model is in memory. It runs once as it serves (kernels, paged attention), once as the reference: Transformers' eager
attention, and every quantized layer multiplies by its weight as read from the file, dequantized for that one call. In the
reference run each kernel is given the same inputs as the dense product, so that a wrong layer is found by itself, whatever
came before; hidden states after each decoder layer find what is no linear layer. Inputs are not quantized here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from attention.base import AttentionError, UnsupportedAttention
from attention.hf import NAME as PAGED
from attention.hf import prepare, read_layers
from attention.registry import select
from quant.kernels.native import build
from quant.reference import linear
from runtime.errors import LoadError
from runtime.linear_plan import ModulePlan
from runtime.loader import load
from runtime.one_sequence import OneSequence
from runtime.plan import ABSORBED
from runtime.weights import StoredWeights

LARGEST_KL = 1e-6
"""Mean, in nats: what float32 leaves of it is a hundred times smaller."""
LARGEST_DISTANCE = 1e-4
"""Root mean square of a difference as a share of the value, of a hidden state or of a layer's output. float32 has 6e-8; sums of
thousands of products and a hundred layers make 1e-5 of it at most, a wrong scale 1e-2."""


@dataclass
class Comparison:
    """``kl`` mean and ``largest_kl`` in nats over ``tokens`` positions; ``top1`` the share of equal likeliest tokens;
    ``logits`` the largest difference; ``hidden`` and ``linears`` the distances by name, in the order of execution."""

    attention: str
    tokens: int = 0
    kl: float = torch.inf
    largest_kl: float = torch.inf
    top1: float = 0.0
    logits: float = torch.inf
    hidden: dict[str, float] = field(default_factory=dict)
    linears: dict[str, float] = field(default_factory=dict)

    @property
    def first_bad_linear(self) -> str | None:
        return _first_bad(self.linears)

    @property
    def first_bad_layer(self) -> str | None:
        return _first_bad(self.hidden)

    @property
    def passed(self) -> bool:
        same = self.kl < LARGEST_KL and self.top1 == 1.0
        return same and self.first_bad_linear is None and self.first_bad_layer is None


@torch.inference_mode()
def compare(weights: StoredWeights, ids: list[int], attention_backend: str | None = None) -> Comparison:
    """Run ``ids`` both ways, with the attention that the engine would choose or the one asked for by name. The plan of
    ``weights`` must be in float32. Raises :class:`LoadError` if the model cannot be loaded."""
    plan = weights.plan
    assert plan.dtype == torch.float32, plan.dtype
    try:
        layers = read_layers(plan.config, plan.trust_remote_code)
        plan = plan.dequantizing(layers.absorbed, ABSORBED)
        backend = select(layers.attention, plan.device, attention_backend, build).backend
        pages = OneSequence(layers, backend, plan.device, plan.dtype)
        found = Comparison(f"{backend.name}, paged")
    except UnsupportedAttention as error:
        if attention_backend is not None:
            raise LoadError(str(error)) from error
        pages, found = None, Comparison(f"Transformers', the engine cannot serve this model: {error}")
    except AttentionError as error:
        raise LoadError(str(error)) from error
    model = load(plan, "eager" if pages is None else PAGED).model
    tokens = torch.tensor([ids], device=plan.device)
    with _hidden_states(model) as ours:
        if pages is None:
            served = model(tokens, use_cache=False).logits[0]
        else:
            prepare(model)
            served = pages.logits(model, tokens[0])
            cast(Any, model).set_attn_implementation("eager")
    with _hidden_states(model) as theirs, _dequantized(model, weights, found.linears):
        truth = model(tokens, use_cache=False).logits[0]
    found.hidden = {name: _distance(ours[name], theirs[name]) for name in theirs}
    _judge_logits(found, served, truth)
    return found


def _judge_logits(found: Comparison, served: Tensor, truth: Tensor) -> None:
    p, q = truth.double().log_softmax(-1), served.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    found.tokens = len(kl)
    found.kl, found.largest_kl = _finite(kl.mean()), _finite(kl.max())
    found.top1 = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    found.logits = _finite((served.double() - truth.double()).abs().max())


def _finite(value: Tensor) -> float:
    """NaN as infinity, which every bound refuses."""
    return value.nan_to_num(nan=torch.inf, posinf=torch.inf).item()


def _distance(ours: Tensor, theirs: Tensor) -> float:
    size = theirs.double().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return _finite((ours.double() - theirs.double()).square().mean().sqrt() / size)


def _first_bad(distances: dict[str, float]) -> str | None:
    return next((name for name, distance in distances.items() if distance > LARGEST_DISTANCE), None)


@contextmanager
def _hidden_states(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What each decoder layer returns, by name: those of the longest list of modules."""
    states: dict[str, Tensor] = {}
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    prefix, layers = max(lists, key=lambda pair: len(pair[1]), default=("", nn.ModuleList()))

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    handles = [layer.register_forward_hook(keep(f"{prefix}.{place}")) for place, layer in enumerate(layers)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _dequantized(model: nn.Module, weights: StoredWeights, distances: dict[str, float]) -> Iterator[None]:
    """Quantized layers answer with the reference product of the weight in the file; how far their kernel is from that for the
    same inputs goes to ``distances``."""

    def replaced(planned: ModulePlan) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            truth = linear(inputs[0], weights.quantized(planned), weights.bias(planned))
            distances[planned.name] = max(distances.get(planned.name, 0.0), _distance(output, truth))
            return truth

        return hook

    layers = [planned for planned in weights.plan.quantized if not planned.shape.lookup]
    handles = [model.get_submodule(planned.name).register_forward_hook(replaced(planned)) for planned in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
