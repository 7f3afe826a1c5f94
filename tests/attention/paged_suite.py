"""The Triton backend against the reference, forward by forward, each over a poisoned cache of its own.

On a machine without a GPU, in Triton's interpreter, which has to be asked for before Triton is imported: test_paged does
it. On a machine with one: ``python -m pytest tests/attention/paged_suite.py``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from attention import AttentionBatch, AttentionSpec
from attention.kernels import decode as decoding
from attention.kernels.shape import interpreting
from attention.kernels.store_kv import store_kv
from attention.kv_cache import StaticScales
from attention.paged import PagedBackend
from attention.reference import ReferenceBackend
from tests.attention.agreement import QUANTIZED, WIDE, WIDE_LENGTHS, WIDE_STEPS, agree, agree_on_shared_keys
from tests.attention.paging import poisoned_cache, tensors_of
from tests.attention.test_reference import BASE, SPECS

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cpu" if interpreting() else "cuda")
check = partial(agree, PagedBackend(), DEVICE)
"""Every forward gives what the reference gives, and leaves the same bytes in the cache."""


@pytest.mark.parametrize("name", SPECS)
def test_every_option(name: str) -> None:
    check(SPECS[name])


@pytest.mark.parametrize("name", WIDE)
def test_wide_heads_and_large_groups(name: str) -> None:
    check(WIDE[name], lengths=WIDE_LENGTHS, steps=WIDE_STEPS)


@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize("name", ["gqa", "key-longer-than-value", "latent", "chunk-and-everything"])
def test_quantized_caches(name: str, stored: torch.dtype) -> None:
    check(SPECS[name], stored=stored)


@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [None, *QUANTIZED])
@pytest.mark.parametrize("name", ["dim-80", "everything"])
def test_half_precision(name: str, model: torch.dtype, stored: torch.dtype | None) -> None:
    check(SPECS[name], model, stored)


@pytest.mark.parametrize(("stored", "model"), [(torch.float8_e4m3fn, torch.float32), (torch.int8, torch.bfloat16)])
@pytest.mark.parametrize("static", ["kv", "k", "v"])
def test_scales_that_are_given(static: str, stored: torch.dtype, model: torch.dtype) -> None:
    check(SPECS["gqa"], model, stored, static=static)


def test_keys_and_values_of_another_call() -> None:
    agree_on_shared_keys(PagedBackend(), DEVICE, SPECS["gqa"])


@pytest.mark.parametrize("block_size", [1, 16, 80])
@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_pages_of_any_size(block_size: int, stored: torch.dtype) -> None:
    check(SPECS["window-4"], block_size=block_size, stored=stored)


@pytest.mark.parametrize("length", [15, 16, 17, 32, 33, 64])
def test_lengths_around_the_edges_of_pages_and_tiles(length: int) -> None:
    check(BASE, block_size=16, lengths=[length], steps=[{0: length - 2}, {0: 1}, {0: 1}])


@pytest.mark.parametrize("spec", [BASE, replace(BASE, window=70, sinks=True)])
def test_keys_split_over_programs(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than some sequences have tiles: a part that nobody wrote is not read."""
    monkeypatch.setattr(decoding, "splits_of", lambda *_: 5)
    check(spec, block_size=16, lengths=[150, 20, 1], steps=[{0: 149, 1: 19}, {0: 1, 1: 1, 2: 1}])


