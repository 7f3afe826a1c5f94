"""Where keys and values live: one pair of tensors per attention call of the model's forward.

    k[call]  [blocks, block_size, kv_heads, key_dim]
    v[call]  [blocks, block_size, kv_heads, value_dim]
    k_scale[call], v_scale[call]  [blocks, block_size, kv_heads]    float32, if the dtype is a quantized one

A pair belongs to a *call*, not to a layer: some models attend twice in one layer or run a layer several times. The values
of a latent call are a view of its keys, a call that shares has the pair of another, and calls of different groups may take
turns with one (:mod:`attention.layout`). All pairs share one numbering of blocks. Who owns which block is the runtime's
business: nothing is initialised, counted or freed here.

:meth:`KVCache.write` and :meth:`KVCache.read` say what is stored, in plain torch; backends with kernels do it themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from attention.base import AttentionSpec
from attention.kv_dtypes import LARGEST_CODE, SCALE_BYTES, dequantize, quantize
from attention.layout import CacheLayout


class StaticScales(NamedTuple):
    """Of one call, float32 [kv_heads] on the cache's device; ``None``: found for each token and head as it is stored."""

    k: Tensor | None = None
    v: Tensor | None = None


class KVCache:
    """The cache of a whole model. ``dtype`` may differ from the model's; a backend converts as it writes. ``static`` are the
    scales of each call, if the dtype is a quantized one and a checkpoint brings them."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        static: Sequence[StaticScales] | None = None,
        layout: CacheLayout | None = None,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.layout = layout or CacheLayout.single(specs)
        self.dtype = dtype
        self.specs = list(specs)
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.k_scale: list[Tensor] = []
        self.v_scale: list[Tensor] = []
        self.static = [StaticScales()] * len(specs) if static is None else list(static)

        def allocate(kv_heads: int, *dim: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(blocks, block_size, kv_heads, *dim, dtype=dtype, device=device)

        for spec, first in zip(specs, self.layout.first_of_column, strict=True):
            if first < len(self.k):
                for tensors in (self.k, self.v, *([self.k_scale, self.v_scale] if self.quantized else [])):
                    tensors.append(tensors[first])
                continue
            keys = allocate(spec.kv_heads, spec.key_dim)
            self.k.append(keys)
            self.v.append(keys[..., : spec.value_dim] if spec.latent else allocate(spec.kv_heads, spec.value_dim))
            if self.quantized:
                scale = allocate(spec.kv_heads, dtype=torch.float32)
                self.k_scale.append(scale)
                self.v_scale.append(scale if spec.latent else torch.empty_like(scale))

    @classmethod
    def around(cls, spec: AttentionSpec, k: Tensor, v: Tensor) -> Self:
        """The cache of one call whose pages are there already: ``k`` and ``v`` [blocks, block_size, kv_heads, D]."""
        cache = cls([], k.shape[0], k.shape[1], k.dtype, k.device)
        cache.specs, cache.k, cache.v, cache.static = [spec], [k], [v], [StaticScales()]
        return cache

    @property
    def quantized(self) -> bool:
        return self.dtype in LARGEST_CODE

    @staticmethod
    def bytes_per_token(specs: Sequence[AttentionSpec], dtype: torch.dtype, layout: CacheLayout | None = None) -> int:
        """Bytes that one token takes in one block of each group; of a single group, in all pairs together."""
        scale = SCALE_BYTES if dtype in LARGEST_CODE else 0
        layout = layout or CacheLayout.single(specs)
        columns = [specs[call] for call in layout.firsts]
        in_a_block = sum(spec.kv_heads * (dim * dtype.itemsize + scale) for spec in columns for dim in spec.kept)
        return len(layout.reaches) * in_a_block

    def write(self, call: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store what the call keeps of the keys [T, Hkv, Dk] and values [T, Hkv, Dv] of tokens at ``slots`` [T]."""
        static = self.static[call] if self.quantized else StaticScales()
        pair = ((k, self.k, self.k_scale, static.k), (v, self.v, self.v_scale, static.v))
        for new, stored, scales, given in pair[: len(self.specs[call].kept)]:
            if self.quantized:
                new, scale = quantize(new, self.dtype, given)
                scales[call].flatten(0, 1)[slots] = scale
            _bytes_if_fp8(stored[call]).flatten(0, 1)[slots] = _bytes_if_fp8(new.to(self.dtype))

    def read(self, call: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values at ``slots`` [...], as stored or, if quantized, in float32: [..., Hkv, D]."""

        def gather(stored: list[Tensor], scales: list[Tensor]) -> Tensor:
            values = _gather(_bytes_if_fp8(stored[call]), slots).view(self.dtype)
            return dequantize(values, _gather(scales[call], slots)) if self.quantized else values

        keys = gather(self.k, self.k_scale)
        spec = self.specs[call]
        return keys, keys[..., : spec.value_dim] if spec.latent else gather(self.v, self.v_scale)


def _bytes_if_fp8(tensor: Tensor) -> Tensor:
    """torch does not index float8 on every device, but bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """[blocks, block_size, ...] at slots [B, K]: [B, K, ...]. Quicker than indexing, on CPUs."""
    return cache.flatten(0, 1).index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[2:])
