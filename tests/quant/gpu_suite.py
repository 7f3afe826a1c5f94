"""The Triton kernels against a float64 product with the dequantized weight.

On a machine without a GPU, in Triton's interpreter, which has to be asked for before Triton is imported: test_gpu does
that. On one with a GPU: ``make test-cuda``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from quant.activation import quantize_dequantize
from quant.base import Activation, LinearShape, QuantWeight, Scheme, WeightKind, canonical_specs
from quant.kernels.gpu import hopper
from quant.kernels.gpu.multiply import multiply, sums_of
from quant.kernels.gpu.tuned import Config
from quant.kernels.gpu.unpack import interpreting
from quant.kernels.planar import PlanarWeight, planar
from quant.kernels.wna16 import Wna16Kernel, by_slices
from quant.reference import dequantize

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cpu" if interpreting() else "cuda")
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 2e-6}
"""Of the relative root mean square error: rounding the result, which the interpreter cuts off in bfloat16, and tables."""


@dataclass(frozen=True)
class Case:
    kind: str
    outputs: int
    inputs: int
    block: tuple[int, int]
    zero_point: bool = False
    act_order: bool = False
    flat: bool = False
    global_scale: bool = False
    scale: torch.dtype = torch.float16

    @property
    def scheme(self) -> Scheme:
        return Scheme(WeightKind(self.kind), self.block, self.zero_point, self.act_order, self.flat, self.global_scale)

    def __str__(self) -> str:
        return f"{self.inputs}-{self.outputs}-{self.scheme}".replace(" ", "-")

    def weight(self, device: torch.device = DEVICE) -> QuantWeight:
        scheme, shape = self.scheme, LinearShape(self.inputs, self.outputs)
        sizes = canonical_specs(scheme, shape)
        q = torch.randint(256, sizes["q"], dtype=torch.uint8)
        if scheme.kind is WeightKind.FP8:
            q = (torch.randn(sizes["q"]) * 10 ** -torch.rand(sizes["q"]).mul(3)).to(torch.float8_e4m3fn)
        bits = scheme.kind.bits
        return QuantWeight(
            scheme,
            shape,
            q=q,
            scale=(torch.rand(sizes["scale"]) * 0.03 * 10 ** -torch.rand(sizes["scale"]) + 1e-3).to(self.scale),
            zero=torch.randint(2**bits if bits == 8 else 2**bits + 1, sizes["zero"], dtype=torch.uint8)
            if self.zero_point
            else None,
            order=torch.randperm(self.inputs, dtype=torch.int32) if self.act_order else None,
            table=torch.randn(16) if scheme.kind.has_table else None,
            global_scale=torch.tensor([0.37]) if self.global_scale else None,
        ).map(lambda tensor: tensor.to(device))


CASES = (
    Case("int4", 48, 256, (1, 32)),
    Case("int4", 130, 384, (1, 128), zero_point=True, act_order=True, scale=torch.float32),
    Case("int4", 64, 512, (1, 256), zero_point=True, scale=torch.bfloat16),
    Case("int4", 33, 1000, (1, 1000), zero_point=True),  # one scale a row, a block cut short
    Case("int4", 50, 256, (16, 64), zero_point=True),  # outputs that share scales
    Case("int4", 48, 480, (1, 160), zero_point=True),  # a group that crosses blocks
    Case("int4", 48, 100, (1, 20), zero_point=True, act_order=True),  # and one that crosses planes
    Case("int4", 33, 200, (1, 128)),  # a last group cut short
    Case("int3", 48, 256, (1, 64), zero_point=True),
    Case("int2", 1, 128, (1, 128), act_order=True),
    Case("int8", 70, 320, (1, 64), zero_point=True),
    Case("int8", 33, 128, (1, 128)),
    Case("int5", 17, 96, (1, 32)),
    Case("fp8", 200, 384, (128, 128), scale=torch.float32),
    Case("fp8", 40, 100, (40, 100), scale=torch.bfloat16),
    Case("fp8", 40, 128, (1, 128)),
    Case("nf4", 20, 128, (1, 64), flat=True, scale=torch.float32),
    Case("fp4", 33, 192, (1, 64)),
    Case("e2m1", 20, 128, (1, 16), global_scale=True, scale=torch.float8_e4m3fn),
    Case("e2m1", 20, 256, (1, 32), scale=torch.float8_e8m0fnu),
)
CONFIGS = (Config(16, 32, 4, 2, False, 2), Config(32, 64, 4, 2, True, 1))


def relative_error(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> float:
    """Root mean square, relative to the terms of a sum where they cancel."""
    x, dense, b = x.double(), dense.double(), torch.zeros((), device=DEVICE).double() if bias is None else bias.double()
    expected, terms = x @ dense.T + b, x.square() @ dense.square().T + b.square()
    return ((y.double() - expected).norm() / torch.maximum(terms, expected.square()).sum().sqrt()).item()


def inputs_of(case: Case, rows: int, dtype: torch.dtype) -> Tensor:
    """Not centred, so that a wrong zero point shows."""
    return (torch.randn(rows, case.inputs, device=DEVICE) + 0.5).to(dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float16) for case in CASES), *((case, torch.bfloat16) for case in (CASES[1], CASES[10]))],
    ids=str,
)
def test_every_kind_is_multiplied(case: Case, dtype: torch.dtype) -> None:
    weight = case.weight()
    dense, bias = dequantize(weight), torch.randn(case.outputs, device=DEVICE).to(dtype)
    for width, rows, config, b in ((16, 1, CONFIGS[0], None), (32, 37, CONFIGS[1], bias), (32, 18, CONFIGS[0], bias)):
        prepared = planar(weight, width)
        x = inputs_of(case, rows, dtype)
        y = multiply(prepared.inputs(x), prepared, b, config)
        assert y.shape == (rows, case.outputs)
        assert relative_error(y, x, dense, b) < TOLERANCE[dtype], f"{rows} rows, width {width}"
        assert prepared.counters is not None
        assert not prepared.counters.any(), "left as they were found"


WIDE_CONFIGS = (Config(64, 64, 4, 4, True, 4), Config(128, 128, 8, 3, True, 1), Config(256, 64, 4, 3, True, 1))


@pytest.mark.skipif(interpreting(), reason="explicit layouts are compiled only")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_is_multiplied_for_many_rows(case: Case, dtype: torch.dtype) -> None:
    """The weight is rounded, and nothing else happens twice: a race would show in one of two results."""
    weight = case.weight()
    prepared = planar(weight, 32)
    dense, bias = dequantize(weight).to(dtype), torch.randn(case.outputs, device=DEVICE).to(dtype)
    for rows, config, b in ((33, WIDE_CONFIGS[0], None), (200, WIDE_CONFIGS[1], bias), (300, WIDE_CONFIGS[2], bias)):
        x = inputs_of(case, rows, dtype)
        inputs = prepared.inputs(x).contiguous()
        if not hopper.takes(inputs, prepared):
            pytest.skip("for the other kernels")
        y = hopper.multiply_wide(inputs, prepared, b, config)
        assert relative_error(y, x, dense, b) < TOLERANCE[torch.bfloat16], f"{rows} rows"
        assert torch.equal(y, hopper.multiply_wide(inputs, prepared, b, config))
        assert not prepared.counters.any(), "left as they were found"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_slices_are_the_weight(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, to the bit of its sums; in slices as well."""
    monkeypatch.setattr("quant.kernels.gpu.tuned.DENSE_BYTES", 1)
    weight = case.weight()
    prepared = Wna16Kernel().prepare(weight)
    assert isinstance(prepared, PlanarWeight)
    x, bias = inputs_of(case, 5, torch.float32), torch.randn(case.outputs, device=DEVICE)
    for b in (None, bias):
        y = by_slices(prepared.inputs(x), prepared, b)
        assert relative_error(y, x, dequantize(weight), b) < TOLERANCE[torch.float32]


