"""The reference backend against a loop over tokens written from the definition, over a cache of NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from attention import AttentionBatch, AttentionSpec, KVCache, UnsupportedAttention
from attention import reference as module
from attention.reference import ReferenceBackend
from tests.attention.paging import poisoned_cache, scattered_tables

BASE = AttentionSpec(heads=4, kv_heads=2, key_dim=8, value_dim=8, scale=8**-0.5)
SPECS = {
    "gqa": BASE,
    "mha": replace(BASE, kv_heads=4),
    "mqa": replace(BASE, kv_heads=1),
    "odd-group": replace(BASE, heads=6),
    "dim-80": replace(BASE, key_dim=80, value_dim=80, scale=80**-0.5),
    "dim-96": replace(BASE, key_dim=96, value_dim=96, scale=96**-0.5),
    "key-longer-than-value": replace(BASE, key_dim=12, value_dim=5),
    "value-longer-than-key": replace(BASE, key_dim=5, value_dim=12),
    "scale": replace(BASE, scale=1.3),
    "window-1": replace(BASE, window=1),
    "window-4": replace(BASE, window=4),
    "window-longer-than-all": replace(BASE, window=1000),
    "chunk-5": replace(BASE, chunk=5),
    "chunk-1": replace(BASE, chunk=1),
    "softcap": replace(BASE, softcap=0.5),
    "sinks": replace(BASE, sinks=True),
    "latent": replace(BASE, kv_heads=1, key_dim=20, value_dim=16, latent=True),
    "latent-and-window": AttentionSpec(6, 2, 12, 5, scale=0.7, window=6, latent=True),
    "everything": AttentionSpec(6, 2, 12, 5, scale=0.7, window=6, softcap=0.8, sinks=True),
    "chunk-and-everything": AttentionSpec(6, 3, 5, 12, scale=0.7, chunk=7, softcap=0.8, sinks=True),
}


@dataclass
class Sequences:
    """Whole sequences: everything that their tokens ever ask, and the attention they should get."""

    spec: AttentionSpec
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    sinks: Tensor | None

    @classmethod
    def random(cls, spec: AttentionSpec, lengths: list[int], dtype: torch.dtype = torch.float32) -> Sequences:
        def tensors(heads: int, dim: int) -> list[Tensor]:
            return [torch.randn(length, heads, dim).to(dtype) for length in lengths]

        sinks = torch.randn(spec.heads).to(dtype) if spec.sinks else None
        kv = spec.kv_heads
        q, k = tensors(spec.heads, spec.key_dim), tensors(kv, spec.key_dim)
        v = [keys[..., : spec.value_dim] for keys in k] if spec.latent else tensors(kv, spec.value_dim)
        return cls(spec, q, k, v, sinks)

    def expected(self, sequence: int) -> Tensor:
        """Token by token, in float64, over exactly the keys that the definition names."""
        q, k, v = (tensors[sequence].double() for tensors in (self.q, self.k, self.v))
        return torch.stack([self._attend(q[token], k, v, token) for token in range(len(q))])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, token: int) -> Tensor:
        spec = self.spec
        first = 0
        if spec.window is not None:
            first = max(0, token - spec.window + 1)
        if spec.chunk is not None:
            first = token - token % spec.chunk
        shared = torch.arange(spec.heads) // (spec.heads // spec.kv_heads)  # [H]: the key head of each query head
        k, v = k[first : token + 1, shared], v[first : token + 1, shared]  # [keys, H, D]
        scores = (q * k).sum(-1) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        weights = scores.exp()
        total = weights.sum(0)
        if self.sinks is not None:
            total = total + self.sinks.double().exp()
        return ((weights / total)[:, :, None] * v).sum(0)


def run(sequences: Sequences, steps: list[dict[int, int]], block_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Feed ``steps`` (sequence -> new tokens, in that order) through pages; what every token of every sequence got."""
    lengths = [len(q) for q in sequences.q]
    cache = poisoned_cache([sequences.spec] * 2, sum(lengths) + 3 * len(lengths), block_size, dtype)
    tables = scattered_tables(lengths, cache)
    got: list[list[Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    for step in steps:
        q, k, v = (
            torch.cat([tensors[s][done[s] : done[s] + count] for s, count in step.items()])
            for tensors in (sequences.q, sequences.k, sequences.v)
        )
        for sequence, count in step.items():
            done[sequence] += count
        batch = AttentionBatch.pack(list(step.values()), [done[s] for s in step], [tables[s] for s in step], block_size)
        out = ReferenceBackend().forward(1, sequences.spec, q, k, v, batch, cache, sequences.sinks)
        assert out.dtype == q.dtype
        assert out.is_contiguous()
        for (sequence, _), rows in zip(step.items(), out.split(list(step.values())), strict=True):
            got[sequence].append(rows)
    assert done == lengths
    assert all(tensor.isnan().all() for tensor in (cache.k[0], cache.v[0])), "the pair of another call was written"
    assert only_own_slots_written(cache, tables, lengths)
    return [torch.cat(rows) for rows in got]


def only_own_slots_written(cache: KVCache, tables: list[list[int]], lengths: list[int]) -> bool:
    size = cache.block_size
    own = {
        table[p // size] * size + p % size for table, length in zip(tables, lengths, strict=True) for p in range(length)
    }
    written = ~cache.k[1].isnan().flatten(0, 1).flatten(1).any(1)
    return set(written.nonzero().flatten().tolist()) == own


LENGTHS = [11, 1, 13, 6]
WHOLE = [dict(enumerate(LENGTHS))]
MIXED = [{2: 7, 0: 4}, {0: 1, 1: 1, 2: 1}, {3: 5, 0: 5, 2: 2}, {3: 1, 0: 1, 2: 1}, {2: 2}]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("steps", [WHOLE, MIXED], ids=["whole", "mixed"])
@pytest.mark.parametrize("name", SPECS)
def test_every_token_gets_what_the_definition_says(name: str, steps: list[dict[int, int]], block_size: int) -> None:
    sequences = Sequences.random(SPECS[name], LENGTHS)
    for sequence, got in enumerate(run(sequences, steps, block_size, torch.float32)):
        torch.testing.assert_close(got.double(), sequences.expected(sequence), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["window-4", "chunk-5", "softcap", "sinks", "scale"])
def test_every_option_bites(name: str) -> None:
    sequences = Sequences.random(SPECS[name], LENGTHS)
    plain = replace(sequences, spec=BASE, sinks=None)
    assert (sequences.expected(0) - plain.expected(0)).abs().max() > 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("name", ["gqa", "window-4", "everything"])
def test_half_precision_is_off_by_the_rounding_of_the_result(name: str, dtype: torch.dtype, tolerance: float) -> None:
    sequences = Sequences.random(SPECS[name], LENGTHS, dtype)
    for sequence, got in enumerate(run(sequences, MIXED, 3, dtype)):
        torch.testing.assert_close(got.double(), sequences.expected(sequence), rtol=tolerance, atol=1e-5)


def test_the_cache_may_be_of_another_dtype_than_the_model() -> None:
    sequences = Sequences.random(BASE, LENGTHS)
    rounded = replace(sequences, k=[k.bfloat16() for k in sequences.k], v=[v.bfloat16() for v in sequences.v])
    for sequence, got in enumerate(run(sequences, MIXED, 3, torch.bfloat16)):
        torch.testing.assert_close(got.double(), rounded.expected(sequence), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", SPECS)
def test_decoding_together_equals_prefilling_alone(name: str) -> None:
    """The tile of all decoding sequences against the tiles of one sequence each."""
    lengths = [9, 4, 12]
    sequences = Sequences.random(SPECS[name], lengths)
    together = [{s: lengths[s] - 2 for s in range(3)}, {2: 1, 0: 1, 1: 1}, {0: 1, 1: 1, 2: 1}]
    alone = [{s: lengths[s]} for s in range(3)]
    for got, wanted in zip(
        run(sequences, together, 3, torch.float32), run(sequences, alone, 3, torch.float32), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gqa", "window-4", "chunk-5", "everything"])
def test_a_long_prompt_is_cut_into_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 4)
    sequences = Sequences.random(SPECS[name], [21, 5])
    for sequence, got in enumerate(run(sequences, [{0: 6, 1: 5}, {0: 15}], 3, torch.float32)):
        torch.testing.assert_close(got.double(), sequences.expected(sequence), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["window-4", "chunk-5"])
def test_only_keys_in_reach_are_gathered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    attend = module.attend

    def spy(spec: AttentionSpec, q: Tensor, k: Tensor, *rest: Tensor | None) -> Tensor:
        gathered.append(k.shape[1])
        return attend(spec, q, k, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "attend", spy)
    run(Sequences.random(SPECS[name], [40, 30]), [{0: 39, 1: 29}, {0: 1, 1: 1}], 3, torch.float32)
    assert gathered[-1] <= 5


def test_pages_that_left_the_window_are_not_read() -> None:
    spec = SPECS["window-4"]
    sequences = Sequences.random(spec, [20])
    cache = poisoned_cache([spec], 20, 3)
    tables = scattered_tables([20], cache)
    backend = ReferenceBackend()

    def step(start: int, stop: int) -> Tensor:
        q, k, v = (tensors[0][start:stop] for tensors in (sequences.q, sequences.k, sequences.v))
        return backend.forward(0, spec, q, k, v, AttentionBatch.pack([stop - start], [stop], tables, 3), cache, None)

    step(0, 19)
    for block in tables[0][: (20 - 4) // 3]:
        cache.k[0][block] = torch.nan
        cache.v[0][block] = torch.nan
    torch.testing.assert_close(step(19, 20).double(), sequences.expected(0)[19:], rtol=2e-5, atol=2e-6)


def test_positions_are_the_last_of_each_sequence() -> None:
    batch = AttentionBatch.pack([5, 1, 3], [5, 12, 8], [[0, 1], [2, 3, 4], [5, 6]], 4)
    assert batch.positions().tolist() == [0, 1, 2, 3, 4, 11, 5, 6, 7]
    assert batch.slots.tolist() == [0, 1, 2, 3, 4, 19, 25, 26, 27]
    assert batch.query_starts.tolist() == [0, 5, 6, 9]
    assert (batch.max_query, batch.max_kv) == (5, 12)


def test_slots_and_offsets_are_64_bit() -> None:
    """A cache of more than 2 ** 31 elements must not wrap around."""
    assert AttentionBatch.pack([1], [1], [[2**30]], 16).slots.tolist() == [2**34]


def test_uneven_groups_are_refused() -> None:
    with pytest.raises(UnsupportedAttention, match="5 query heads cannot share 2 key heads"):
        replace(BASE, heads=5)


def test_a_spec_prints_what_is_special() -> None:
    assert str(BASE) == "4 heads, 2 kv heads, dim 8, scale 0.353553"
    assert str(SPECS["everything"]) == "6 heads, 2 kv heads, dim 12/5, scale 0.7, window 6, softcap 0.8, sinks"
