"""Linear layers multiplied at once give the bits that each gives by itself, whatever a model does with them. Many rows, for
which torch multiplies, are left to it: how it orders its additions depends on the number of outputs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quant.base import LinearShape, QuantWeight, Scheme, WeightKind, canonical_specs
from quant.dense import join_dense, take_over
from quant.kernels.cpu import CpuKernel
from quant.linear import QuantLinear, finish_together
from quant.siblings import Siblings, joined
from tests.quant.test_kernels import Case

ROWS = (1, 3, 8)
MANY = 100
UNIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the largest output."""

FAMILIES = {
    "int4 with zero points": [Case(n, 256, (1, 64), zero_point=True) for n in (64, 32, 32)],
    "no whole tiles": [Case(n, 192, (1, 64)) for n in (33, 7, 50)],
    "int3": [Case(n, 100, (1, 20), "int3", zero_point=True) for n in (40, 41)],
    "nf4": [Case(n, 256, (1, 64), "nf4", scale=torch.float32) for n in (48, 16)],
    "fp8 with a scale a weight": [Case(n, 256, (n, 256), "fp8", scale=torch.float32) for n in (64, 33)],
    "fp8 in torn blocks": [Case(n, 256, (32, 128), "fp8", scale=torch.float32) for n in (40, 72)],
    "mxfp4": [Case(n, 128, (1, 32), "e2m1", scale=torch.float8_e8m0fnu) for n in (24, 40)],
}


def layer(weight: QuantWeight, kernel: CpuKernel, bias: Tensor | None = None) -> QuantLinear:
    """A repacked layer."""
    shape = replace(weight.shape, bias=bias is not None)
    made = QuantLinear(f"layer of {shape}", shape, weight.scheme, kernel, {}, torch.float32)
    made.quant_weight = weight
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def weights_of(family: str) -> list[QuantWeight]:
    """Weights that agree in what siblings have in common."""
    first, *others = [case.weight() for case in FAMILIES[family]]
    return [first, *(replace(weight, table=first.table) for weight in others)]


@pytest.mark.parametrize("path", ["amx", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_alone(family: str, path: str) -> None:
    kernel = CpuKernel(path)
    weights = weights_of(family)
    biases = [None if i == 1 else torch.randn(weight.shape.out_features) for i, weight in enumerate(weights)]
    apart, together = (
        [layer(weight, kernel, bias) for weight, bias in zip(weights, biases, strict=True)] for _ in range(2)
    )
    for each in apart:
        each.prepare()
    finish_together(together)
    assert all(each.siblings is not None for each in together)
    for dtype in (torch.bfloat16, torch.float32):
        for rows in ROWS:
            x = torch.randn(rows, weights[0].shape.in_features).to(dtype)
            for one, other in zip(apart, together, strict=True):
                assert torch.equal(one(x), other(x)), (dtype, rows)


def test_act_order_is_joined_where_it_is_the_same() -> None:
    first, second = (Case(32, 256, (1, 64), act_order=True).weight() for _ in range(2))
    assert joined([first, second]) == "their order differ"
    assert not isinstance(joined([first, replace(second, order=first.order)]), str)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Case(32, 256, (1, 128)), "schemes"),
        (Case(32, 256, (1, 64), zero_point=True), "schemes"),
        (Case(32, 128, (1, 64)), "numbers of inputs"),
        (Case(32, 256, (1, 64), scale=torch.bfloat16), "dtypes"),
    ],
)
def test_what_differs_stays_apart_and_works(other: Case, why: str) -> None:
    weights = [Case(32, 256, (1, 64)).weight(), other.weight()]
    assert why in str(joined(weights))
    layers = [layer(weight, CpuKernel()) for weight in weights]
    finish_together(layers)
    for each in layers:
        assert each.siblings is None
        assert why in str(each.alone)
        assert torch.isfinite(each(torch.randn(2, each.in_features))).all()


def test_blocks_over_the_ends_of_rows_stay_apart() -> None:
    scheme = Scheme(WeightKind.INT8, (1, 64), flat=True)
    shape = LinearShape(48, 33)
    sizes = canonical_specs(scheme, shape)
    weight = QuantWeight(scheme, shape, torch.zeros(sizes["q"], dtype=torch.uint8), torch.ones(sizes["scale"]))
    assert "ends of rows" in str(joined([weight, weight]))


def test_global_scales_that_differ_stay_apart() -> None:
    first, second = (Case(32, 64, (1, 16), "e2m1", scale=torch.float8_e4m3fn, global_scale=True) for _ in range(2))
    weights = [first.weight(), replace(second.weight(), global_scale=torch.tensor([0.5]))]
    for weight in weights:
        assert weight.global_scale is not None
    weights[0] = replace(weights[0], scale=torch.ones(weights[0].scale.shape).to(torch.float8_e4m3fn))
    assert joined(weights) == "their global_scale differ"


class Counted:
    """Three layers of sizes 2, 1, 3: ``x`` times 1, 2, ... 6; counts its products."""

    def __init__(self) -> None:
        self.products = 0
        self.siblings = Siblings(self.multiply, (2, 1, 3))

    def multiply(self, x: Tensor) -> Tensor:
        self.products += 1
        return x * torch.arange(1.0, 7.0)

    def parts(self, *xs: Tensor) -> list[list[float]]:
        return [self.siblings.part(i, x).tolist() for i, x in enumerate(xs)]


def test_one_product_for_one_input() -> None:
    counted, x = Counted(), torch.ones(1)
    assert counted.parts(x, x, x) == [[1, 2], [3], [4, 5, 6]]
    assert counted.products == 1
    assert counted.siblings._done is None  # nothing is kept alive


def test_another_input_is_multiplied_by_itself() -> None:
    """As an adapter, a hook or another path through the model's code hands over."""
    counted, x = Counted(), torch.ones(1)
    assert counted.parts(x, x.clone(), 2 * x) == [[1, 2], [3], [8, 10, 12]]
    assert counted.products == 3
    assert counted.siblings.part(1, x).tolist() == [3]


def test_what_an_earlier_forward_left_is_never_found() -> None:
    """The very same tensor with other numbers in it, as static buffers are."""
    counted, x = Counted(), torch.ones(1)
    assert counted.siblings.part(0, x).tolist() == [1, 2]  # and then the forward fails
    x.mul_(10)
    assert counted.parts(x, x, x) == [[10, 20], [30], [40, 50, 60]]
    assert counted.siblings.part(2, x.mul_(10)).tolist() == [400, 500, 600]
    assert counted.parts(x.mul_(10), x) == [[1000, 2000], [3000]]


def test_dense_layers_share_memory_and_give_the_same() -> None:
    layers = [nn.Linear(64, n, bias=n != 8) for n in (24, 8, 40)]
    apart = deepcopy(layers)
    join_dense([take_over(each) for each in layers])
    x = torch.randn(3, 64)
    for one, other in zip(apart, layers, strict=True):
        assert torch.allclose(one(x), other(x), atol=1e-6)
        assert torch.equal(one.weight, other.weight)
        assert other.weight.is_contiguous()
    assert len({each.weight.untyped_storage().data_ptr() for each in layers}) == 1
    assert layers[0].weight.untyped_storage().nbytes() == 72 * 64 * 4
    with torch.no_grad():
        layers[1].weight.fill_(1)  # what is seen is what is multiplied
    assert torch.allclose(layers[1](x), x.sum(1, keepdim=True).expand(3, 8), atol=1e-5)
    moved = nn.ModuleList(layers).double()
    assert torch.allclose(moved[2](x.double()).float(), apart[2](x), atol=1e-6)
