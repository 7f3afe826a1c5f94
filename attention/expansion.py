"""Attention over latents in one forward: absorbed into the queries, or expanded to the keys and values of all heads again.

Per head, with n, r and v for the unrotated and the rotated part of a key and for a value, a query costs

    absorbed    rank * (n + v)  to make it and to expand its result,  and  2 * rank + r  for each key that it sees
    expanded                                                                n + r + v    for each key that it sees

and to expand costs ``rank * (n + v)`` a key. So tokens are decoded absorbed, and prompts are expanded, unless they are short
pieces after a long past (the two ways of DeepSeek-V3, 2024, and vLLM). What is expanded is forgotten after the call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from attention.kv_cache import KVCache
from attention.latent import Projection

MOST_BYTES = 256 << 20
"""Of expanded keys and values that exist at a time: a part of the heads after the other, if need be."""


class Rows(NamedTuple):
    """Some sequences of a batch: their rows [R] in it, and what describes them by themselves."""

    rows: Tensor
    batch: AttentionBatch


@dataclass(frozen=True)
class Split:
    """A batch in two: sequences to ``expand``, whose pages are the ``slots`` [P] of the cache; and all others. The batch of
    the first counts just these pages."""

    expand: Rows
    slots: Tensor
    absorb: Rows | None


def worth_expanding(projection: Projection, queries: int, keys: int) -> bool:
    """Whether the last ``queries`` of ``keys`` tokens cost fewer multiplications if the keys are expanded."""
    _, made, rank = projection.weight.shape  # n + v
    seen = queries * keys - queries * (queries - 1) // 2
    return queries > 1 and seen * (2 * rank - made) > (keys - queries) * rank * made


class LatentForward:
    """The latent calls of one forward, which see the same ``batch``."""

    def __init__(self, backend: AttentionBackend, batch: AttentionBatch, cache: KVCache) -> None:
        self.backend, self.batch, self.cache = backend, batch, cache
        self._splits: dict[tuple[int, ...], Split | None] = {}

    def attend(
        self, call: int, spec: AttentionSpec, projection: Projection, q: Tensor, kept: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """The answer [T, H, Dv] to queries [T, H, n + r] as the model has them; ``kept`` [T, 1, rank + r] is stored."""

        def absorbed(q: Tensor, kept: Tensor, batch: AttentionBatch) -> Tensor:
            values = kept[..., : spec.value_dim]
            means = self.backend.forward(call, spec, projection.absorb(q), kept, values, batch, self.cache, sinks)
            return projection.expand(means)

        # A window sees few keys, and the blocks behind it may be another's.
        split = None if spec.window or spec.chunk else self._split(projection)
        if split is None:
            return absorbed(q, kept, self.batch)
        out = q.new_empty(*q.shape[:2], projection.value)
        rows = split.expand.rows
        # Before anything is read: a sequence may start from a prefix that another is given in this very forward.
        self.cache.write(call, self.batch.slots[rows], kept[rows], kept[rows][..., : spec.value_dim])
        if split.absorb is not None:
            others = split.absorb.rows
            out[others] = absorbed(q[others], kept[others], split.absorb.batch)
        out[rows] = self._expanded(call, spec, projection, q[rows], split, sinks)
        return out

    def _expanded(
        self, call: int, spec: AttentionSpec, projection: Projection, q: Tensor, split: Split, sinks: Tensor | None
    ) -> Tensor:
        """The answer to the queries of the sequences that are expanded."""
        latents = self.cache.read(call, split.slots[None])[0][0, :, 0].to(q.dtype)  # [P, rank + r]
        pages = split.slots.shape[0] // self.cache.block_size
        heads, value = projection.weight.shape[0], projection.value
        bytes_per_head = latents.shape[0] * 2 * (q.shape[2] + value) * q.itemsize
        some = heads
        while some % 2 == 0 and some * bytes_per_head > MOST_BYTES:  # few sizes: kernels are compiled for each
            some //= 2
        outs = []
        for first in range(0, heads, some):
            part = slice(first, first + some)
            keys, values = projection.part(part).apart(latents)
            # It shares what it never stored: the pages are there already.
            own = replace(
                spec, heads=some, kv_heads=some, key_dim=keys.shape[2], value_dim=value, latent=False, shares=0
            )
            cache = KVCache.around(own, keys.unflatten(0, (pages, -1)), values.unflatten(0, (pages, -1)))
            own_sinks = None if sinks is None else sinks[part]
            outs.append(self.backend.forward(0, own, q[:, part], keys, values, split.expand.batch, cache, own_sinks))
        return torch.cat(outs, 1)

    def _split(self, projection: Projection) -> Split | None:
        """Which sequences to expand, if any. Asks the device for lengths, unless all sequences are decoding."""
        if self.batch.max_query == 1:
            return None
        sizes = (*projection.weight.shape, projection.nope)
        if sizes not in self._splits:
            self._splits[sizes] = self._decide(projection)
        return self._splits[sizes]

    def _decide(self, projection: Projection) -> Split | None:
        batch, size = self.batch, self.cache.block_size
        starts, lens, device = batch.query_starts.tolist(), batch.kv_lens.tolist(), batch.slots.device
        queries = [stop - start for start, stop in pairwise(starts)]
        chosen = [worth_expanding(projection, *lengths) for lengths in zip(queries, lens, strict=True)]
        if not any(chosen):
            return None

        def rows(wanted: bool) -> tuple[list[int], Tensor]:
            found = [i for i, expand in enumerate(chosen) if expand is wanted and queries[i]]
            return found, torch.tensor([r for i in found for r in range(starts[i], starts[i + 1])], device=device)

        expanded, expanded_rows = rows(True)
        pages = [-(-lens[i] // size) for i in expanded]
        places, tables, slots = 0, [], []
        for i, count in zip(expanded, pages, strict=True):
            tables.append(range(places, places + count))
            places += count
            positions = torch.arange(count * size, device=device)
            slots.append(batch.block_tables[i][positions // size].long() * size + positions % size)
        own = AttentionBatch.pack([queries[i] for i in expanded], [lens[i] for i in expanded], tables, size, device)
        others, other_rows = rows(False)
        rest = None
        if others:
            rest = Rows(
                other_rows,
                replace(
                    batch,
                    slots=batch.slots[other_rows],
                    block_tables=batch.block_tables[others],
                    query_starts=torch.tensor([0, *(queries[i] for i in others)], device=device).cumsum(0).int(),
                    kv_lens=batch.kv_lens[others],
                    max_query=max(queries[i] for i in others),
                    max_kv=max(lens[i] for i in others),
                ),
            )
        return Split(Rows(expanded_rows, own), torch.cat(slots), rest)
