"""What quantizing a key or value keeps, and how it is asked for."""

from __future__ import annotations

import pytest
import torch

from attention import AttentionBatch, AttentionError
from attention.kv_dtypes import LARGEST_CODE, cache_dtype, dequantize, quantize
from attention.reference import ReferenceBackend
from tests.attention.paging import poisoned_cache, scattered_tables
from tests.attention.test_reference import BASE, Sequences

RELATIVE = {torch.float8_e4m3fn: 2**-4, torch.int8: 0.0}
ABSOLUTE = {torch.float8_e4m3fn: 2**-10 / 448, torch.int8: 0.5 / 127}
"""Half a step of the code: of the number itself where codes are floating, and of the largest number of its vector."""


def test_names() -> None:
    assert cache_dtype("auto", torch.float16) == torch.float16
    assert cache_dtype("bf16", torch.float16) == torch.bfloat16
    assert cache_dtype("fp8_e4m3", torch.float16) == torch.float8_e4m3fn
    assert cache_dtype("int8", torch.float16) == torch.int8
    assert (cache_dtype("fp16", torch.float32), cache_dtype("fp32", torch.float16)) == (torch.float16, torch.float32)
    with pytest.raises(AttentionError, match="'fp4'; known: auto, bf16, fp16, fp32, fp8_e4m3, int8"):
        cache_dtype("fp4", torch.float16)


@pytest.mark.parametrize("dtype", LARGEST_CODE)
def test_the_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, 80) * torch.logspace(-6, 4, 50)[:, None, None]
    error = (dequantize(*quantize(x, dtype)) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    assert (error <= 1.0001 * torch.maximum(RELATIVE[dtype] * x.abs(), ABSOLUTE[dtype] * largest)).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", LARGEST_CODE)
def test_zeros_stay_zero_and_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    values = dequantize(*quantize(x, dtype))
    assert values[0].eq(0).all()
    assert values[1:].isnan().all()


def test_a_given_scale_is_kept_and_what_it_cannot_hold_saturates() -> None:
    x = torch.tensor([[[1.0, -300.0, 0.25], [448.0, 2.0, -1e6]], [[0.0, 0.0, 0.0], [torch.inf, 1.0, 1.0]]])
    codes, scale = quantize(x, torch.float8_e4m3fn, torch.tensor([0.5, 2.0]))
    assert codes[:, 0].tolist() == [[2.0, -448.0, 0.5], [0.0, 0.0, 0.0]]  # -600 is beyond
    assert codes[0, 1].tolist() == [224.0, 1.0, -448.0]
    assert scale[:, 0].tolist() == [0.5, 0.5]
    assert scale[0, 1] == 2.0
    assert scale[1, 1].isnan(), "an infinity would be 448"


@pytest.mark.parametrize("dtype", LARGEST_CODE)
def test_the_reference_attends_to_what_is_stored(dtype: torch.dtype) -> None:
    """Rounded keys and values as definition has them, not only nearly the exact ones."""
    lengths = [9, 4]
    exact = Sequences.random(BASE, lengths)

    def rounded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [dequantize(*quantize(tensor, dtype)) for tensor in tensors]

    stored = Sequences(BASE, exact.q, rounded(exact.k), rounded(exact.v), None)
    cache = poisoned_cache([BASE], 20, 3, dtype)
    tables = scattered_tables(lengths, cache)
    joined = [torch.cat(tensors) for tensors in (exact.q, exact.k, exact.v)]
    batch = AttentionBatch.pack(lengths, lengths, tables, 3)
    got = ReferenceBackend().forward(0, BASE, *joined, batch, cache, None).split(lengths)
    for sequence, rows in enumerate(got):
        torch.testing.assert_close(rows.double(), stored.expected(sequence), rtol=2e-5, atol=2e-6)
        assert (rows.double() - exact.expected(sequence)).abs().max() > 1e-4
