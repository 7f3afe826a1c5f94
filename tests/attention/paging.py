"""Pages for the tests: scattered over a cache in which everything that nobody wrote is NaN."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from attention import AttentionSpec, KVCache


def poisoned_cache(
    specs: Sequence[AttentionSpec], tokens: int, block_size: int, dtype: torch.dtype = torch.float32
) -> KVCache:
    """Room for ``tokens`` tokens and some blocks more, all NaN."""
    cache = KVCache(specs, tokens // block_size + 7, block_size, dtype, "cpu")
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(torch.nan)
    return cache


def scattered_tables(lengths: Sequence[int], cache: KVCache, seed: int = 0) -> list[list[int]]:
    """Blocks for sequences of these lengths, in no order."""
    blocks = list(range(cache.blocks))
    random.Random(seed).shuffle(blocks)
    return [[blocks.pop() for _ in range(-(-length // cache.block_size))] for length in lengths]
