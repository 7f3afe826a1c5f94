"""Integers times integers on a CPU: the inputs are rounded to the very codes of the reference, and nothing after that is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.activation import quantize_dequantize
from quant.base import Activation, LinearShape, QuantWeight, Scheme, WeightKind
from quant.kernels.cpu import VNNI, CpuKernel
from quant.kernels.cpu_layout import LARGEST_GROUP, CpuWeight
from quant.kernels.reference import ReferenceKernel
from quant.reference import dequantize
from tests.quant.test_kernels import CASES, CPU, TOLERANCE, Case, error, inputs

PER_TOKEN = Activation(WeightKind.INT8)
STATIC = Activation(WeightKind.INT8, static=True)
INTEGERS = [case for case in CASES if case.kind.startswith("int")]
ROWS = (0, 1, 2, 3, 8, 17, 70)


class Watched(CpuKernel):
    """Remembers whether it multiplied integers."""

    used = False

    def _directly(self, path: int, x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
        self.used = path == VNNI
        return super()._directly(path, x, weight, bias)


@pytest.fixture
def kernel() -> Iterator[Watched]:
    """One thread: starting more takes long for small weights on a busy machine."""
    kernel, before = Watched(), torch.get_num_threads()
    weight = Case(7, 64, (1, 64)).weight()
    refusal = kernel.refuses(weight.scheme, weight.shape, CPU)
    if refusal is not None or not kernel._vnni:
        pytest.skip(refusal or "this machine has no AVX512-VNNI")
    torch.set_num_threads(1)
    yield kernel
    torch.set_num_threads(before)


def with_inputs(weight: QuantWeight, how: Activation, scale: Tensor | None = None) -> QuantWeight:
    return replace(weight, scheme=replace(weight.scheme, activation=how), input_scale=scale)


def identity(size: int, how: Activation, scale: Tensor | None = None) -> QuantWeight:
    """Multiplying by it gives the inputs as they were rounded."""
    scheme = Scheme(WeightKind.INT8, (1, size), activation=how)
    q = torch.full((size, size), 128, dtype=torch.uint8) + torch.eye(size, dtype=torch.uint8)
    return QuantWeight(scheme, LinearShape(size, size), q, torch.ones(size, 1), input_scale=scale)


def extremes(size: int, dtype: torch.dtype) -> Tensor:
    """Rows of ordinary numbers, zeros, the smallest and the largest there are, one outlier, ties, and one sign."""
    x = inputs(10, size, dtype=dtype)
    x[1] = 0
    x[2] *= torch.finfo(dtype).tiny
    x[3] = x[3].sign() * torch.finfo(dtype).max
    x[4, size // 2] = 1000
    x[5] = torch.arange(size).remainder(256).sub(128).to(dtype) / 2
    x[6], x[7] = x[6].abs(), -x[7].abs()
    x[8] = torch.finfo(dtype).smallest_normal / 4
    x[9, :] = 127.5
    return x


def codes_by_steps(x: Tensor, group: int) -> Tensor:
    """What inputs are rounded to, before the product of code and step is rounded to their type: in float64."""
    parts = []
    for part in x.split(group, 1):
        rounded = quantize_dequantize(part, PER_TOKEN, None, None)
        step = (part.abs().amax(1, keepdim=True) / 127.5).double() if len(x) else part.double()
        parts.append((rounded / step).round() * step)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [1, 3, 16, 17, 100, 384])
def test_inputs_get_the_codes_of_the_reference(kernel: Watched, size: int, dtype: torch.dtype) -> None:
    x = extremes(size, dtype)
    for scale in (None, *(torch.tensor([0.0371], dtype=other) for other in TOLERANCE)):
        how = PER_TOKEN if scale is None else STATIC
        y = kernel.apply(x, kernel.prepare(identity(size, how, scale)), None)
        assert kernel.used
        assert torch.equal(y, quantize_dequantize(x, how, scale, None)), scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_that_is_not_finite_is_not_made_finite(kernel: Watched, dtype: torch.dtype) -> None:
    for how, scale in ((PER_TOKEN, None), (STATIC, torch.tensor([0.5]))):
        prepared = kernel.prepare(identity(48, how, scale))
        for value in (torch.nan, torch.inf, -torch.inf):
            x = inputs(3, 48, dtype=dtype)
            x[1, 40] = value
            expected = quantize_dequantize(x, how, scale, None)
            y = kernel.apply(x, prepared, None)
            assert torch.equal(y.isfinite().all(1), expected.isfinite().all(1)), (how, value)
            assert torch.equal(y[0], expected[0])


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (Case(33, 100, (1, 64), zero_point=True), Activation(WeightKind.INT8, group=64)),  # one group of two
        (Case(33, 100, (1, 20), "int3", act_order=True), PER_TOKEN),
        (Case(33, 100, (1, 100), "int8"), PER_TOKEN),
    ],
    ids=str,
)
def test_numbers_that_are_not_finite_come_out_where_the_reference_has_them(
    kernel: Watched, case: Case, how: Activation
) -> None:
    weight = with_inputs(case.weight(), how)
    prepared, reference = kernel.prepare(weight), ReferenceKernel()
    for dtype in TOLERANCE:
        x = inputs(9, 100, dtype=dtype)
        x[2, 99], x[4, 0], x[7, 50], x[8] = torch.nan, torch.inf, -torch.inf, torch.inf
        y, expected = kernel.apply(x, prepared, None), reference.apply(x, weight, None)
        assert kernel.used
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", INTEGERS, ids=str)
def test_products_of_codes_are_exact(kernel: Watched, case: Case, dtype: torch.dtype) -> None:
    weight = case.weight()
    hows = [PER_TOKEN, *([] if case.act_order else [Activation(WeightKind.INT8, group=case.block[1])])]
    for how in hows:
        quantized = with_inputs(weight, how)
        prepared, dense = kernel.prepare(quantized), dequantize(weight)
        for rows in ROWS:
            x, bias = inputs(rows, case.inputs, dtype=dtype), torch.randn(case.outputs).to(dtype)
            exact = codes_by_steps(x, how.group or case.inputs)
            for b in (None, bias):
                y = kernel.apply(x, prepared, b)
                assert y.dtype == dtype
                assert y.shape == (rows, case.outputs)
                if rows == 0:
                    continue
                assert kernel.used
                assert error(y, exact, dense, b) < TOLERANCE[dtype], (how, rows)
                if b is None and dtype == torch.bfloat16:  # nothing but the result is rounded to it
                    assert (y == (exact @ dense.double().T).to(dtype)).float().mean() > 0.98


@pytest.mark.parametrize(("kind", "largest"), [("int8", 255), ("int4", 15)])
def test_the_largest_sums_fit(kernel: Watched, kind: str, largest: int) -> None:
    """All of one sign, the most inputs that share a scale: the result has one rounding, that of the sum to float32."""
    bits, inputs_ = WeightKind(kind).bits, LARGEST_GROUP
    scheme = Scheme(WeightKind(kind), (1, inputs_), zero_point=True, activation=PER_TOKEN)
    for code, zero in ((largest, 0), (0, largest)):
        q = torch.full((33, inputs_ * bits // 8), 255 if code else 0, dtype=torch.uint8)
        zeros = torch.full((33, 1), zero, dtype=torch.uint8)
        weight = kernel.prepare(QuantWeight(scheme, LinearShape(inputs_, 33), q, torch.ones(33, 1), zeros))
        for x, total in (
            (torch.full((9, inputs_), 127.5), 127 * inputs_),
            (torch.full((1, inputs_), -127.5), -128 * inputs_),
        ):
            y = kernel.apply(x, weight, None)
            assert kernel.used
            assert torch.equal(y, torch.full_like(y, total * (code - zero)))


def test_the_same_whatever_else_is_in_the_batch_and_on_every_number_of_threads(kernel: Watched) -> None:
    weight = with_inputs(Case(600, 1024, (1, 128), zero_point=True).weight(), PER_TOKEN)
    prepared, x = kernel.prepare(weight), inputs(70, 1024, dtype=torch.bfloat16)
    whole = kernel.apply(x, prepared, None)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for rows in (1, 2, 5, 9, 70):
            assert torch.equal(kernel.apply(x[:rows], prepared, None), whole[:rows])


def test_nothing_around_x_is_read(kernel: Watched) -> None:
    prepared = kernel.prepare(with_inputs(Case(33, 100, (1, 64)).weight(), PER_TOKEN))
    for dtype in TOLERANCE:
        memory = torch.full((300, 100), torch.nan, dtype=dtype)
        for rows in (1, 3, 9, 70):
            x = memory[100 : 100 + rows].copy_(inputs(rows, 100, dtype=dtype))
            assert kernel.apply(x, prepared, None).isfinite().all()
            x.fill_(torch.nan)


OTHERS = [
    (Case(48, 256, (1, 64), "fp8", scale=torch.float32), PER_TOKEN),
    (Case(48, 256, (1, 64), act_order=True), Activation(WeightKind.INT8, group=64)),
    (Case(48, 256, (1, 256)), Activation(WeightKind.INT8, group=64)),
    (Case(48, 256, (1, 64)), Activation(WeightKind.INT8, symmetric=False)),
    (Case(48, 256, (1, 64)), Activation(WeightKind.INT8, whole=True)),
    (Case(48, 256, (1, 64)), Activation(WeightKind.INT8, threshold=2.0)),
    (Case(48, 256, (1, 64)), Activation(WeightKind.INT4)),
]


@pytest.mark.parametrize(("case", "how"), OTHERS, ids=str)
def test_everything_else_is_multiplied_as_the_numbers_that_it_is(kernel: Watched, case: Case, how: Activation) -> None:
    weight = case.weight()
    prepared, x = kernel.prepare(with_inputs(weight, how)), inputs(5, 256, dtype=torch.float32)
    y = kernel.apply(x, prepared, None)
    assert not kernel.used
    assert error(y, quantize_dequantize(x, how, None, None), dequantize(weight)) < TOLERANCE[torch.float32]


def test_a_processor_without_it_multiplies_what_was_rounded(kernel: Watched) -> None:
    weight = Case(48, 256, (1, 64), zero_point=True).weight()
    narrow = Watched("avx2")
    x = inputs(5, 256, dtype=torch.bfloat16)
    y = narrow.apply(x, narrow.prepare(with_inputs(weight, PER_TOKEN)), None)
    assert not narrow.used
    rounded = quantize_dequantize(x, PER_TOKEN, None, None)
    assert torch.equal(y, narrow.apply(rounded, narrow.prepare(weight), None))
