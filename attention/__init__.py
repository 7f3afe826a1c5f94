"""Paged attention: what a model's layers compute, where keys and values live, and who does the work.

    specs = attention.read_specs(config)                              the recorded calls of the model
    selection = attention.select(specs, device, build=build)          a backend that refuses none of them
    cache = attention.KVCache(specs, blocks, block_size, dtype, device)
    batch = attention.AttentionBatch.pack(queries, kv_lens, tables, block_size, device)
    with attention.forward_batch(batch, cache, selection.backend, specs):
        model(input_ids, position_ids=batch.positions()[None], use_cache=False)      packed, [1, T]

Transformers is imported when one of the names that need it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attention.base import AttentionBackend, AttentionBatch, AttentionError, AttentionSpec, UnsupportedAttention
from attention.kv_cache import KVCache
from attention.positions import length_dependent_rope
from attention.registry import Selection, select

if TYPE_CHECKING:
    from attention.hf import NAME, forward_batch, read_specs, record_specs

__all__ = [
    "NAME",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionError",
    "AttentionSpec",
    "KVCache",
    "Selection",
    "UnsupportedAttention",
    "forward_batch",
    "length_dependent_rope",
    "read_specs",
    "record_specs",
    "select",
]


def __getattr__(name: str) -> Any:
    if name in ("NAME", "forward_batch", "read_specs", "record_specs"):
        from attention import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'attention' has no attribute {name!r}")
