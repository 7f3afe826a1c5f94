"""Where keys and values live: one pair of tensors per attention call of the model's forward.

    k[call]  [blocks, block_size, kv_heads, key_dim]
    v[call]  [blocks, block_size, kv_heads, value_dim]
    k_scale[call], v_scale[call]  [blocks, block_size, kv_heads]    float32, if the dtype is a quantized one

A pair belongs to a *call*, not to a layer: some models attend twice in one layer or run a layer several times. The values
of a latent call are a view of its keys, a call that shares has the pair of another, and calls of different groups may take
turns with its memory (:mod:`attention.layout`: to some a block is several pages, and they have so many times more). All pairs
share one numbering of blocks. Who owns which block is the runtime's business: nothing is initialised, counted or freed here.

:meth:`KVCache.write` and :meth:`KVCache.read` say what is stored, in plain torch; backends with kernels do it themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod
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

        memory: dict[Hashable, Tensor] = {}

        def pages(what: str, call: int, *dim: int, dtype: torch.dtype = dtype) -> Tensor:
            """Of a call, in the memory that it shares with others of its column whose blocks are as large."""
            count, place = self.layout.pages[self.layout.groups[call]], self.layout.places[call]
            page = (block_size, specs[call].kv_heads, *dim)
            block = count * prod(page)
            key = what, self.layout.columns[call], block
            if key not in memory:
                memory[key] = torch.empty(blocks * block, dtype=dtype, device=device)
            used = max(0, count * (blocks - 1) + 1)  # further ones would end in the memory of nobody
            return memory[key][place * prod(page) :][: used * prod(page)].view(used, *page)

        for call, spec in enumerate(specs):
            self.k.append(pages("k", call, spec.key_dim))
            self.v.append(self.k[-1][..., : spec.value_dim] if spec.latent else pages("v", call, spec.value_dim))
            if self.quantized:
                self.k_scale.append(pages("k scale", call, dtype=torch.float32))
                scale = self.k_scale[-1] if spec.latent else pages("v scale", call, dtype=torch.float32)
                self.v_scale.append(scale)

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

        def sizes(call: int) -> tuple[int, int]:
            """Bytes of the block of a call, and of its scales."""
            spec, pages = specs[call], layout.pages[layout.groups[call]]
            return pages * spec.kv_heads * sum(spec.kept) * dtype.itemsize, pages * spec.kv_heads * len(
                spec.kept
            ) * scale

        columns = [{sizes(call) for call in calls if specs[call].shares is None} for calls in layout.members.values()]
        in_a_block = sum(max(block for block, _ in found) + sum({scales for _, scales in found}) for found in columns)
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
