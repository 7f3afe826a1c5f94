"""The backend of CPUs: C over the pages (``kernels/cpu.c``), with the widest instructions found when it runs.

Everything an :class:`AttentionSpec` can say, over caches of every dtype, in float32; where the processor multiplies
bfloat16, so are queries, keys and the weights of values of models in bfloat16, and summed in float32.

The C is compiled on first use, and this package does not know how: whoever selects a backend hands over a :data:`Build`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from attention.base import AttentionBackend, AttentionBatch, AttentionError, AttentionSpec
from attention.kv_cache import KVCache

Build = Callable[..., ctypes.CDLL | str]
"""Compiles a C source, given with the headers beside it, and loads it; a sentence: why it cannot."""

PATHS = ("portable", "avx2", "avx512", "avx512-bf16")
"""What ``cpu.c`` has code for, in its order."""
AVX512, BF16 = 2, 3

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
EXACT_IN_BF16 = {torch.bfloat16, torch.int8, torch.float8_e4m3fn}


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("type", "bytes", "token", "head", "dim")),
    ]


class _Pages(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scale", "fixed")),
        *((name, ctypes.c_int64) for name in ("type", "bytes", "row")),
    ]


class _Job(ctypes.Structure):
    """``Job`` of ``cpu.c``."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v")),
        *((name, _Pages) for name in ("keys", "values")),
        *((name, ctypes.c_void_p) for name in ("out", "sinks", "slots", "tables", "starts", "lengths")),
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "table_width", "block_size", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("window", "chunk")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class CpuBackend(AttentionBackend):
    """``build`` compiles the C; ``widest`` of :data:`PATHS` is the last one to be used if the machine has it."""

    name = "cpu"

    def __init__(self, build: Build | None, widest: str = PATHS[-1]) -> None:
        self.build = build
        self.widest = PATHS.index(widest)

    @cached_property
    def _library(self) -> ctypes.CDLL | str:
        if self.build is None:
            return "its kernels are in C, and nothing was given to compile them: pass build to attention.select"
        return _load(self.build)

    @cached_property
    def _native(self) -> ctypes.CDLL:
        assert not isinstance(self._library, str), self._library
        return self._library

    @cached_property
    def path(self) -> int:
        """Index in :data:`PATHS` of what will be used."""
        return min(self.widest, self._native.detect())

    @property
    def summary(self) -> str:
        threads = "" if ctypes.c_int.in_dll(self._native, "openmp").value else ", one thread (built without OpenMP)"
        return f"{self.name} (C, {PATHS[self.path]}{threads})"

    def refuses(self, spec: AttentionSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if sys.byteorder != "little":
            return "reads 8-bit and bfloat16 numbers as little-endian words, this machine is big-endian"
        return self._library if isinstance(self._library, str) else None

    def forward(
        self,
        call: int,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        sinks: Tensor | None,
    ) -> Tensor:
        if q.dtype not in TYPES or cache.dtype not in TYPES:
            raise AttentionError(f"cpu attention computes no {q.dtype} over a cache of {cache.dtype}")
        out_dtype = q.dtype
        q, k = _computed_in(q), _stored_in(cache, k)
        v = k[..., : spec.value_dim] if spec.latent else _stored_in(cache, v)
        out = torch.empty(q.shape[0], spec.heads, spec.value_dim, dtype=q.dtype)
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        k_scale, v_scale = (cache.k_scale[call], cache.v_scale[call]) if cache.quantized else (None, None)
        job = _Job(
            q=_rows(q),
            k=_rows(k),
            v=_rows(v),
            keys=_pages(cache.k[call], k_scale, cache.static[call].k),
            values=_pages(cache.v[call], v_scale, cache.static[call].v),
            out=out.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            slots=batch.slots.data_ptr(),
            tables=batch.block_tables.data_ptr(),
            starts=batch.query_starts.data_ptr(),
            lengths=batch.kv_lens.data_ptr(),
            tokens=q.shape[0],
            sequences=batch.kv_lens.shape[0],
            table_width=batch.block_tables.shape[1],
            block_size=cache.block_size,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            window=spec.window or 0,
            chunk=spec.chunk or 0,
            scale=spec.scale,
            softcap=spec.softcap or 0,
        )
        in_bf16 = q.dtype == torch.bfloat16 and cache.dtype in EXACT_IN_BF16
        path = self.path if in_bf16 else min(self.path, AVX512)
        if self._native.attend(path, torch.get_num_threads(), len(spec.kept), ctypes.byref(job)):
            raise MemoryError(f"no memory to attend to {batch.max_kv} keys")
        return out if out.dtype == out_dtype else out.to(out_dtype)


@cache
def _load(build: Build) -> ctypes.CDLL | str:
    here = Path(__file__).parent / "kernels"
    return build(here / "cpu.c", here / "cpu_numbers.h", here / "cpu_rows.h")


def _computed_in(tensor: Tensor) -> Tensor:
    """float16 is computed as float32."""
    return _dense(tensor.float() if tensor.dtype == torch.float16 else tensor)


def _stored_in(cache: KVCache, tensor: Tensor) -> Tensor:
    """As the C stores it: bytes that are the cache's own, or what it quantizes."""
    if cache.quantized:
        return _computed_in(tensor)
    return _dense(tensor if tensor.dtype == cache.dtype else tensor.to(cache.dtype))


def _dense(tensor: Tensor) -> Tensor:
    """The C takes any stride of tokens and heads, but not of dimensions."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> _Rows:
    token, head, _ = tensor.stride()
    return _Rows(tensor.data_ptr(), TYPES[tensor.dtype], tensor.itemsize, token, head, tensor.shape[2])


def _pages(stored: Tensor, scale: Tensor | None, static: Tensor | None) -> _Pages:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (stored, scale, static))
    return _Pages(*pointers, TYPES[stored.dtype], stored.itemsize, stored.stride(2) * stored.itemsize)
