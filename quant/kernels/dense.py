"""Dense bfloat16 weights on a CPU: few rows by C (``cpu_dense.c``), many by torch.

The weight stays as it is, so an embedding can share it and nothing is kept twice. torch's own product reads memory at half the
rate that is there, or less where the processor has no instructions for bfloat16.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.kernels.native import Source

SOURCE = Source(Path(__file__).with_name("cpu_dense.c"), "cpu_dense_rows.h")

MOST_ROWS = 16
"""Measured at 8192 x 2048 and 4096 x 576 with AVX512-BF16."""
THREAD_WEIGHTS = 1 << 17
"""Weights that are worth one more thread."""


class _Job(ctypes.Structure):
    """``Job`` of ``cpu_dense.c``; the last two are its own."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "outputs", "inputs")),
        ("packed", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
    ]


def takes(weight: Tensor) -> bool:
    """Whether :func:`linear` has anything to offer for this weight."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and SOURCE.refusal is None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, path: int | None = None) -> Tensor:
    """``x [.., in] @ weight [out, in].T + bias``, for a weight that :func:`takes` accepts. ``path`` is an index in
    :data:`quant.kernels.cpu.PATHS`; ``None``: the widest."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    plain = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] == inputs and weight.is_contiguous()
    if not plain or not 0 < rows <= MOST_ROWS or (bias is not None and bias.dtype != torch.bfloat16):
        return F.linear(x, weight, bias)
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], outputs, dtype=torch.bfloat16)
    address = None if bias is None else bias.data_ptr()
    job = _Job(x.data_ptr(), weight.data_ptr(), address, y.data_ptr(), rows, outputs, inputs)
    threads = min(torch.get_num_threads(), 1 + inputs * outputs // THREAD_WEIGHTS)
    if SOURCE.library.dense(SOURCE.widest if path is None else path, threads, ctypes.byref(job)):
        raise MemoryError(f"no memory to multiply {list(x.shape)} by {list(weight.shape)}")
    return y
