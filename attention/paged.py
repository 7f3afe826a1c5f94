"""The backend of CUDA devices: Triton kernels over the pages.

Sequences with one new token go through ``decode``, the others through ``varlen``. The host knows no lengths without asking
the device, and need not: in a forward that may hold both, both kernels are launched and leave alone what is not theirs.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from attention.kv_cache import KVCache

LARGEST_DIM = 576
OLDEST = (8, 0)


class PagedBackend(AttentionBackend):
    """Triton kernels; Triton itself is imported when one is first launched."""

    name = "paged"
    capturable = True

    def refuses(self, spec: AttentionSpec, device: torch.device) -> str | None:
        if device.type != "cuda" and not _interpreting():
            return f"its kernels need a CUDA device, not {device.type}"
        if find_spec("triton") is None:
            return "Triton is not installed: pip install 'relinear[gpu]'"
        if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < OLDEST:
            return f"its kernels need compute capability 8.0, and this device has {capability[0]}.{capability[1]}"
        if max(spec.key_dim, spec.value_dim) > LARGEST_DIM:
            return f"its head dimensions end at {LARGEST_DIM}"
        if spec.scale <= 0:
            return "its scale must be positive"
        return None

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
        from attention.kernels.store_kv import store_kv

        if spec.shares is None:
            with _on(q.device):
                store_kv(call, _rows_contiguous(k), _rows_contiguous(v), batch.slots, cache, spec.latent)
        return self.attend(call, spec, q, batch, cache, sinks)

    def attend(
        self,
        call: int,
        spec: AttentionSpec,
        q: Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        sinks: Tensor | None,
    ) -> Tensor:
        """:meth:`forward` without its first half, over keys and values that are in the cache already."""
        from attention.kernels.decode import decode
        from attention.kernels.varlen import varlen

        q = _rows_contiguous(q)
        out = q.new_empty(q.shape[0], spec.heads, spec.value_dim)
        with _on(q.device):
            if batch.max_query == 1 or batch.kv_lens.shape[0] > 1:
                decode(call, spec, q, batch, cache, sinks, out)
            if batch.max_query > 1:
                varlen(call, spec, q, batch, cache, sinks, out)
        return out


def _interpreting() -> bool:
    """Whether the kernels would run in Triton's interpreter, which needs no device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """The kernels take any stride of tokens and heads, but not of dimensions."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
