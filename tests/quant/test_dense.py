"""The C product with a dense bfloat16 weight, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.dense import take_over
from quant.kernels import dense
from quant.kernels.cpu import PATHS

SIZES = [(1, 1), (7, 33), (33, 31), (64, 100), (130, 256), (4, 2080)]
ROWS = (1, 2, 3, 5, 6, 7, 13, 16)
ROUNDING = 4e-3
"""Relative root mean square error of a result in bfloat16."""

paths = [
    pytest.param(
        index,
        id=path,
        marks=pytest.mark.skipif(
            dense.SOURCE.refusal is not None or index > dense.SOURCE.widest, reason="not on this processor"
        ),
    )
    for index, path in enumerate(PATHS)
]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product that is left to torch."""
    left: list[int] = []
    multiply = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        left.append(x.shape[0])
        return multiply(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    return left


@pytest.mark.parametrize("path", paths)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size: tuple[int, int], path: int) -> None:
    outputs, inputs = size
    weight, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        for b in (None, bias):
            truth = x.double() @ weight.double().t() + (0 if b is None else b.double())
            found = dense.linear(x, weight, b, path)
            assert found.dtype == torch.bfloat16
            assert (found.double() - truth).norm() < ROUNDING * truth.norm() + 1e-30, rows


@pytest.mark.parametrize("path", paths)
def test_extreme_values(path: int) -> None:
    """The rest of a row that is no whole vector meets zeros, never its neighbour's infinities."""
    weight = torch.full((6, 37), 2.0, dtype=torch.bfloat16)
    weight[1::2] = torch.inf
    weight[4, 36] = torch.nan
    found = dense.linear(torch.ones(3, 37, dtype=torch.bfloat16), weight, None, path)
    assert (found[:, 0] == 74).all()
    assert (found[:, 2] == 74).all()
    assert found[:, 1::2].isinf().all()
    assert found[:, 4].isnan().all()
    large = torch.full((2, 64), 2.0**100, dtype=torch.bfloat16)
    assert dense.linear(large[:1], large, None, path).isinf().all()
    small = torch.full((2, 64), 2.0**-50, dtype=torch.bfloat16)
    assert torch.equal(dense.linear(small[:1], small, None, path), torch.full((1, 2), 2.0**-94, dtype=torch.bfloat16))


def test_what_goes_to_torch(products: list[int]) -> None:
    if not dense.takes(torch.ones(1, 1, dtype=torch.bfloat16)):
        pytest.skip("no compiler")
    weight = torch.randn(8, 64).bfloat16()
    for rows in (1, dense.MOST_ROWS, dense.MOST_ROWS + 1, 0):
        dense.linear(torch.randn(rows, 64).bfloat16(), weight, None)
    assert products == [dense.MOST_ROWS + 1, 0]
    dense.linear(torch.randn(64, 2).bfloat16().t(), weight, None)  # x with strides of its own is C's
    dense.linear(torch.randn(2, 64).bfloat16(), torch.randn(64, 8).bfloat16().t(), None)  # a weight is not
    assert products[2:] == [2]
    assert not dense.takes(weight.float())


def test_a_layer_keeps_what_others_see() -> None:
    layer = nn.Linear(64, 8, bias=True).bfloat16()
    x = torch.randn(1, 3, 64).bfloat16()
    expected, names = layer(x), list(layer.state_dict())
    taken = take_over(layer)
    taken.native = dense.takes(taken.weight)
    with torch.inference_mode():
        assert torch.allclose(taken(x).float(), expected.float(), atol=0.02)
    assert taken is layer
    assert list(layer.state_dict()) == names
    assert torch.equal(layer.float()(x.float()), F.linear(x.float(), layer.weight, layer.bias))  # and no C
