"""Weights of 2 to 4 bits on a CPU, in C (``cpu_int4.c``), with the widest instructions found when it runs.

Few rows, or a machine with AMX: codes are multiplied as the integers they are, scales and zero points applied once a
group, everything summed in float32, so the result is as exact as float32 for any ``x``. Many rows without AMX: the weight
is dequantized a panel at a time, small enough to stay in cache, and multiplied by torch; for bfloat16 ``x`` the panel is
rounded to bfloat16, as a dense weight would be. No dense copy of the weight is ever kept.

float16 ``x`` is computed as float32 and rounded once. Gradients do not flow: this is for inference.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.base import LinearKernel, LinearShape, QuantWeight, Scheme
from quant.kernels import native
from quant.packing import unpack_stream

PATHS = ("portable", "avx2", "avx512", "avx512-bf16", "amx")
"""What ``cpu_int4.c`` has code for, in its order."""
AVX512, BF16, AMX = 2, 3, 4

PANEL_ROWS = (16, 32, 32, 48)
"""By path: more rows than this go by panels."""
PANEL_BYTES = 1 << 20
THREAD_WEIGHTS = 1 << 18
"""Weights that are worth one more thread."""

TILE = 32
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PIECES = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2}
"""How many bfloat16 it takes to sum up exactly to one value."""


class _Job(ctypes.Structure):
    """``Job`` of ``cpu_int4.c``; ``work`` is its own."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "scale", "zero", "order", "x", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("type", "scale_type", "rows", "pieces")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "group", "padded")),
        ("work", ctypes.c_int64 * 4),
    ]


@cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    here = Path(__file__).parent
    try:
        return native.load(here / "cpu_int4.c", here / "cpu_int4_rows.h")
    except native.CannotBuild as error:
        return str(error)


