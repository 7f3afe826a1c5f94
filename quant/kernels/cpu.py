"""Weights of every kind on a CPU, in C (``cpu_linear.c``), with the widest instructions found when it runs.

Few rows: codes are multiplied as the numbers they mean, scales and zero points applied once a group, everything summed
in float32, so the result is as exact as float32 for any ``x``; only the tables of NF4 and FP4 are rounded to bfloat16, for
bfloat16 ``x``. Many rows: the weight is dequantized a panel at a time, small enough to stay in cache, and multiplied by
torch; for bfloat16 ``x`` the panel is rounded to bfloat16, as a dense weight would be. :data:`PANEL_ROWS` says where one
begins to be faster than the other. No dense copy is ever kept.

Where the layer's inputs are quantized, they are rounded as the reference rounds them (:mod:`quant.activation`). int8 ones
are multiplied as the integers they are by those of the weight, where the processor has AVX512-VNNI: sums of a group are exact,
however many rows. Of all others, what comes back is multiplied.

float16 ``x`` is computed as float32 and rounded once. Gradients do not flow: this is for inference.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from quant.activation import quantize_dequantize
from quant.base import LinearKernel, LinearShape, QuantWeight, Scheme
from quant.kernels.cpu_layout import TILE, TYPES, CpuWeight, Job, prepared
from quant.kernels.native import Source

SOURCE = Source(Path(__file__).with_name("cpu_linear.c"), "cpu_linear_rows.h", "cpu_linear_amx.h", "cpu_linear_vnni.h")

PATHS = ("portable", "avx2", "avx512", "avx512-bf16", "amx")
"""What ``cpu_linear.c`` has code for, in its order."""
AVX512, BF16, AMX = 2, 3, 4
VNNI = 5
"""One more, for quantized inputs; processors have it or not from AVX-512 on."""

PANEL_ROWS = (8, 64, 64, 128)
"""By path: more rows than this go by panels. Measured at 4096 x 4096, as is the next."""
PANEL_ROWS_PER_INPUT = 8
"""With AMX, bfloat16 x goes by panels beyond this many rows for every input of a group: small groups cost more there."""
VNNI_ROWS_WITH_AMX = 64
"""AMX multiplies more rows sooner in bfloat16 than VNNI does in int8, by the peak rates of the two; not measured."""
PANEL_OUTPUTS, PANEL_BYTES = 512, 8 << 20
"""Of one panel, at most: where the product takes least beside what dequantizing takes."""
THREAD_WEIGHTS = 1 << 18
"""Weights that are worth one more thread."""

PIECES = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2}
"""How many bfloat16 it takes to sum up exactly to one value."""


class CpuKernel(LinearKernel):
    """``widest`` of :data:`PATHS` is the last one to be used if the machine has it."""

    name = "cpu"

    def __init__(self, widest: str = PATHS[-1]) -> None:
        self.widest = PATHS.index(widest)

    def __deepcopy__(self, memo: dict[int, object]) -> CpuKernel:
        return self  # the library is loaded once

    @cached_property
    def _path(self) -> int:
        return min(self.widest, SOURCE.widest)

    @cached_property
    def _vnni(self) -> bool:
        return self._path >= AVX512 and bool(SOURCE.library.detect_vnni())

    @property
    def summary(self) -> str:
        threads = "" if ctypes.c_int.in_dll(SOURCE.library, "openmp").value else ", one thread (built without OpenMP)"
        return f"C, {PATHS[self._path]}{', VNNI for int8 inputs' * self._vnni}{threads}"

    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if scheme.flat and shape.in_features % scheme.group:
            return f"multiplies weights whose rows have scales of their own, not {scheme}"
        if sys.byteorder != "little":
            return "reads packed codes as little-endian words, this machine is big-endian"
        return SOURCE.refusal

    def prepare(self, weight: QuantWeight) -> QuantWeight:
        return prepared(weight)

    def apply(self, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, CpuWeight), weight.layout
        if x.device.type != "cpu" or x.dtype not in TYPES or x.shape[-1] != weight.shape.in_features:
            raise ValueError(f"x is {x.dtype} {list(x.shape)} on {x.device}, the weight is {weight.shape} on a CPU")
        dtype, activation = x.dtype, weight.scheme.activation
        if weight.of_integers and self._multiplies_integers(x.numel() // weight.job.inputs):
            y = self._directly(VNNI, x, weight, bias)
            return y if y.dtype == dtype else y.to(dtype)
        if activation is not None:
            x = quantize_dequantize(x, activation, weight.input_scale, weight.input_zero)
        path = self._path_for(x, weight)
        y = self._by_panels(x, weight, bias) if path is None else self._directly(path, x, weight, bias)
        return y if y.dtype == dtype else y.to(dtype)

    def _multiplies_integers(self, rows: int) -> bool:
        return self._vnni and (self._path != AMX or rows <= VNNI_ROWS_WITH_AMX)

    def _path_for(self, x: Tensor, weight: CpuWeight) -> int | None:
        """Index of the path that multiplies so many rows soonest; ``None``: torch does, by panels."""
        rows, bf16 = x.numel() // weight.job.inputs, x.dtype == torch.bfloat16
        if self._path == AMX and rows > 1 and weight.job.group % 32 == 0 and (bf16 or weight.exact_in_bf16):
            return None if bf16 and rows > PANEL_ROWS_PER_INPUT * weight.job.group else AMX
        path = BF16 if bf16 and self._path == BF16 else min(self._path, AVX512)  # where AMX is, BF16 is the slower one
        return path if rows <= PANEL_ROWS[path] else None

    def _directly(self, path: int, x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
        job = Job.from_buffer_copy(weight.job)
        job.pieces = PIECES[x.dtype] if path == AMX else 1
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        y = torch.empty(*x.shape[:-1], job.outputs, dtype=dtype)
        x, bias = _as(x.dtype if path == VNNI else dtype, x), None if bias is None else _as(dtype, bias)
        if path == VNNI:
            _quantize_inputs(job, x, weight)
        job.x, job.y, job.type, job.rows = x.data_ptr(), y.data_ptr(), TYPES[dtype], x.numel() // job.inputs
        job.bias = None if bias is None else bias.data_ptr()
        if job.rows and SOURCE.library.linear(path, _threads(job.inputs * job.outputs), ctypes.byref(job)):
            raise MemoryError(f"no memory to multiply {list(x.shape)} by {weight.shape}")
        return y

    def _by_panels(self, x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
        fast = x.dtype == torch.bfloat16 and self._path >= BF16  # elsewhere torch is slow in bfloat16
        dtype = torch.bfloat16 if fast else torch.float32
        outputs, inputs = weight.shape.out_features, weight.shape.in_features
        y = torch.empty(*x.shape[:-1], outputs, dtype=dtype)
        x, bias = _as(dtype, x.detach()), None if bias is None else _as(dtype, bias.detach())
        width = max(1, min(PANEL_OUTPUTS, outputs, PANEL_BYTES // (inputs * dtype.itemsize)) // TILE) * TILE
        memory = torch.empty(inputs * width, dtype=dtype)
        job = Job.from_buffer_copy(weight.job)
        job.y, job.type = memory.data_ptr(), TYPES[dtype]
        for first in range(0, outputs, width):
            here, tile = slice(first, min(first + width, outputs)), first // TILE
            job.outputs = -(-(here.stop - first) // TILE) * TILE
            job.q, job.scale = weight.q[tile].data_ptr(), weight.scale[tile].data_ptr()
            job.zero = None if weight.zero is None else weight.zero[tile].data_ptr()
            SOURCE.library.dequantize(self._path, _threads(inputs * job.outputs), ctypes.byref(job))
            panel = memory[: inputs * job.outputs].view(inputs, job.outputs)[:, : here.stop - first]
            if bias is None:
                torch.mm(x.view(-1, inputs), panel, out=y.view(-1, outputs)[:, here])
            else:
                torch.addmm(bias[here], x.view(-1, inputs), panel, out=y.view(-1, outputs)[:, here])
        return y


def _quantize_inputs(job: Job, x: Tensor, weight: CpuWeight) -> None:
    """Tell how :func:`quant.activation.quantize_dequantize` rounds ``x``."""
    how, scale = weight.scheme.activation, weight.input_scale
    assert how is not None
    job.input_type, job.input_group = TYPES[x.dtype], how.group or job.inputs
    job.code_type = TYPES[x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)]


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def _threads(weights: int) -> int:
    return min(torch.get_num_threads(), 1 + weights // THREAD_WEIGHTS)