def test_numbers_that_are_hard_to_quantize() -> None:
    """Rows of zeros, a row with one large number, rows that become subnormal codes."""
    torch.manual_seed(0)
    spec = AttentionSpec(2, 2, 24, 8, scale=0.2)
    for dtype in QUANTIZED:
        caches = [poisoned_cache([spec], 60, 4, dtype, device) for device in ("cpu", DEVICE)]
        k, v = torch.randn(60, 2, 24), torch.randn(60, 2, 8)
        k[:5], v[3:7] = 0, 0
        k[10:20] *= torch.exp(8 * torch.randn(10, 2, 24))
        v[20:30] *= 1e-9
        slots = torch.randperm(60)
        caches[0].write(0, slots, k, v)
        store_kv(0, k.to(DEVICE), v.to(DEVICE), slots.to(DEVICE), caches[1])
        for wanted, got in zip(*map(tensors_of, caches), strict=True):
            assert torch.equal(got.cpu().view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("stored", QUANTIZED)
def test_what_is_not_finite_is_not_hidden_by_quantizing(stored: torch.dtype, static: bool) -> None:
    """Three sequences of one token: a clean one, one with a NaN and one with an infinity."""
    cache = poisoned_cache([BASE], 8, 4, stored, DEVICE)
    if static:
        cache.static = [StaticScales(*torch.full((2, BASE.kv_heads), 0.01, device=DEVICE))]
    q, k = torch.ones(3, 4, 8), torch.ones(3, 2, 8)
    k[1, 0, 3], k[2, 1, 5] = torch.nan, torch.inf
    batch = AttentionBatch.pack([1, 1, 1], [1, 1, 1], [[0], [1], [2]], 4, DEVICE)
    out = PagedBackend().forward(0, BASE, *(t.to(DEVICE) for t in (q, k, k)), batch, cache, None).cpu()
    assert out[1, :2].isnan().all()
    assert out[2, 2:].isnan().all()
    assert torch.cat([out[0], out[1, 2:], out[2, :2]]).isfinite().all()


def test_rows_without_tokens_and_views_with_strides() -> None:
    """A sequence without new tokens between two others; queries, keys and values as a fused projection leaves them."""
    torch.manual_seed(0)
    fused = torch.randn(6, 8, 3, 8)
    q, k, v = fused[:, :4, 0], fused[:, 4:6, 1], fused[:, 6:, 2].transpose(1, 2).contiguous().transpose(1, 2)
    empty = AttentionBatch.pack([5, 1], [5, 1], [[0, 1], [2]], 4, DEVICE)
    starts = torch.tensor([0, 5, 5, 6], dtype=torch.int32, device=DEVICE)
    tables = empty.block_tables[[0, 0, 1]].contiguous()
    batch = replace(empty, query_starts=starts, block_tables=tables, kv_lens=starts.diff().int())
    caches = [poisoned_cache([BASE], 20, 4, device=device) for device in ("cpu", DEVICE)]
    plain = AttentionBatch.pack([5, 1], [5, 1], [[0, 1], [2]], 4)
    wanted = ReferenceBackend().forward(0, BASE, q, k, v, plain, caches[0], None)
    inputs = (tensor.to(DEVICE) for tensor in (q, k, v))
    got = PagedBackend().forward(0, BASE, *inputs, batch, caches[1], None).cpu()
    torch.testing.assert_close(got, wanted, rtol=3e-6, atol=3e-6)


@pytest.mark.skipif(interpreting(), reason="the interpreter copies the cache, all 8 GiB of it")
def test_addresses_are_64_bit() -> None:
    """A page whose first element is beyond 2**31."""
    spec = AttentionSpec(16, 8, 128, 128, scale=0.1)
    last = 2**31 // (16 * 8 * 128) + 3
    cache = poisoned_cache([], 0, 16, torch.float16, DEVICE)
    cache.k = [torch.empty(last + 1, 16, 8, 128, dtype=torch.float16, device=DEVICE)]
    cache.v = [torch.empty_like(cache.k[0])]
    cache.static = [StaticScales()]
    small = poisoned_cache([spec], 16, 16, torch.float16)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 16, 128).half(), torch.randn(2, 8, 128).half(), torch.randn(2, 8, 128).half()
    wanted = ReferenceBackend().forward(0, spec, q, k, v, AttentionBatch.pack([2], [2], [[0]], 16), small, None)
    batch = AttentionBatch.pack([2], [2], [[last]], 16, DEVICE)
    got = PagedBackend().forward(0, spec, *(t.to(DEVICE) for t in (q, k, v)), batch, cache, None).cpu()
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