def test_dense_slices_are_put_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.kernels.gpu.tuned.DENSE_BYTES", 1)
    case = Case("int4", 300, 64, (1, 32), zero_point=True)
    weight = case.weight()
    prepared = planar(weight, 16)
    x, bias = inputs_of(case, 3, torch.float32), torch.randn(300, device=DEVICE)
    for b in (None, bias):
        assert relative_error(by_slices(x, prepared, b), x, dequantize(weight), b) < TOLERANCE[torch.float32]


def test_columns_shared_out_give_the_same_sum_every_time() -> None:
    case = Case("int4", 32, 2048, (1, 128), zero_point=True)
    weight = case.weight()
    prepared = planar(weight, 16)
    x = inputs_of(case, 2, torch.float16)
    shared = [multiply(x, prepared, None, Config(16, 32, 4, 2, False, programs)) for programs in (1, 8, 8)]
    assert torch.equal(shared[1], shared[2])
    assert relative_error(shared[0], x, dequantize(weight)) < TOLERANCE[torch.float16]
    assert relative_error(shared[1], x, dequantize(weight)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("rows", [0, 17, 193])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_kernel_takes_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    case = Case("int4", 40, 160, (1, 32), zero_point=True, act_order=True)
    kernel, weight = Wna16Kernel(), case.weight()
    assert kernel.refuses(weight.scheme, weight.shape, DEVICE) is None
    x = inputs_of(case, rows, dtype)
    y = kernel.apply(x[None], kernel.prepare(weight), None)
    assert y.shape == (1, rows, 40)
    assert y.dtype == dtype
    assert rows == 0 or relative_error(y[0], x, dequantize(weight)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kind", "block", "activation"),
    [
        ("fp8", (128, 128), Activation(WeightKind.FP8, group=128)),
        ("fp8", (40, 256), Activation(WeightKind.FP8, static=True)),
        ("int8", (1, 256), Activation(WeightKind.INT8)),
        ("int8", (1, 256), Activation(WeightKind.INT8, static=True, symmetric=False)),
        ("int8", (1, 256), Activation(WeightKind.INT8, threshold=2.0)),  # comes back in float32
    ],
    ids=str,
)
def test_inputs_are_quantized_first(kind: str, block: tuple[int, int], activation: Activation) -> None:
    plain = Case(kind, 40, 256, block).weight()
    scale = torch.tensor([0.02], device=DEVICE) if activation.static else None
    zero = None if activation.symmetric else torch.tensor([5], dtype=torch.int8, device=DEVICE)
    scheme = replace(plain.scheme, activation=activation)
    weight = replace(plain, scheme=scheme, input_scale=scale, input_zero=zero)
    x = torch.randn(9, 256, device=DEVICE).mul(2).to(torch.float16)
    kernel, quantized = Wna16Kernel(), quantize_dequantize(x, activation, scale, zero)
    assert kernel.refuses(scheme, weight.shape, DEVICE) is None
    y = kernel.apply(x, kernel.prepare(weight), None)
    assert y.dtype == x.dtype
    assert relative_error(y, quantized, dequantize(plain)) < TOLERANCE[torch.float16]
    assert relative_error(y, x, dequantize(plain)) > 1.5 * TOLERANCE[torch.float16], "quantizing changes something"


@pytest.mark.parametrize("group", [64, 320])
def test_sums_of_inputs_reach_to_the_last_block(group: int) -> None:
    """320 inputs in blocks of 128: of groups of 64 the last one only fills up, and has a sum all the same."""
    prepared = planar(Case("int8", 70, 320, (1, group), zero_point=True).weight(), 32)
    x = torch.randn(20, 320, device=DEVICE).to(torch.float16)
    sums = sums_of(x, prepared)
    width = group if prepared.grouped else 128
    padded = torch.nn.functional.pad(x.float(), (0, 384 - 320)).view(20, 384 // width, width)
    torch.testing.assert_close(sums, padded.sum(-1).T.contiguous())