class CpuKernel(LinearKernel):
    """``widest`` of :data:`PATHS` is the last one to be used if the machine has it."""

    name = "cpu"

    def __init__(self, widest: str = PATHS[-1]) -> None:
        self.widest = PATHS.index(widest)

    @cached_property
    def _native(self) -> ctypes.CDLL:
        library = _library()
        assert not isinstance(library, str), library
        return library

    @cached_property
    def _path(self) -> int:
        return min(self.widest, self._native.detect())

    @property
    def summary(self) -> str:
        threads = "" if ctypes.c_int.in_dll(self._native, "openmp").value else ", one thread (built without OpenMP)"
        return f"C, {PATHS[self._path]}{threads}"

    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if scheme.kind.bits > 4:
            return f"multiplies weights of up to 4 bits, not {scheme.kind.value}"
        if sys.byteorder != "little":
            return "reads packed codes as little-endian words, this machine is big-endian"
        library = _library()
        return library if isinstance(library, str) else None

    def prepare(self, weight: QuantWeight) -> QuantWeight:
        bits, outputs, inputs = weight.scheme.kind.bits, weight.shape.out_features, weight.shape.in_features
        group, padded = _group(weight)
        groups, tiles = -(-inputs // group), -(-outputs // TILE)
        rows = tiles * TILE - outputs
        centre = 8 - 2 ** (bits - 1)  # moves codes of 2 and 3 bits to the middle of 4

        codes = F.pad(unpack_stream(weight.q, bits, inputs) + centre ^ 8, (0, groups * group - inputs, 0, rows))
        codes = F.pad(codes.view(-1, groups, group), (0, padded - group)).view(tiles, 2, TILE // 2, groups, -1, 8)
        words = codes[..., [0, 4, 1, 5]] | codes[..., [2, 6, 3, 7]] << 4  # [.., 4], the bytes of a word
        q = _in_huge_pages(words.permute(0, 3, 1, 4, 2, 5))

        def tiled(blocks: Tensor) -> Tensor:
            rows_of_scales = blocks.repeat_interleave(weight.scheme.block[0], 0)[:outputs]
            return F.pad(rows_of_scales, (0, 0, 0, rows)).view(tiles, TILE, groups).transpose(1, 2).contiguous()

        zero = None if weight.zero is None else tiled(weight.zero + centre)
        return replace(weight, q=q, scale=tiled(weight.scale), zero=zero, layout="cpu-int4")

    def apply(self, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
        shape = weight.shape
        if x.device.type != "cpu" or x.dtype not in TYPES or x.shape[-1] != shape.in_features:
            raise ValueError(f"x is {x.dtype} {list(x.shape)} on {x.device}, the weight is {shape} on a CPU")
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        rows = x.detach().reshape(-1, shape.in_features).to(dtype).contiguous()
        bias = None if bias is None else bias.detach().to(dtype).contiguous()
        y = rows.new_empty(len(rows), shape.out_features)
        path = self._path_of(rows, weight)
        if path < AMX and len(rows) > PANEL_ROWS[path]:
            self._by_panels(rows, weight, bias, y)
        elif len(rows):
            job = _job(weight, y, x=rows.data_ptr(), rows=len(rows), pieces=PIECES[x.dtype], outputs=shape.out_features)
            job.bias = None if bias is None else bias.data_ptr()
            if self._native.linear(path, _threads(shape.in_features * shape.out_features), ctypes.byref(job)):
                raise MemoryError(f"no memory to multiply {list(rows.shape)} by {shape}")
        return y.view(*x.shape[:-1], shape.out_features).to(x.dtype)

    def _path_of(self, rows: Tensor, weight: QuantWeight) -> int:
        if self._path < AMX:
            return min(self._path, BF16 if rows.dtype == torch.bfloat16 else AVX512)
        return AMX if len(rows) > 1 and _group(weight)[0] % 32 == 0 else AVX512  # where AMX is, BF16 is the slower one

    def _by_panels(self, rows: Tensor, weight: QuantWeight, bias: Tensor | None, y: Tensor) -> None:
        outputs, inputs = weight.shape.out_features, weight.shape.in_features
        if self._path < BF16:  # torch is slow in bfloat16 there
            rows, bias = rows.float(), None if bias is None else bias.float()
        width = max(1, PANEL_BYTES // (inputs * rows.itemsize * TILE)) * TILE
        memory = rows.new_empty(inputs * width)
        for first in range(0, outputs, width):
            last = min(first + width, outputs)
            columns = -(-(last - first) // TILE) * TILE
            panel = memory[: inputs * columns].view(inputs, columns)
            job = _job(weight, panel, first // TILE, outputs=columns)
            self._native.dequantize(self._path, _threads(inputs * columns), ctypes.byref(job))
            y[:, first:last] = F.linear(rows, panel[:, : last - first].T, None if bias is None else bias[first:last])


def _group(weight: QuantWeight) -> tuple[int, int]:
    """Inputs in a group, and the same rounded up to whole words."""
    group = min(weight.scheme.group, weight.shape.in_features)
    return group, -(-group // 8) * 8


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy that takes less time to find in memory: a tenth of all at one row."""
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _threads(weights: int) -> int:
    return min(torch.get_num_threads(), 1 + weights // THREAD_WEIGHTS)


def _job(weight: QuantWeight, y: Tensor, first_tile: int = 0, **fields: int) -> _Job:
    """What the C needs to know to make ``y`` from the tiles of ``weight`` from the first one on."""

    def tiles(tensor: Tensor) -> int:
        return tensor.data_ptr() + first_tile * tensor.stride(0) * tensor.itemsize

    group, padded = _group(weight)
    return _Job(
        q=tiles(weight.q),
        scale=tiles(weight.scale),
        zero=None if weight.zero is None else tiles(weight.zero),
        order=None if weight.order is None else weight.order.data_ptr(),
        y=y.data_ptr(),
        type=TYPES[y.dtype],
        scale_type=TYPES[weight.scale.dtype],
        inputs=weight.shape.in_features,
        group=group,
        padded=padded,
        **fields,
    )
