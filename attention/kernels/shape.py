"""What launches know on the host: padded dimensions, the constants that a spec and a cache give a kernel, and the device."""

from __future__ import annotations

from functools import cache as remember
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.base import AttentionSpec
from attention.kernels.tile import first_visible
from attention.kv_cache import KVCache

NATIVE_FP8 = (8, 9)
"""The first compute capability that converts e4m3 by itself; before it, the kernels take the bits apart."""


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, which needs no device."""
    return not isinstance(first_visible, triton.JITFunction)


class Device(NamedTuple):
    processors: int
    capability: tuple[int, int]


@remember
def device_of(index: int | None) -> Device:
    """The CUDA device ``index``; ``None`` stands for the interpreter, which takes anything."""
    if index is None:
        return Device(4, (9, 0))
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, (properties.major, properties.minor))


def padded(dim: int) -> int:
    """The next power of two that a tensor core can multiply."""
    return max(16, 1 << (dim - 1).bit_length())


def split_key_dim(dim: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that hold ``dim`` with little to spare: 576 is 512 + 64, not 1024."""
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, padded(dim - first) if dim > first else 0


def stored(cache: KVCache, call: int, writing: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and their scales as a kernel gets them; without scales, something that it does not touch."""
    k, v = cache.k[call], cache.v[call]
    if not cache.quantized:
        return k, v, k, v
    as_bytes = writing or device_of(k.device.index).capability < NATIVE_FP8
    if cache.dtype == torch.float8_e4m3fn and as_bytes:
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    return k, v, cache.k_scale[call], cache.v_scale[call]


def dot_type(model: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """What queries, keys and values are multiplied as; codes are float16, see :mod:`attention.kernels.tile`."""
    if torch.float32 in (model, cache):
        return tl.float32
    if cache == torch.bfloat16:
        return tl.float32 if interpreting() else tl.bfloat16  # the interpreter multiplies bfloat16 as integers
    return tl.float16


def constants(spec: AttentionSpec, model: torch.dtype, cache: KVCache) -> dict[str, Any]:
    """The compile-time constants that decode and varlen share."""
    first, second = split_key_dim(spec.key_dim)
    return {
        "HEADS": spec.kv_heads,
        "GROUP": spec.heads // spec.kv_heads,
        "K_DIM": spec.key_dim,
        "V_DIM": spec.value_dim,
        "K1": first,
        "K2": second,
        "V_PADDED": padded(spec.value_dim),
        "PAGE": cache.block_size,
        "WINDOW": spec.window or 0,
        "CHUNK": spec.chunk or 0,
        "SOFTCAP": spec.softcap is not None,
        "SINKS": spec.sinks,
        "SCALED": cache.quantized,
        "KIND": dot_type(model, cache.dtype),
        "LATENT": spec.latent,
    }
