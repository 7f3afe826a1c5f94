"""The size of the KV cache is predictable, and what does not fit is said in numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention.base import Reach
from runtime import memory
from runtime.blocks import most_blocks
from runtime.config import EngineConfig
from runtime.errors import LoadError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)


def size(context: int | None = 1000, token_bytes: int = 1000, **options: Any) -> memory.CacheSize:
    return memory.size_cache(EngineConfig(model="x", **options), token_bytes, context, CPU)


def test_what_the_requests_can_use_if_it_fits() -> None:
    assert size(max_num_seqs=4).tokens == 4 * 1008, "each sequence in whole blocks of 16 tokens"
    assert size(max_num_seqs=4).max_model_len == 1000


def test_never_more_than_a_fraction_of_what_is_available() -> None:
    found = size(max_num_seqs=10_000)
    assert 0 < found.nbytes <= 0.51e9
    assert found.tokens % found.block_size == 0
    assert 0.19e9 < size(max_num_seqs=10_000, mem_fraction_static=0.2).nbytes <= 0.21e9


def test_a_long_context_is_lowered_to_what_fits() -> None:
    found = size(context=10**6, token_bytes=10_000)
    assert found.max_model_len == found.tokens < 10**6


def test_sizes_asked_for_are_kept() -> None:
    assert size(max_total_tokens=160).tokens == 160
    assert size(kv_cache_memory="1MB").nbytes == 992_000, "whole blocks of 16 tokens of 1000 bytes"


@pytest.mark.parametrize("options", [{"max_total_tokens": 8}, {"kv_cache_memory": 100}, {"kv_cache_memory": "2GB"}])
def test_sizes_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="tokens fit"):
        size(**options)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2**31), ("500 MB", 5 * 10**8), ("1.5gib", 3 * 2**29), ("64", 64), (64, 64), ("3k", 3000)],
)
def test_sizes_in_words(text: str | int, count: int) -> None:
    assert memory.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "two", "-1", "1TB2", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(LoadError, match="is not a size"):
        memory.parse_bytes(text)


def test_bad_options_are_named() -> None:
    for options in ({"max_model_len": 0}, {"block_size": True}, {"max_num_seqs": "4"}):
        with pytest.raises(LoadError, match=next(iter(options))):
            EngineConfig(model="x", **options)
    for options in ({"mem_fraction_static": 1.5}, {"mem_fraction_static": 0.5, "max_total_tokens": 64}):
        with pytest.raises(LoadError, match="mem_fraction_static"):
            EngineConfig(model="x", **options)
    with pytest.raises(LoadError, match="give one of them"):
        EngineConfig(model="x", max_total_tokens=5, kv_cache_memory=5)


def test_states_of_recurrent_layers_are_taken_from_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000)
    config = EngineConfig(model="x", max_num_seqs=4)
    without = memory.size_cache(config, 10, 4096, CPU)
    beside = memory.size_cache(config, 10, 4096, CPU, state_bytes=5_000)
    assert (without.tokens, beside.tokens) == (496, 240)
    with pytest.raises(LoadError, match=r"recurrent layers take .* for 4 sequences .* Lower max_num_seqs"):
        memory.size_cache(config, 10, 4096, CPU, state_bytes=20_000)
    recurrent_only = memory.size_cache(config, 0, 64, CPU, state_bytes=5_000)
    assert (recurrent_only.tokens, recurrent_only.nbytes) == (4 * 64, 0)


@pytest.mark.parametrize(
    ("reaches", "tokens", "share"),
    [
        ([Reach()] + [Reach(window=1024)] * 5, 32768, 0.25),  # Gemma 3 12B
        ([Reach(), Reach(window=128)], 131072, 0.51),  # gpt-oss-20b
        ([Reach(window=4096)], 32768, 0.19),  # Mistral 7B v0.1
        ([Reach(), Reach(window=4096)], 4096, 1.0),  # Gemma 2, whose window is no shorter than such a sequence
    ],
)
def test_what_a_sequence_takes_where_layers_have_windows(reaches: list[Reach], tokens: int, share: float) -> None:
    """Chunks of 2048 tokens, the default; the planner serves as long a sequence as fits in the same memory."""
    most = most_blocks(tokens, 16, reaches, 2048)
    assert most / (len(reaches) * tokens // 16) == pytest.approx(share, abs=0.005)
    memory_of_it = most * 16 * 1000 // len(reaches)
    config = EngineConfig(model="x", kv_cache_memory=memory_of_it)
    found = memory.size_cache(config, 1000, 10**6, CPU, reaches=reaches, longest_chunk=2048)
    assert tokens <= found.max_model_len
    ends = Reach() in reaches  # where all layers have a window, nothing grows
    assert (most_blocks(found.max_model_len + 1, 16, reaches, 2048) > found.blocks) == ends
