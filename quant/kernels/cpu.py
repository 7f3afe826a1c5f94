"""Weights of every kind on a CPU, in C (``cpu_linear.c``), with the widest instructions found when it runs.

Few rows: codes are multiplied as the numbers they mean, scales and zero points applied once a group, everything summed
in float32, so the result is as exact as float32 for any ``x``; only the tables of NF4 and FP4 are rounded to bfloat16, for
bfloat16 ``x``. Many rows: the weight is dequantized a panel at a time, small enough to stay in cache, and multiplied by
torch; for bfloat16 ``x`` the panel is rounded to bfloat16, as a dense weight would be. :data:`PANEL_ROWS` says where one
begins to be faster than the other. No dense copy is ever kept.

A code takes 4 bits or 8, whichever it fits into. Where the layer's inputs are quantized, they are rounded as the reference
rounds them (:mod:`quant.activation`). int8 ones are multiplied as the integers they are by those of the weight, where the
processor has AVX512-VNNI: sums of a group are exact, however many rows. Of all others, what comes back is multiplied.

float16 ``x`` is computed as float32 and rounded once. Gradients do not flow: this is for inference.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass, fields
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.activation import quantize_dequantize
from quant.base import Activation, LinearKernel, LinearShape, QuantWeight, Scheme, WeightKind
from quant.kernels import native
from quant.packing import CACHED_WORDS, E2M1_VALUES, pack_stream, unpack_stream

PATHS = ("portable", "avx2", "avx512", "avx512-bf16", "amx")
"""What ``cpu_linear.c`` has code for, in its order."""
AVX512, BF16, AMX = 2, 3, 4
VNNI = 5
"""One more, for quantized inputs; processors have it or not from AVX-512 on."""
LARGEST_GROUP = 1 << 16
"""Inputs under one scale: more products of 8 bits might not fit into a sum of 32."""

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

TILE = 32
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALE_TYPES = {**TYPES, torch.float8_e4m3fn: 3, torch.float8_e8m0fnu: 4}
NIBBLE_INTEGERS, NIBBLE_TABLE, BYTE_INTEGERS, BYTE_FLOATS = range(4)
E2M1 = torch.tensor(E2M1_VALUES)
NIBBLES = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32)
"""What 4 bits mean in two's complement."""
PIECES = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2}
"""How many bfloat16 it takes to sum up exactly to one value."""


