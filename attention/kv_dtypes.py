"""What a cached key or value is stored as, by the names of ``--kv-cache-dtype``, and what quantizing one means.

``fp8_e4m3`` and ``int8`` keep one float32 scale for every token and head: the largest magnitude of that vector becomes the
largest code, so no calibration is needed and one outlier spoils one vector only. Where a checkpoint brings a *static* scale,
found by calibration, every vector of the layer has that one, and what is larger than its largest code saturates. These
functions are the definition; a kernel that quantizes has to give the same codes and scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.base import AttentionError

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}

LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Of each dtype that needs a scale."""

SCALE_BYTES = torch.float32.itemsize


def cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``name`` stands for; ``auto`` is the model's own."""
    if name == "auto":
        return model_dtype
    if name not in DTYPES:
        raise AttentionError(f"unknown KV cache dtype {name!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def quantize(x: Tensor, dtype: torch.dtype, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes like ``x`` [..., heads, D] and their float32 scales [..., heads]; ``static`` [heads] are given ones. A vector that
    is not finite stays so: its scale is not."""
    largest = LARGEST_CODE[dtype]
    if static is None:
        scale = x.float().abs().amax(-1) / largest
        scale = torch.where(scale == 0, 1.0, scale)
    else:
        scale = torch.where(x.isfinite().all(-1), static, torch.nan)
    codes = (x.float() / scale[..., None]).clamp(-largest, largest)
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values [..., D] of codes [..., D] and scales [...]."""
    return codes.float() * scale[..., None]
