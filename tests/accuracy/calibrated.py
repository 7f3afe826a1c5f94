"""GPTQ and AWQ of our own, each in its plainest form: what a quantizer gains that has seen inputs.

GPTQ (arXiv 2210.17323): columns one after the other, the error of each made up for in those that follow, by the inverse
Hessian of the inputs of the unquantized model. AWQ (arXiv 2306.00978): inputs of a norm's linears scaled by a power of their
mean magnitude, the power searched by the error of the outputs; no clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from quant.base import LinearShape, QuantWeight, Scheme
from quant.packing import pack_stream
from quant.reference import dequantize
from tests.accuracy.rounding import integer_grid, quantize

DAMPING = 0.01
BLOCK = 32
"""Columns whose errors reach the others together; only speed depends on it."""
POWERS = [power / 10 for power in range(11)]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model that quantizers take: not the output head."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not name.endswith("lm_head")
    }


@torch.inference_mode()
def inputs_of(model: nn.Module, windows: Sequence[list[int]]) -> dict[str, Tensor]:
    """The inputs ``[tokens, in]`` of every linear layer over some windows of tokens."""
    seen: dict[str, list[Tensor]] = {}

    def keep(_: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        seen.setdefault(name, []).append(args[0].flatten(0, -2))

    handles = [layer.register_forward_pre_hook(partial(keep, name=name)) for name, layer in linears(model).items()]
    for ids in windows:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@torch.inference_mode()
def gptq(weight: Tensor, scheme: Scheme, shape: LinearShape, inputs: Tensor) -> QuantWeight:
    """A weight ``[out, in]`` of a scheme of integers, no act-order."""
    bits, group = scheme.kind.bits, scheme.group
    left = weight.float().clone()
    hessian = (inputs.T @ inputs).double()
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    spread = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    codes, scales, zeros = torch.empty_like(left, dtype=torch.uint8), [], []
    for start in range(0, shape.in_features, group):
        scale, zero = integer_grid(left[:, start : start + group], bits, scheme.zero_point)
        scales.append(scale)
        zeros.append(zero)
        for block in range(start, start + group, BLOCK):
            end = min(block + BLOCK, start + group)
            errors = torch.empty(shape.out_features, end - block)
            for column in range(block, end):
                code = ((left[:, column : column + 1] / scale).round() + zero).clamp(0, 2**bits - 1)
                codes[:, column] = code[:, 0].to(torch.uint8)
                error = (left[:, column] - ((code - zero) * scale)[:, 0]) / spread[column, column]
                left[:, column + 1 : end] -= error[:, None] * spread[column, column + 1 : end]
                errors[:, column - block] = error
            left[:, end:] -= errors @ spread[block:end, end:]
    zeros_of = torch.cat(zeros, 1).to(torch.uint8) if scheme.zero_point else None
    return QuantWeight(scheme, shape, pack_stream(codes, bits), torch.cat(scales, 1).half(), zeros_of)


@torch.inference_mode()
def scale_for_awq(model: nn.Module, inputs: dict[str, Tensor], scheme_of: Callable[[LinearShape], Scheme]) -> None:
    """Scale the norms of a Llama and the linears behind them in place: the same function, easier to round."""
    for number, layer in enumerate(model.model.layers):
        for norm, parts in norms_and_linears(layer):
            name = next(name for name, linear in linears(model).items() if linear is parts[0])
            x = inputs[name][::8]
            weights = [linear.weight for linear in parts]
            assert number == int(name.split(".")[2])
            factors = min(
                (_factors(x, power) for power in POWERS), key=lambda factors: _error(x, weights, factors, scheme_of)
            )
            norm.weight /= factors
            for linear in parts:
                linear.weight *= factors


def norms_and_linears(layer: nn.Module) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """The norms of a Llama layer, each with the linears that take its output."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ]


def _factors(x: Tensor, power: float) -> Tensor:
    factors = x.abs().mean(0).clamp(min=1e-4) ** power
    return factors / (factors.max() * factors.min()).sqrt()


def _error(x: Tensor, weights: Sequence[Tensor], factors: Tensor, scheme_of: Callable[[LinearShape], Scheme]) -> float:
    total = 0.0
    for weight in weights:
        shape = LinearShape(weight.shape[1], weight.shape[0])
        rounded = dequantize(quantize(weight * factors, scheme_of(shape), shape)) / factors
        total += (x @ (rounded - weight).T).square().sum().item()
    return total