class _Job(ctypes.Structure):
    """``Job`` of ``cpu_linear.c``; ``work`` is its own."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "scale", "zero", "order", "table", "x", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("kind", "type", "scale_type", "rows", "pieces")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "group", "padded")),
        ("factor", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("input_type", "code_type", "input_group")),
        ("input_scale", ctypes.c_double),
        ("work", ctypes.c_int64 * 14),
    ]


@dataclass(frozen=True)
class CpuWeight(QuantWeight):
    """A prepared weight, with what the C has to know of it gathered once."""

    @cached_property
    def job(self) -> _Job:
        group = min(self.scheme.group, self.shape.in_features)
        table = self.table
        if table is None:
            table = E2M1 if self.scheme.kind is WeightKind.E2M1 else NIBBLES
        return _Job(
            q=self.q.data_ptr(),
            scale=self.scale.data_ptr(),
            zero=None if self.zero is None else self.zero.data_ptr(),
            order=None if self.order is None else self.order.data_ptr(),
            table=table.data_ptr(),
            factor=1.0 if self.global_scale is None else self.global_scale.item(),
            kind=_code_kind(self.scheme.kind),
            scale_type=SCALE_TYPES[self.scale.dtype],
            outputs=self.shape.out_features,
            inputs=self.shape.in_features,
            group=group,
            padded=_padded(group),
        )

    @cached_property
    def exact_in_bf16(self) -> bool:
        """Whether what the codes mean has at most 8 significant bits."""
        return self.table is None or torch.equal(self.table, self.table.bfloat16().float())

    @cached_property
    def of_integers(self) -> bool:
        """Whether codes can be multiplied by those of the inputs: int8 without a zero point, steps for whole groups."""
        how, group = self.scheme.activation, min(self.scheme.group, self.shape.in_features)
        if how is None or not self.scheme.kind.is_integer or group > LARGEST_GROUP:
            return False
        steps_fit = how.group is None or (how.group % group == 0 and self.order is None)
        return steps_fit and how == Activation(WeightKind.INT8, how.group, how.static)

    def __getstate__(self) -> dict[str, object]:
        return {
            name: value for name, value in vars(self).items() if name != "job"
        }  # its addresses are not to be copied


@cache
def library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    here = Path(__file__).parent
    parts = ("cpu_linear_rows.h", "cpu_linear_amx.h", "cpu_linear_vnni.h")
    return native.build(here / "cpu_linear.c", *(here / part for part in parts))


class CpuKernel(LinearKernel):
    """``widest`` of :data:`PATHS` is the last one to be used if the machine has it."""

    name = "cpu"

    def __init__(self, widest: str = PATHS[-1]) -> None:
        self.widest = PATHS.index(widest)

    def __deepcopy__(self, memo: dict[int, object]) -> CpuKernel:
        return self  # the library is loaded once

    @cached_property
    def _native(self) -> ctypes.CDLL:
        found = library()
        assert not isinstance(found, str), found
        return found

    @cached_property
    def _path(self) -> int:
        return min(self.widest, self._native.detect())

    @cached_property
    def _vnni(self) -> bool:
        return self._path >= AVX512 and bool(self._native.detect_vnni())

    @property
    def summary(self) -> str:
        threads = "" if ctypes.c_int.in_dll(self._native, "openmp").value else ", one thread (built without OpenMP)"
        return f"C, {PATHS[self._path]}{', VNNI for int8 inputs' * self._vnni}{threads}"

    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if scheme.flat and shape.in_features % scheme.group:
            return f"multiplies weights whose rows have scales of their own, not {scheme}"
        if sys.byteorder != "little":
            return "reads packed codes as little-endian words, this machine is big-endian"
        found = library()
        return found if isinstance(found, str) else None

    def prepare(self, weight: QuantWeight) -> QuantWeight:
        outputs, inputs = weight.shape.out_features, weight.shape.in_features
        group = min(weight.scheme.group, inputs)
        padded = _padded(group)
        groups, tiles = -(-inputs // group), -(-outputs // TILE)
        rows = tiles * TILE - outputs
        kind, code_kind = weight.scheme.kind, _code_kind(weight.scheme.kind)
        bits = 4 if code_kind in (NIBBLE_INTEGERS, NIBBLE_TABLE) else 8
        # Moves codes of fewer bits to the middle of 4 or 8.
        centre = 2 ** (bits - 1) - 2 ** (kind.bits - 1) if kind.is_integer else 0

        packed = weight.q.contiguous().view(torch.uint8)
        if kind.bits != bits or groups * padded != inputs:
            codes = unpack_stream(packed, kind.bits, inputs) + centre
            codes = F.pad(codes, (0, groups * group - inputs)).view(-1, groups, group)
            packed = pack_stream(F.pad(codes, (0, padded - group)).flatten(1), bits)

        def tiled(blocks: Tensor) -> Tensor:
            whole = blocks.view(torch.uint8) if blocks.itemsize == 1 else blocks  # torch moves no 8-bit float
            each = whole.repeat_interleave(weight.scheme.block[0], 0)[:outputs]
            each = F.pad(each, (0, 0, 0, rows)).view(tiles, TILE, groups).transpose(1, 2).contiguous()
            return each.view(blocks.dtype)

        changed: dict[str, Any] = {
            "q": _tiled_codes(packed.view(torch.int32), bits, code_kind, groups),
            "scale": tiled(weight.scale.view(-1, groups)),
            "zero": None if weight.zero is None else tiled(weight.zero + centre),
            "layout": "cpu-codes",
        }
        return CpuWeight(**{field.name: getattr(weight, field.name) for field in fields(weight)} | changed)

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
        job = _Job.from_buffer_copy(weight.job)
        job.pieces = PIECES[x.dtype] if path == AMX else 1
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        y = torch.empty(*x.shape[:-1], job.outputs, dtype=dtype)
        x, bias = _as(x.dtype if path == VNNI else dtype, x), None if bias is None else _as(dtype, bias)
        if path == VNNI:
            _quantize_inputs(job, x, weight)
        job.x, job.y, job.type, job.rows = x.data_ptr(), y.data_ptr(), TYPES[dtype], x.numel() // job.inputs
        job.bias = None if bias is None else bias.data_ptr()
        if job.rows and self._native.linear(path, _threads(job.inputs * job.outputs), ctypes.byref(job)):
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
        job = _Job.from_buffer_copy(weight.job)
        job.y, job.type = memory.data_ptr(), TYPES[dtype]
        for first in range(0, outputs, width):
            here, tile = slice(first, min(first + width, outputs)), first // TILE
            job.outputs = -(-(here.stop - first) // TILE) * TILE
            job.q, job.scale = weight.q[tile].data_ptr(), weight.scale[tile].data_ptr()
            job.zero = None if weight.zero is None else weight.zero[tile].data_ptr()
            self._native.dequantize(self._path, _threads(inputs * job.outputs), ctypes.byref(job))
            panel = memory[: inputs * job.outputs].view(inputs, job.outputs)[:, : here.stop - first]
            if bias is None:
                torch.mm(x.view(-1, inputs), panel, out=y.view(-1, outputs)[:, here])
            else:
                torch.addmm(bias[here], x.view(-1, inputs), panel, out=y.view(-1, outputs)[:, here])
        return y


def _quantize_inputs(job: _Job, x: Tensor, weight: CpuWeight) -> None:
    """Tell how :func:`quant.activation.quantize_dequantize` rounds ``x``."""
    how, scale = weight.scheme.activation, weight.input_scale
    assert how is not None
    job.input_type, job.input_group = TYPES[x.dtype], how.group or job.inputs
    job.input_scale = 0.0 if scale is None else scale.item()
    job.code_type = TYPES[x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)]


def _code_kind(kind: WeightKind) -> int:
    if kind.is_integer:
        return NIBBLE_INTEGERS if kind.bits <= 4 else BYTE_INTEGERS
    return BYTE_FLOATS if kind is WeightKind.FP8 else NIBBLE_TABLE


def _padded(group: int) -> int:
    return -(-group // 8) * 8


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def _tiled_codes(rows: Tensor, bits: int, code_kind: int, groups: int) -> Tensor:
    """``int32 [outputs, words]`` to what ``cpu_linear.c`` reads, ``[tiles, groups, 2, words a group, TILE / 2]``."""
    outputs, width = rows.shape
    tiles = -(-outputs // TILE)
    shape = (tiles, groups, 2, width // groups, TILE // 2)
    if rows.is_meta:
        return rows.new_empty(shape)
    codes = _in_huge_pages(shape)
    # Two's complement: the highest bit of every code turned over.
    turned = {NIBBLE_INTEGERS: -0x77777778, BYTE_INTEGERS: -0x7F7F7F80}.get(code_kind, 0)
    for first in range(0, tiles, step := max(1, CACHED_WORDS // (width * TILE))):
        words = rows[first * TILE : (first + step) * TILE] ^ turned
        for distance, movers in ((4, 0x00F000F0), (8, 0x0000FF00))[bits // 8 :]:  # even codes down, odd ones up
            swap = (words ^ words >> distance) & movers
            words ^= swap ^ swap << distance
        words = F.pad(words, (0, 0, 0, -len(words) % TILE))
        codes[first : first + step] = words.view(-1, 2, TILE // 2, groups, width // groups).permute(0, 3, 1, 4, 2)
    return codes


def _in_huge_pages(shape: tuple[int, ...]) -> Tensor:
    """``int32`` in pages that are found sooner: a tenth of the time of a product with one row."""
    memory = mmap.mmap(-1, 4 * prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int32).view(shape)


def _threads(weights: int) -> int:
    return min(torch.get_num_threads(), 1 + weights // THREAD_WEIGHTS)
