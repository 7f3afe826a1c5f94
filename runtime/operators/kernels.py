"""Triton kernels of small operators: one pass over the data each, in float32, rounded where the formulas of
:mod:`runtime.operators.recognize` round.

Where the device can (``Device.early``), a program starts while the launch before it still runs, lets the next do the same,
and waits before it reads what was computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.gpu.device import device_of
from runtime.operators.recognize import Norm

DTYPES = (torch.bfloat16, torch.float16)
"""Not float32, in which results should not depend on a kernel."""


@triton.jit
def rms_norm_kernel(
    x, weight, y, first_stride, second_stride, seconds, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, FORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    inside = i < SIZE
    start = row // seconds * first_stride + row % seconds * second_stride
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    if FORM == "rounded":
        values = values.to(y.dtype.element_ty).to(tl.float32)
    elif FORM == "one_plus":
        w += 1.0
    tl.store(y + row * SIZE + i, (values * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(
    gate, up, y, gate_stride, up_stride, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    g = tl.load(gate + row * gate_stride + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + i, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        inner = g
    else:  # a half of 1 + tanh is the logistic function of twice its argument
        inner = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    g = (g / (1.0 + tl.exp(-inner))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * size + i, (g * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate_rows(
    x, y, head_stride, head, live, c1, c2, s1, s2, i, inside, HALF: tl.constexpr
):  # fmt: skip
    kind: tl.constexpr = y.dtype.element_ty
    rows = head.to(tl.int64)[:, None]
    mask = live[:, None] & inside[None, :]
    first = tl.load(x + rows * head_stride + i[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + rows * head_stride + HALF + i[None, :], mask=mask, other=0.0).to(tl.float32)
    a = (first * c1).to(kind).to(tl.float32) - (second * s1).to(kind).to(tl.float32)
    b = (second * c2).to(kind).to(tl.float32) + (first * s2).to(kind).to(tl.float32)
    target = y + rows * (2 * HALF) + i[None, :]
    tl.store(target, a.to(kind), mask=mask)
    tl.store(target + HALF, b.to(kind), mask=mask)


@triton.jit
def rotary_kernel(
    q, k, cos, sin, q_out, k_out, q_head, q_token, k_head, k_token, cos_token, sin_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_PADDED: tl.constexpr, K_PADDED: tl.constexpr, HALF: tl.constexpr,
    PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    inside = i < HALF
    c1 = tl.load(cos + token * cos_token + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + token * cos_token + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + token * sin_token + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + token * sin_token + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    head = tl.arange(0, Q_PADDED)
    target = q_out + token * (Q_HEADS * 2 * HALF)
    rotate_rows(q + token * q_token, target, q_head, head, head < Q_HEADS, c1, c2, s1, s2, i, inside, HALF)
    head = tl.arange(0, K_PADDED)
    target = k_out + token * (K_HEADS * 2 * HALF)
    rotate_rows(k + token * k_token, target, k_head, head, head < K_HEADS, c1, c2, s1, s2, i, inside, HALF)


def rms_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """``x [.., n]``, of any strides but the last, which is 1; the result is contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.shape[-1]
    rows = x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(-2)  # [a, b, n]; copies what lies in no such way
    first, second, _ = rows.stride()
    padded, early = triton.next_power_of_2(size), device_of(x.device.index).early
    with _on(x.device):
        rms_norm_kernel[(rows.shape[0] * rows.shape[1],)](
            rows, weight, y, first, second, rows.shape[1], norm.eps, SIZE=size, PADDED=padded, FORM=norm.form,
            EARLY=early, num_warps=max(1, min(8, padded // 512)), launch_pdl=early,
        )  # fmt: skip
    return y


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` of ``[.., n]``, whose rows may lie apart."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    size = gate.shape[-1]
    gates, ups = gate.flatten(0, -2), up.flatten(0, -2)
    block, early = 1024, device_of(gate.device.index).early
    with _on(gate.device):
        gated_kernel[(triton.cdiv(size, block), len(gates))](
            gates, ups, y, gates.stride(0), ups.stride(0), size, ACTIVATION=activation, BLOCK=block, EARLY=early,
            num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return y


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``q, k [1, heads, T, D]`` by ``cos, sin [1, T, D]``; what comes back lies in the order ``[1, T, heads, D]``."""
    _, q_heads, tokens, size = q.shape
    k_heads = k.shape[1]
    q_out, k_out = (x.new_empty(1, tokens, x.shape[1], size) for x in (q, k))
    half, early = size // 2, device_of(q.device.index).early
    with _on(q.device):
        rotary_kernel[(tokens,)](
            q, k, cos, sin, q_out, k_out, q.stride(1), q.stride(2), k.stride(1), k.stride(2), cos.stride(1),
            sin.stride(1), Q_HEADS=q_heads, K_HEADS=k_heads, Q_PADDED=triton.next_power_of_2(q_heads),
            K_PADDED=triton.next_power_of_2(k_heads), HALF=half, PADDED=triton.next_power_of_2(half), EARLY=early,
            num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
