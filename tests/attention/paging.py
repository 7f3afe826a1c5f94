"""Pages for the tests: scattered over a cache in which everything that nobody wrote is NaN."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from attention import AttentionSpec, KVCache


def poisoned_cache(
    specs: Sequence[AttentionSpec],
    tokens: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> KVCache:
    """Room for ``tokens`` tokens and some blocks more, all NaN; codes of int8, which know no NaN, have NaN for a scale."""
    cache = KVCache(specs, tokens // block_size + 7, block_size, dtype, device)
    for tensor in tensors_of(cache):
        if tensor.dtype == torch.float32 or not cache.quantized:
            tensor.fill_(torch.nan)
        else:
            tensor.view(torch.uint8).fill_(0x7F)
    return cache


def tensors_of(cache: KVCache) -> list[torch.Tensor]:
    return [*cache.k, *cache.v, *cache.k_scale, *cache.v_scale]


def scattered_tables(lengths: Sequence[int], cache: KVCache, seed: int = 0) -> list[list[int]]:
    """Blocks for sequences of these lengths, in no order."""
    blocks = list(range(cache.blocks))
    random.Random(seed).shuffle(blocks)
    return [[blocks.pop() for _ in range(-(-length // cache.block_size))] for length in lengths]
