"""The cache: a pair of tensors per attention call, and what a token costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention import AttentionSpec, KVCache
from tests.attention.paging import tensors_of

SPECS = [AttentionSpec(4, 2, 8, 8, scale=1.0), AttentionSpec(4, 4, 12, 10, scale=1.0)]


def test_every_call_has_its_own_pair_of_its_own_shape() -> None:
    cache = KVCache(SPECS, blocks=5, block_size=3, dtype=torch.float16, device="cpu")
    assert [tuple(k.shape) for k in cache.k] == [(5, 3, 2, 8), (5, 3, 4, 12)]
    assert [tuple(v.shape) for v in cache.v] == [(5, 3, 2, 8), (5, 3, 4, 10)]
    tensors = [*cache.k, *cache.v]
    assert len({tensor.data_ptr() for tensor in tensors}) == 4
    assert all(tensor.dtype == torch.float16 and tensor.is_contiguous() for tensor in tensors)
    assert (cache.blocks, cache.block_size) == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_bytes_per_token_is_what_is_allocated(dtype: torch.dtype) -> None:
    cache = KVCache(SPECS, blocks=5, block_size=3, dtype=dtype, device="meta")
    assert KVCache.bytes_per_token(SPECS, dtype) * 5 * 3 == sum(t.nbytes for t in tensors_of(cache))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_latents_are_kept_once_and_shared_keys_nowhere_else(dtype: torch.dtype) -> None:
    latent = AttentionSpec(4, 1, 20, 16, scale=1.0, latent=True)
    specs = [latent, SPECS[0], replace(SPECS[0], shares=1), replace(latent, shares=0)]
    cache = KVCache(specs, blocks=5, block_size=3, dtype=dtype, device="cpu")
    storage = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(cache)}
    assert KVCache.bytes_per_token(specs, dtype) * 5 * 3 == sum(storage.values())
    scales = 4 if cache.quantized else 0
    assert KVCache.bytes_per_token([latent], dtype) == 20 * dtype.itemsize + scales
    assert cache.k[2].data_ptr() == cache.k[1].data_ptr()
    assert cache.v[2].data_ptr() == cache.v[1].data_ptr()
    assert cache.v[0].data_ptr() == cache.k[0].data_ptr()
