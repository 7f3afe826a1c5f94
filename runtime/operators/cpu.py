"""The same operators in C (``cpu.c``), with the widest instructions found when it runs. They take what the Triton kernels take,
and float32."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from quant.kernels.native import Source
from runtime.operators.recognize import Norm

SOURCE = Source(Path(__file__).with_name("cpu.c"), "cpu_rows.h")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In the order of ``native.h``."""
FORMS = ("rounded", "late", "one_plus")
ACTIVATIONS = ("silu", "gelu_tanh")
PATHS = ("portable", "avx2", "avx512")
"""What ``cpu.c`` has code for, in its order."""


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y")),
        *((name, ctypes.c_int64) for name in ("type", "form", "rows", "size", "inner", "outer_stride", "inner_stride")),
        ("eps", ctypes.c_float),
    ]


class _Gate(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "y")),
        *((name, ctypes.c_int64) for name in ("type", "activation", "rows", "size", "gate_stride", "up_stride")),
    ]


class _Heads(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("heads", "head_stride", "token_stride")),
    ]


class _Rotary(ctypes.Structure):
    _fields_ = [
        *((name, _Heads) for name in ("q", "k")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("type", "tokens", "half", "cos_stride", "sin_stride")),
    ]


def widest() -> int:
    """Index of the last of :data:`PATHS` that this machine has."""
    return min(SOURCE.widest, len(PATHS) - 1)


def rms_norm(x: Tensor, weight: Tensor, norm: Norm, path: int | None = None) -> Tensor:
    """``x [.., n]``, of any strides but the last, which is 1; the result is contiguous. ``path`` is an index in :data:`PATHS`;
    ``None``: the widest."""
    y = torch.empty(x.shape, dtype=x.dtype)
    rows = x.flatten(0, -3) if x.dim() > 2 else x.view(1, -1, x.shape[-1])  # [a, b, n]; copies what lies in no such way
    outer, inner, size = rows.shape
    job = _Norm(
        x=rows.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), type=DTYPES.index(x.dtype),
        form=FORMS.index(norm.form), rows=outer * inner, size=size, inner=inner, outer_stride=rows.stride(0),
        inner_stride=rows.stride(1), eps=norm.eps,
    )  # fmt: skip
    SOURCE.library.rms_norm(widest() if path is None else path, torch.get_num_threads(), ctypes.byref(job))
    return y


def gated(gate: Tensor, up: Tensor, activation: str, path: int | None = None) -> Tensor:
    """``activation(gate) * up`` of ``[.., n]``, whose rows may lie apart."""
    y = torch.empty(gate.shape, dtype=gate.dtype)
    gates, ups = gate.flatten(0, -2), up.flatten(0, -2)
    job = _Gate(
        gate=gates.data_ptr(), up=ups.data_ptr(), y=y.data_ptr(), type=DTYPES.index(gate.dtype),
        activation=ACTIVATIONS.index(activation), rows=gates.shape[0], size=gates.shape[1],
        gate_stride=gates.stride(0), up_stride=ups.stride(0),
    )  # fmt: skip
    SOURCE.library.gated(widest() if path is None else path, torch.get_num_threads(), ctypes.byref(job))
    return y


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, path: int | None = None) -> tuple[Tensor, Tensor]:
    """``q, k [1, heads, T, D]`` by ``cos, sin [1, T, D]``; what comes back lies in the order ``[1, T, heads, D]``."""
    tokens, size = q.shape[2:]
    q_out, k_out = (torch.empty(1, tokens, x.shape[1], size, dtype=x.dtype) for x in (q, k))
    job = _Rotary(
        q=_Heads(q.data_ptr(), q_out.data_ptr(), q.shape[1], q.stride(1), q.stride(2)),
        k=_Heads(k.data_ptr(), k_out.data_ptr(), k.shape[1], k.stride(1), k.stride(2)),
        cos=cos.data_ptr(), sin=sin.data_ptr(), type=DTYPES.index(q.dtype), tokens=tokens, half=size // 2,
        cos_stride=cos.stride(1), sin_stride=sin.stride(1),
    )  # fmt: skip
    SOURCE.library.rotate(widest() if path is None else path, torch.get_num_threads(), ctypes.byref(job))
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
