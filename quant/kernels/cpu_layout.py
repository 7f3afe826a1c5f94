"""The weight as ``cpu_linear.c`` reads it ("cpu-codes", described there), of whatever kind, and the ``Job`` that says so.

A code takes 4 bits or 8, whichever it fits into, and lies where vectors of 16 outputs find it in order.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.base import Activation, QuantWeight, WeightKind
from quant.packing import CACHED_WORDS, E2M1_VALUES, pack_stream, unpack_stream

LARGEST_GROUP = 1 << 16
"""Inputs under one scale: more products of 8 bits might not fit into a sum of 32."""

TILE = 32
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALE_TYPES = {**TYPES, torch.float8_e4m3fn: 3, torch.float8_e8m0fnu: 4}
NIBBLE_INTEGERS, NIBBLE_TABLE, BYTE_INTEGERS, BYTE_FLOATS = range(4)
E2M1 = torch.tensor(E2M1_VALUES)
NIBBLES = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32)
"""What 4 bits mean in two's complement."""


class Job(ctypes.Structure):
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
    """A prepared weight, with what the C has to know of it gathered once. Numbers are read when it is prepared: whoever records
    a step has to know what Python learns of tensors."""

    factor: float = 1.0
    input_step: float = 0.0
    """Of static inputs; 0: each token has its own."""
    exact_in_bf16: bool = True
    """Whether what the codes mean has at most 8 significant bits."""

    @cached_property
    def job(self) -> Job:
        group = min(self.scheme.group, self.shape.in_features)
        table = self.table
        if table is None:
            table = E2M1 if self.scheme.kind is WeightKind.E2M1 else NIBBLES
        return Job(
            q=self.q.data_ptr(),
            scale=self.scale.data_ptr(),
            zero=None if self.zero is None else self.zero.data_ptr(),
            order=None if self.order is None else self.order.data_ptr(),
            table=table.data_ptr(),
            factor=self.factor,
            kind=_code_kind(self.scheme.kind),
            scale_type=SCALE_TYPES[self.scale.dtype],
            outputs=self.shape.out_features,
            inputs=self.shape.in_features,
            group=group,
            padded=_padded(group),
            input_scale=self.input_step,
        )

    @cached_property
    def of_integers(self) -> bool:
        """Whether codes can be multiplied by those of the inputs: int8 without a zero point, steps for whole groups."""
        how, group = self.scheme.activation, min(self.scheme.group, self.shape.in_features)
        if how is None or not self.scheme.kind.is_integer or group > LARGEST_GROUP:
            return False
        steps_fit = how.group is None or (how.group % group == 0 and self.order is None)
        return steps_fit and how == Activation(WeightKind.INT8, how.group, how.static)

    def __getstate__(self) -> dict[str, object]:
        # The addresses of a job are not to be copied.
        return {name: value for name, value in vars(self).items() if name != "job"}


def prepared(weight: QuantWeight) -> CpuWeight:
    """A canonical weight in this layout."""
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

    table = weight.table
    changed: dict[str, Any] = {
        "q": _tiled_codes(packed.view(torch.int32), bits, code_kind, groups),
        "scale": tiled(weight.scale.view(-1, groups)),
        "zero": None if weight.zero is None else tiled(weight.zero + centre),
        "layout": "cpu-codes",
        "factor": _number(weight.global_scale, 1.0),
        "input_step": _number(weight.input_scale, 0.0),
        "exact_in_bf16": table is None or table.is_meta or torch.equal(table, table.bfloat16().float()),
    }
    return CpuWeight(**{field.name: getattr(weight, field.name) for field in fields(weight)} | changed)


def _number(tensor: Tensor | None, otherwise: float) -> float:
    return otherwise if tensor is None or tensor.is_meta else tensor.item()


def _code_kind(kind: WeightKind) -> int:
    if kind.is_integer:
        return NIBBLE_INTEGERS if kind.bits <= 4 else BYTE_INTEGERS
    return BYTE_FLOATS if kind is WeightKind.FP8 else NIBBLE_TABLE


def _padded(group: int) -> int:
    return -(-group // 8) * 8


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
