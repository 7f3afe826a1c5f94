"""Calls with a window share memory with the others, block by block, and no call's keys lie where another's do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention import AttentionBatch, AttentionSpec, KVCache
from attention.base import Reach
from attention.layout import MOST_GROUPS, CacheLayout
from tests.attention.paging import tensors_of


def specs(full: int, windows: int, window: int = 1024, **others: int) -> list[AttentionSpec]:
    """Of ``full`` layers that see everything among ``windows`` that do not."""
    spec = AttentionSpec(8, 2, 16, 16, scale=1.0)
    bounded = AttentionSpec(8, 2, 16, 16, scale=1.0, window=window)
    return [bounded] * (windows // 2) + [spec] * full + [bounded] * (windows - windows // 2)


@pytest.mark.parametrize(
    ("full", "windows", "groups", "columns"),
    [
        (32, 0, 1, 32),  # Llama
        (0, 32, 1, 32),  # Mistral 7B v0.1
        (12, 12, 2, 12),  # gpt-oss-20b
        (21, 21, 2, 21),  # Gemma 2 9B
        (8, 40, 6, 8),  # Gemma 3 12B
        (10, 52, 7, 10),  # Gemma 3 27B, whose last group has 2 layers
        (4, 22, 7, 4),  # Gemma 3 1B
    ],
)
def test_a_long_sequence_wastes_nothing(full: int, windows: int, groups: int, columns: int) -> None:
    layout = CacheLayout.of(specs(full, windows))
    assert (len(layout.reaches), len(set(layout.columns))) == (groups, columns)
    assert len(set(zip(layout.groups, layout.columns, strict=True))) == full + windows, "no two calls in one place"
    assert sum(not reach.bounded for reach in layout.reaches) == (1 if full else 0)
    assert len(layout.reaches) <= MOST_GROUPS
    for call, spec in enumerate(specs(full, windows)):
        assert layout.reaches[layout.groups[call]] == spec.reach


def test_calls_in_one_column_share_a_pair() -> None:
    calls = specs(1, 2)
    layout = CacheLayout.of(calls)
    cache = KVCache(calls, 5, 4, torch.int8, "cpu", layout=layout)
    assert len({tensor.data_ptr() for tensor in cache.k}) == 1
    assert len({tensor.data_ptr() for tensor in (*cache.k_scale, *cache.v_scale)}) == 2
    alone = KVCache.bytes_per_token(calls, torch.int8)
    assert KVCache.bytes_per_token(calls, torch.int8, layout) == alone
    padded = specs(10, 52)
    whole = KVCache.bytes_per_token(padded, torch.int8)
    assert KVCache.bytes_per_token(padded, torch.int8, CacheLayout.of(padded)) * 62 == whole * 70, "7 groups of 10"


def test_a_window_as_long_as_the_longest_sequence_is_none() -> None:
    calls = specs(2, 2, window=4096)
    assert len(CacheLayout.of(calls, longest=4096).reaches) == 1
    assert len(CacheLayout.of(calls, longest=4097).reaches) == 2


def gemma4() -> list[AttentionSpec]:
    """Its default: keys twice as wide in every sixth layer, which sees everything."""
    wide = AttentionSpec(8, 4, 512, 512, scale=1.0)
    return [*[AttentionSpec(8, 4, 256, 256, scale=1.0, window=512)] * 5, wide] * 5


def mimo() -> list[AttentionSpec]:
    """MiMo-V2: half as many key heads in every fifth layer, which sees everything."""
    few = AttentionSpec(64, 4, 192, 128, scale=1.0)
    return [*[AttentionSpec(64, 8, 192, 128, scale=1.0, window=128)] * 4, few] * 9


@pytest.mark.parametrize(
    ("calls", "groups", "columns", "most"),
    [(gemma4(), 4, 5, 1.0), (mimo(), 9, 5, 10 / 9)],
    ids=["gemma4", "mimo"],
)
def test_layers_of_unlike_shape_share_columns(
    calls: list[AttentionSpec], groups: int, columns: int, most: float
) -> None:
    """Two pages of the smaller layers lie in a block; ``most``: what a long sequence takes, of what it would alone."""
    layout = CacheLayout.of(calls)
    assert (len(layout.reaches), len(layout.members)) == (groups, columns)
    lasting = sum(not reach.bounded for reach in layout.reaches)
    for dtype in (torch.bfloat16, torch.int8):
        whole = KVCache.bytes_per_token(calls, dtype, layout) // groups * lasting
        alone = KVCache.bytes_per_token([spec for spec in calls if spec.window is None], dtype)
        scales = 1.03 if dtype == torch.int8 else 1  # two tensors of scales, where heads differ
        assert alone <= whole <= alone * most * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("wide", [{"key_dim": 32, "value_dim": 16}, {"kv_heads": 4}, {"kv_heads": 6, "heads": 12}])
def test_nobody_writes_where_another_calls_tokens_are(wide: dict[str, int], dtype: torch.dtype) -> None:
    """Every call writes its number to blocks of its group, which no other group has; all of it is still there after that."""
    few = replace(specs(0, 1)[0], value_dim=8)
    full = replace(specs(1, 0)[0], value_dim=8)
    calls = [few] * 5 + [replace(full, **wide)] * 3 + [few] * 2
    layout, size, blocks = CacheLayout.of(calls), 3, 20
    assert any(reach.bounded for reach in layout.reaches)
    assert len(set(layout.pages)) == 2
    cache = KVCache(calls, blocks, size, dtype, "cpu", layout=layout)
    groups = len(layout.reaches)
    tables = torch.randperm(blocks)[: blocks // groups * groups].view(groups, -1)
    length = tables.shape[1] * size
    counted = [AttentionBatch.pack([length], [length], [table], size) for table in tables.tolist()]
    slots = [batch.slots for batch in layout.in_pages(counted, size)]
    held = []
    for call, spec in enumerate(calls):
        k = torch.randn(length, spec.kv_heads, spec.key_dim)
        v = torch.randn(length, spec.kv_heads, spec.value_dim)
        cache.write(call, slots[layout.groups[call]], k, v)
        held.append([each.clone() for each in cache.read(call, slots[layout.groups[call]])])
    for call, wanted in enumerate(held):
        for got, written in zip(cache.read(call, slots[layout.groups[call]]), wanted, strict=True):
            assert torch.equal(got, written)
    used = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(cache)}
    assert sum(used.values()) * len(layout.reaches) == blocks * size * KVCache.bytes_per_token(calls, dtype, layout)


def test_what_fits_in_no_common_block_shares_nothing() -> None:
    for wide in (
        AttentionSpec(8, 2, 32, 16, scale=1.0),  # keys twice as wide, values not
        AttentionSpec(8, 2, 17, 17, scale=1.0),  # 17 pages in a block
        AttentionSpec(8, 1, 32, 16, scale=1.0, latent=True),
    ):
        calls = [*specs(0, 3), wide]
        assert CacheLayout.of(calls) == CacheLayout.single(calls)
    calls = [*specs(0, 1), AttentionSpec(8, 2, 15, 15, scale=1.0)]
    assert CacheLayout.of(calls) == CacheLayout.single(calls), "15 or 16 pages in a block, for a layer each"


@pytest.mark.parametrize("reach", [Reach(window=4), Reach(chunk=5)])
def test_the_first_key_is_the_first_that_is_seen(reach: Reach) -> None:
    for position in range(23):
        sees = [
            key
            for key in range(position + 1)
            if (reach.window is None or position - key < reach.window)
            and (reach.chunk is None or position // reach.chunk == key // reach.chunk)
        ]
        assert reach.first(position) == sees[0]
        assert len(sees) <= (reach.most or 0)


def test_a_call_that_shares_is_where_its_source_is() -> None:
    """As in Gemma 3n and 4: the last layers have the keys of the last of their kind before them."""
    calls = [*specs(1, 3)[:3], *specs(0, 1)]  # window, everything, window, window
    shared = [*calls, replace(calls[3], shares=3), replace(calls[1], shares=1)]
    layout = CacheLayout.of(shared)
    assert layout.groups[4:] == (layout.groups[3], layout.groups[1])
    assert layout.columns[4:] == (layout.columns[3], layout.columns[1])
    cache = KVCache(shared, 5, 4, torch.float32, "cpu", layout=layout)
    assert [tensor.data_ptr() for tensor in cache.k[4:]] == [cache.k[3].data_ptr(), cache.k[1].data_ptr()]
    assert KVCache.bytes_per_token(shared, torch.float32, layout) == KVCache.bytes_per_token(calls, torch.float32)
    assert len(CacheLayout.single(shared).members) == 4
