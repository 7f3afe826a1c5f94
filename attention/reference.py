"""Attention over the pages in plain torch, on any device: the truth that faster backends are tested against.

The forward is cut into *tiles* of queries: the sequences that decode one token form one tile together, a longer one
gives a tile for every ``TILE`` of its queries. A tile gathers the keys that its queries can see (only those inside the
window or the chunk) and attends in float32. Every tile goes through the same few lines; only its shape differs::

    queries [B, Q]   decode: all B sequences, Q = 1        prefill: B = 1, Q <= TILE
    keys    [B, K]   from the first position that query 0 sees to the position of query Q - 1

Sequences of one tile differ in length. Past its own last key a sequence gathers that key again, which the causal mask
hides: a slot that the sequence does not own is never read, so whatever lies there (NaN, in the tests) cannot leak.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from attention.kv_cache import KVCache

TILE = 256  # bounds the score matrix of a long prompt to TILE x keys per head


class ReferenceBackend(AttentionBackend):
    """Computes everything an :class:`AttentionSpec` can say."""

    name = "reference"

    def refuses(self, spec: AttentionSpec, device: torch.device) -> str | None:
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
        keys, values = cache.k[call].flatten(0, 1), cache.v[call].flatten(0, 1)  # [slots, Hkv, D]
        keys[batch.slots] = k.to(keys.dtype)
        values[batch.slots] = v.to(values.dtype)

        out = q.new_empty(q.shape[0], spec.heads, spec.value_dim)
        positions = batch.positions()
        for sequences, rows in _tiles(batch):
            seen = positions[rows]  # [B, Q]
            key_positions, slots = _visible(spec, seen, batch.block_tables[sequences], cache.block_size)
            out[rows] = attend(
                spec, q[rows], _gather(keys, slots), _gather(values, slots), seen, key_positions, sinks
            ).to(q.dtype)
        return out


def _tiles(batch: AttentionBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences [B] and their packed rows [B, Q], covering every row of the batch once."""
    device = batch.slots.device
    starts = batch.query_starts.long()
    lengths = starts.diff()
    decoding = (lengths == 1).nonzero().squeeze(1)
    if decoding.numel():
        yield decoding, starts[decoding, None]
    for sequence in (lengths > 1).nonzero():
        start, stop = starts[sequence], starts[sequence + 1]
        for row in range(int(start), int(stop), TILE):
            yield sequence, torch.arange(row, min(row + TILE, int(stop)), device=device)[None]


def _visible(spec: AttentionSpec, seen: Tensor, tables: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The positions and the slots [B, K] of all keys that the queries at positions ``seen`` [B, Q] can see."""
    oldest, last = seen[:, 0], seen[:, -1:]
    first = torch.zeros_like(oldest)
    if spec.window is not None:
        first = (oldest - spec.window + 1).clamp(min=0)
    if spec.chunk is not None:
        first = torch.maximum(first, oldest // spec.chunk * spec.chunk)
    count = int((last[:, 0] - first).max()) + 1
    key_positions = first[:, None] + torch.arange(count, device=seen.device)
    owned = torch.minimum(key_positions, last)
    return key_positions, tables.gather(1, owned // block_size).long() * block_size + owned % block_size


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """[slots, Hkv, D] at slots [B, K]: [B, K, Hkv, D]."""
    return cache.index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[1:])


def attend(
    spec: AttentionSpec,
    q: Tensor,  # [B, Q, H, Dk]
    k: Tensor,  # [B, K, Hkv, Dk]
    v: Tensor,  # [B, K, Hkv, Dv]
    query_positions: Tensor,  # [B, Q]
    key_positions: Tensor,  # [B, K]
    sinks: Tensor | None,  # [H]
) -> Tensor:
    """Masked softmax attention of queries over keys at given positions, in float32: [B, Q, H, Dv]."""
    (batch, queries), group = q.shape[:2], spec.heads // spec.kv_heads
    q = q.float().view(batch, queries, spec.kv_heads, group, -1).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, Q, Dk]
    scores = q.flatten(2, 3) @ _by_head(k).transpose(2, 3) * spec.scale
    scores = scores.view(*q.shape[:4], -1)  # [B, Hkv, G, Q, K]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)

    distance = query_positions[:, :, None] - key_positions[:, None, :]  # [B, Q, K]
    hidden = distance < 0
    if spec.window is not None:
        hidden |= distance >= spec.window
    if spec.chunk is not None:
        hidden |= (query_positions // spec.chunk)[:, :, None] != (key_positions // spec.chunk)[:, None, :]
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)

    if sinks is not None:
        column = sinks.float().view(1, spec.kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out: Tensor = weights.flatten(2, 3) @ _by_head(v)
    return out.view(*q.shape[:4], -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _by_head(tensor: Tensor) -> Tensor:
    """[B, K, Hkv, D] as float32 [B, Hkv, K, D], in one copy that needs no other for the product."""
    return tensor.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
