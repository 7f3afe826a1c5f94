"""The C backend with every instruction set that this machine has, against the reference over poisoned caches."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from attention import NAME, AttentionBatch, AttentionError, AttentionSpec, KVCache, UnsupportedAttention, select
from attention.cpu import PATHS, CpuBackend
from attention.kv_cache import StaticScales
from attention.reference import ReferenceBackend
from quant.kernels import native
from tests.attention.agreement import QUANTIZED, WIDE, WIDE_LENGTHS, WIDE_STEPS, agree, agree_on_shared_keys
from tests.attention.paging import poisoned_cache, scattered_tables, tensors_of
from tests.attention.serving import relative_error, serve
from tests.attention.test_hf import MIXED, PACKED, PROMPTS, TOLERANCE, alone_logits, specs_of
from tests.attention.test_reference import BASE, SPECS, Sequences
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=PATHS)
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    """One path, by its argument; those that this machine lacks are skipped."""
    backend = CpuBackend(native.build, request.param)
    if PATHS[backend.path] != request.param:
        pytest.skip(f"no {request.param} here")
    return backend


@pytest.mark.parametrize("name", SPECS)
def test_every_option(backend: CpuBackend, name: str) -> None:
    agree(backend, CPU, SPECS[name])


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WIDE)
def test_wide_heads_and_large_groups(backend: CpuBackend, name: str, model: torch.dtype) -> None:
    agree(backend, CPU, WIDE[name], model, lengths=WIDE_LENGTHS, steps=WIDE_STEPS)


@pytest.mark.parametrize("stored", [torch.bfloat16, *QUANTIZED])
@pytest.mark.parametrize("name", ["gqa", "key-longer-than-value", "latent", "chunk-and-everything"])
def test_caches_of_another_dtype(backend: CpuBackend, name: str, stored: torch.dtype) -> None:
    agree(backend, CPU, SPECS[name], stored=stored)


@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [None, *QUANTIZED])
@pytest.mark.parametrize("name", ["dim-80", "everything", "odd-group"])
def test_half_precision(backend: CpuBackend, name: str, model: torch.dtype, stored: torch.dtype | None) -> None:
    agree(backend, CPU, SPECS[name], model, stored)


@pytest.mark.parametrize(("stored", "model"), [(torch.float8_e4m3fn, torch.float32), (torch.int8, torch.bfloat16)])
@pytest.mark.parametrize("static", ["kv", "k", "v"])
def test_scales_that_are_given(backend: CpuBackend, static: str, stored: torch.dtype, model: torch.dtype) -> None:
    agree(backend, CPU, SPECS["gqa"], model, stored, static=static)


def test_keys_and_values_of_another_call(backend: CpuBackend) -> None:
    agree_on_shared_keys(backend, CPU, SPECS["gqa"])


@pytest.mark.parametrize("block_size", [1, 16, 80])
@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_pages_of_any_size(backend: CpuBackend, block_size: int, stored: torch.dtype) -> None:
    agree(backend, CPU, SPECS["window-4"], block_size=block_size, stored=stored)


@pytest.mark.parametrize("length", [15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 200])
def test_lengths_around_the_edges_of_pages_and_blocks(backend: CpuBackend, length: int) -> None:
    steps = [{0: length - 2}, {0: 1}, {0: 1}]
    agree(backend, CPU, BASE, block_size=16, lengths=[length], steps=steps)
    agree(backend, CPU, replace(BASE, window=70), torch.bfloat16, block_size=16, lengths=[length], steps=steps)


@pytest.mark.parametrize("spec", [replace(BASE, chunk=50, heads=8, kv_heads=1), replace(BASE, window=65, sinks=True)])
def test_prompts_of_many_tiles(backend: CpuBackend, spec: AttentionSpec) -> None:
    """More rows than a tile has, more keys than a block; tiles begin in the middle of a chunk and of a query's heads."""
    steps = [{0: 30, 1: 77}, {0: 90, 1: 1}, {0: 1, 1: 60}]
    agree(backend, CPU, spec, block_size=16, lengths=[121, 138], steps=steps)


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 900, "sinks": True, "softcap": 2.0}])
def test_keys_in_parts_for_several_threads(
    backend: CpuBackend, options: dict[str, float], model: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query of one key head is work for all threads: each takes a part of the keys."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    spec = AttentionSpec(4, 1, 64, 64, scale=0.125, **options)
    agree(backend, CPU, spec, model, block_size=16, lengths=[1200], steps=[{0: 1199}, {0: 1}])


def test_pages_that_left_the_window_are_not_read(backend: CpuBackend) -> None:
    spec = SPECS["window-4"]
    sequences = Sequences.random(spec, [20])
    cache = poisoned_cache([spec], 20, 3)
    tables = scattered_tables([20], cache)
    for start, stop in ((0, 19), (19, 20)):
        q, k, v = (tensors[0][start:stop] for tensors in (sequences.q, sequences.k, sequences.v))
        batch = AttentionBatch.pack([stop - start], [stop], tables, 3)
        out = backend.forward(0, spec, q, k, v, batch, cache, None)
        for block in tables[0][: (20 - 4) // 3]:
            cache.k[0][block] = torch.nan
            cache.v[0][block] = torch.nan
    torch.testing.assert_close(out.double(), sequences.expected(0)[19:], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_numbers_that_are_hard_to_quantize(backend: CpuBackend, dtype: torch.dtype) -> None:
    """Rows of zeros, rows with one large number, rows that become subnormal codes: the same bytes as the definition."""
    spec = AttentionSpec(2, 2, 24, 8, scale=0.2)
    caches = [poisoned_cache([spec], 60, 4, dtype) for _ in range(2)]
    k, v = torch.randn(60, 2, 24), torch.randn(60, 2, 8)
    k[:5], v[3:7] = 0, 0
    k[10:20] *= torch.exp(8 * torch.randn(10, 2, 24))
    v[20:30] *= 1e-9
    batch = AttentionBatch.pack([60], [60], scattered_tables([60], caches[0]), 4)
    for each, cache in zip((ReferenceBackend(), backend), caches, strict=True):
        each.forward(0, spec, torch.randn(60, 2, 24), k, v, batch, cache, None)
    for wanted, got in zip(*map(tensors_of, caches), strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, *QUANTIZED])
def test_what_is_not_finite_is_not_hidden(backend: CpuBackend, stored: torch.dtype, static: bool) -> None:
    """Three sequences of one token: a clean one, one with a NaN and one with an infinity."""
    cache = poisoned_cache([BASE], 8, 4, stored)
    if static:
        cache.static = [StaticScales(*torch.full((2, BASE.kv_heads), 0.01))]
    q, k = torch.ones(3, 4, 8), torch.ones(3, 2, 8)
    k[1, 0, 3], k[2, 1, 5] = torch.nan, torch.inf
    batch = AttentionBatch.pack([1, 1, 1], [1, 1, 1], [[0], [1], [2]], 4)
    out = backend.forward(0, BASE, q, k, k, batch, cache, None)
    assert not out[1, :2].isfinite().any()
    assert not out[2, 2:].isfinite().any()
    assert torch.cat([out[0], out[1, 2:], out[2, :2]]).isfinite().all()


def test_rows_without_tokens_and_views_with_strides(backend: CpuBackend) -> None:
    """A sequence without new tokens between two others; queries, keys and values as a fused projection leaves them."""
    fused = torch.randn(6, 8, 3, 8)
    q, k, v = fused[:, :4, 0], fused[:, 4:6, 1], fused[:, 6:, 2].transpose(1, 2).contiguous().transpose(1, 2)
    plain = AttentionBatch.pack([5, 1], [5, 1], [[0, 1], [2]], 4)
    starts = torch.tensor([0, 5, 5, 6], dtype=torch.int32)
    tables = plain.block_tables[[0, 0, 1]].contiguous()
    batch = replace(plain, query_starts=starts, block_tables=tables, kv_lens=starts.diff().int())
    caches = [poisoned_cache([BASE], 20, 4) for _ in range(2)]
    wanted = ReferenceBackend().forward(0, BASE, q, k, v, plain, caches[0], None)
    got = backend.forward(0, BASE, q, k, v, batch, caches[1], None)
    torch.testing.assert_close(got, wanted, rtol=3e-6, atol=3e-6)


def test_addresses_are_64_bit() -> None:
    """A page whose first element is beyond 2**31; nothing else of that cache is ever touched."""
    spec = AttentionSpec(16, 8, 128, 128, scale=0.1)
    last = 2**31 // (16 * 8 * 128) + 3
    cache = KVCache([], last + 1, 16, torch.bfloat16, CPU, [StaticScales()])
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        cache.k, cache.v = ([torch.empty(last + 1, 16, 8, 128, dtype=torch.bfloat16)] for _ in range(2))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    small = poisoned_cache([spec], 16, 16, torch.bfloat16)
    q, k, v = torch.randn(2, 16, 128).bfloat16(), torch.randn(2, 8, 128).bfloat16(), torch.randn(2, 8, 128).bfloat16()
    wanted = ReferenceBackend().forward(0, spec, q, k, v, AttentionBatch.pack([2], [2], [[0]], 16), small, None)
    batch = AttentionBatch.pack([2], [2], [[last]], 16)
    got = CpuBackend(native.build).forward(0, spec, q, k, v, batch, cache, None)
    torch.testing.assert_close(got, wanted, rtol=1.6e-2, atol=1.6e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "llama4", "phimoe", "deepseek_v3", "diffllama"])
def test_logits_are_those_of_each_sequence_alone(name: str) -> None:
    backend, model = CpuBackend(native.build), tiny_model(name, NAME)
    for steps in (PACKED, MIXED):
        for got, wanted in zip(serve(model, specs_of(name), PROMPTS, steps, backend), alone_logits(name), strict=True):
            assert relative_error(got, wanted) < TOLERANCE


# Which backend runs ---------------------------------------------------------------------------------------------------


def test_it_is_preferred_on_a_cpu_and_says_what_it_uses() -> None:
    selection = select([BASE], CPU, build=native.build)
    assert selection.backend.name == "cpu"
    assert any(path in selection.backend.summary for path in PATHS)
    assert (
        select([BASE], torch.device("meta"), build=native.build)
        .refusals["cpu"]
        .startswith("runs on a CPU, not on meta")
    )


def test_without_a_compiler_the_reference_runs_and_says_why(tmp_path: Path) -> None:
    def build(*sources: Path) -> ctypes.CDLL | str:
        return "no C compiler found"

    for build_or_none, reason in ((build, "no C compiler found"), (None, "pass build to attention.select")):
        selection = select([BASE], CPU, build=build_or_none)
        assert selection.backend.name == "reference"
        assert reason in selection.refusals["cpu"]
        with pytest.raises(UnsupportedAttention, match=reason):
            select([BASE], CPU, "cpu", build_or_none)


def test_what_it_cannot_compute_is_named() -> None:
    cache = poisoned_cache([BASE], 8, 4, torch.float64)
    batch = AttentionBatch.pack([1], [1], [[0]], 4)
    forward = partial(CpuBackend(native.build).forward, 0, BASE, batch=batch, cache=cache, sinks=None)
    q, k = torch.ones(1, 4, 8, dtype=torch.float64), torch.ones(1, 2, 8, dtype=torch.float64)
    with pytest.raises(AttentionError, match=r"torch\.float64"):
        forward(q=q, k=k, v=k)
