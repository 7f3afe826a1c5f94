"""Quantized inputs against the definitions of those who write them."""

from __future__ import annotations

import pytest
import torch

from quant.activation import quantize_dequantize
from quant.base import LinearShape, QuantWeight, Scheme, WeightKind
from quant.kernels.cpu import CpuKernel
from quant.packing import E2M1_VALUES
from quant.reference import linear
from quant.scheme import Activation, ScaleRule

FP8, INT8, E2M1 = WeightKind.FP8, WeightKind.INT8, WeightKind.E2M1


def rounded(x: torch.Tensor, how: Activation, scale: float | None = None, zero: float | None = None) -> torch.Tensor:
    stored = [None if value is None else torch.tensor([value]) for value in (scale, zero)]
    return quantize_dequantize(x, how, stored[0], stored[1])


def test_int8_per_token_has_the_range_of_the_token() -> None:
    x = torch.tensor([[127.5, 1.4, -127.5], [0.0, 0.0, 0.0]])
    assert rounded(x, Activation(INT8)).tolist() == [[127.0, 1.0, -128.0], [0.0, 0.0, 0.0]]


def test_static_scales_clamp() -> None:
    assert rounded(torch.tensor([[1000.0, -3.0]]), Activation(FP8, static=True), scale=0.5).tolist() == [[224.0, -3.0]]
    how = Activation(INT8, static=True, symmetric=False)
    assert rounded(torch.tensor([[-1.0, 300.0, 7.2]]), how, scale=1.0, zero=-128.0).tolist() == [[0.0, 255.0, 7.0]]


def test_asymmetric_ranges_keep_zero_exact() -> None:
    x = torch.rand(5, 33) + 3
    x[:, 7] = 0
    found = rounded(x, Activation(INT8, symmetric=False))
    assert (found[:, 7] == 0).all()
    assert (found - x).abs().max() <= x.max() / 255


def test_groups_have_scales_of_their_own_and_the_last_may_be_short() -> None:
    x = torch.cat([torch.full((1, 128), 448.0), torch.full((1, 72), 1e-3)], dim=1)
    torch.testing.assert_close(rounded(x, Activation(FP8, group=128)), x)
    assert not torch.equal(rounded(x, Activation(FP8)), x)


def test_e2m1_rounds_ties_to_the_even_code() -> None:
    how = Activation(E2M1, static=True)
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 9.0]])
    assert rounded(ties, how, scale=1.0).tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0]]
    table = torch.tensor([E2M1_VALUES])
    assert torch.equal(rounded(table, how, scale=1.0), table)


def test_local_scales_are_e4m3_under_the_global_one() -> None:
    x, largest = torch.randn(3, 64), 4.0
    stored = 448 * 6 / largest
    found = rounded(x, Activation(E2M1, group=16, rule=ScaleRule.LOCAL), scale=stored)
    local = x.view(3, 4, 16).abs().amax(-1) / 6 * stored
    scale = local.to(torch.float8_e4m3fn).float() / stored
    codes = (found.view(3, 4, 16) / scale[..., None]).flatten()
    assert torch.isclose(codes[:, None], torch.tensor(E2M1_VALUES), rtol=1e-5, atol=1e-6).any(1).all()


@pytest.mark.parametrize(
    ("largest", "scale"), [(448.0, 1.0), (449.0, 2.0), (400.0, 1.0), (3.5, 2.0**-7), (224.0, 0.5), (223.0, 0.5)]
)
def test_scales_that_are_powers_of_two_rounded_up(largest: float, scale: float) -> None:
    x = torch.tensor([[largest, scale * 1.03125]])  # 1.03125 is between 1 and 1.125 and falls to 1
    assert rounded(x, Activation(FP8, rule=ScaleRule.POWER_UP))[0, 1] == scale


@pytest.mark.parametrize(("largest", "scale"), [(6.9, 1.0), (7.0, 2.0), (4.0, 1.0), (3.9, 1.0), (3.4, 0.5)])
def test_microscaling_scales_leave_the_exponent_of_the_largest(largest: float, scale: float) -> None:
    x = torch.tensor([[largest, scale * 0.7]])  # falls to half the scale
    assert rounded(x, Activation(E2M1, group=32, rule=ScaleRule.POWER))[0, 1] == scale / 2


def test_fbgemm_clamps_the_scale() -> None:
    x = torch.tensor([[5000.0, 1200.0, 3.0]])
    found = rounded(x, Activation(FP8, clamp=1200.0))
    torch.testing.assert_close(found[0, :2], torch.tensor([1200.0, 1200.0]))


def test_llm_int8_leaves_outliers_exact_and_out_of_the_scale() -> None:
    x = torch.randn(4, 64).clamp(-2, 2)
    x[1, 5] = 100.125
    found = rounded(x, Activation(INT8, threshold=6.0))
    assert found[1, 5] == 100.125
    assert (found - x).abs().max() <= 2 / 127 / 2 + 1e-6
    assert (rounded(x, Activation(INT8, threshold=0.0)) - x)[1].abs().max() > 0.1, "0 means no outliers"


@pytest.mark.parametrize(
    "how",
    [Activation(INT8), Activation(FP8, group=16), Activation(INT8, threshold=3.0), Activation(INT8, symmetric=False)],
    ids=str,
)
def test_a_token_does_not_depend_on_the_others(how: Activation) -> None:
    x = torch.randn(2, 7, 40) * torch.logspace(-2, 2, 7)[:, None]
    alone = torch.cat([rounded(x[:, t : t + 1], how) for t in range(7)], dim=1)
    assert torch.equal(rounded(x, how), alone)


def test_one_scale_for_all_tokens_together() -> None:
    x = torch.tensor([[[127.0, 1.2], [63.4, 0.3]]])
    step = 127 / 127.5
    torch.testing.assert_close(rounded(x, Activation(INT8, whole=True)) / step, torch.tensor([[[127.0, 1], [64, 0]]]))
    assert rounded(x, Activation(INT8))[0, 1, 1] != 0
    assert rounded(x[:, :0], Activation(INT8, whole=True)).shape == (1, 0, 2)


def test_the_reference_executes_it() -> None:
    shape, how = LinearShape(32, 8), Activation(INT8)
    scheme = Scheme(WeightKind.INT4, (1, 32), activation=how)
    weight = QuantWeight(scheme, shape, torch.randint(0, 256, (8, 16), dtype=torch.uint8), torch.rand(8, 1))
    x = torch.randn(3, 32)
    plain = QuantWeight(Scheme(WeightKind.INT4, (1, 32)), shape, weight.q, weight.scale)
    assert torch.equal(linear(x, weight), linear(rounded(x, how), plain))
    assert not torch.equal(linear(x, weight), linear(x, plain))


def test_the_c_kernel_refuses_scales_that_belong_to_no_row() -> None:
    scheme = Scheme(WeightKind.NF4, (1, 48), flat=True)
    assert "over row ends" in (CpuKernel().refuses(scheme, LinearShape(64, 64), torch.device("cpu")) or "")
