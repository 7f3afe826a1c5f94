"""Every kernel against a float64 product with the dequantized weight; how kernels are chosen and built."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant import kernels
from quant.activation import quantize_dequantize
from quant.base import (
    Activation,
    LinearKernel,
    LinearShape,
    NoKernel,
    QuantWeight,
    Scheme,
    WeightKind,
    canonical_specs,
)
from quant.kernels import cpu, native
from quant.kernels.cpu import CpuKernel
from quant.kernels.reference import ReferenceKernel
from quant.reference import dequantize

CPU = torch.device("cpu")
ROWS = (0, 1, 2, 3, 8, 17, 64, 130, 300)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
"""Of the relative root mean square error: what rounding the result costs, and for float32 a few roundings of its sums."""


@dataclass(frozen=True)
class Case:
    outputs: int
    inputs: int
    block: tuple[int, int]
    kind: str = "int4"
    zero_point: bool = False
    act_order: bool = False
    scale: torch.dtype = torch.float16
    global_scale: bool = False

    @property
    def scheme(self) -> Scheme:
        kind = WeightKind(self.kind)
        return Scheme(kind, self.block, self.zero_point, self.act_order, global_scale=self.global_scale)

    def __str__(self) -> str:
        words = f"{self.inputs}-{self.outputs}-{self.scheme}-{self.scale}" + "-global" * self.global_scale
        return words.replace(" ", "-").replace("torch.", "")

    def weight(self) -> QuantWeight:
        scheme, shape = self.scheme, LinearShape(self.inputs, self.outputs)
        sizes, codes = canonical_specs(scheme, shape), 2**scheme.kind.bits
        return QuantWeight(
            scheme,
            shape,
            q=self._codes(sizes["q"]),
            scale=self._scales(sizes["scale"]),
            zero=torch.randint(min(codes + 1, 256), sizes["zero"], dtype=torch.uint8) if self.zero_point else None,
            order=torch.randperm(self.inputs, dtype=torch.int32) if self.act_order else None,
            table=torch.randn(16) if scheme.kind.has_table else None,
            global_scale=torch.tensor([1.7]) if self.global_scale else None,
        )

    def _codes(self, size: tuple[int, ...]) -> Tensor:
        q = torch.randint(256, size, dtype=torch.uint8)
        if self.kind != "fp8":
            return q
        return torch.where((q & 127) == 127, 3, q).view(torch.float8_e4m3fn)  # its NaN is in no file

    def _scales(self, size: tuple[int, ...]) -> Tensor:
        if self.scale == torch.float8_e8m0fnu:
            return torch.randint(115, 125, size, dtype=torch.uint8).view(self.scale)
        return (torch.rand(size) * 0.03 * 10 ** -torch.rand(size)).to(self.scale)


CASES = (
    Case(48, 256, (1, 32)),
    Case(48, 256, (1, 64), scale=torch.bfloat16),
    Case(130, 384, (1, 128), scale=torch.float32),
    Case(48, 256, (1, 32), zero_point=True),
    Case(130, 384, (1, 128), zero_point=True, scale=torch.bfloat16),
    Case(130, 384, (1, 64), zero_point=True, act_order=True, scale=torch.float32),
    Case(7, 256, (1, 256), act_order=True),
    Case(1, 128, (1, 32), zero_point=True),
    Case(7, 64, (1, 64)),
    Case(33, 1024, (1, 1024), zero_point=True),
    Case(48, 480, (1, 160), zero_point=True),  # a group that is not a power of two
    Case(48, 72, (1, 24), zero_point=True),  # not a multiple of 32
    Case(48, 100, (1, 20), zero_point=True, act_order=True),  # nor of 8
    Case(33, 100, (1, 64), zero_point=True),  # a last group cut short
    Case(50, 256, (16, 64), zero_point=True),  # outputs that share scales
    Case(600, 1024, (1, 128), zero_point=True),  # more than one panel in float32
    Case(48, 128, (1, 32), "int3"),
    Case(48, 128, (1, 32), "int3", zero_point=True),
    Case(48, 128, (1, 64), "int2", zero_point=True),
    Case(33, 100, (1, 64), "int5", zero_point=True),
    Case(48, 120, (1, 24), "int6", scale=torch.bfloat16),
    Case(7, 100, (1, 20), "int7", zero_point=True, act_order=True),
    Case(48, 256, (1, 64), "int8", zero_point=True, act_order=True),
    Case(33, 100, (1, 100), "int8", scale=torch.float32),  # one scale an output, as W8A8
    Case(48, 256, (1, 64), "nf4", scale=torch.float32),
    Case(33, 100, (1, 64), "fp4", scale=torch.float32),
    Case(48, 256, (1, 32), "e2m1", scale=torch.float8_e8m0fnu),  # mxfp4
    Case(48, 144, (1, 16), "e2m1", scale=torch.float8_e4m3fn, global_scale=True),  # nvfp4
    Case(33, 100, (1, 16), "e2m1", scale=torch.float8_e4m3fn, global_scale=True),
    Case(48, 256, (48, 256), "fp8", scale=torch.float32),
    Case(33, 100, (1, 100), "fp8", scale=torch.bfloat16),
    Case(130, 200, (64, 128), "fp8", scale=torch.float32),
)


CPU_KERNELS = [CpuKernel(path) for path in cpu.PATHS]


def name_of(kernel: LinearKernel) -> str:
    return f"cpu-{cpu.PATHS[kernel.widest]}" if isinstance(kernel, CpuKernel) else kernel.name


def usable(kernel: LinearKernel, weight: QuantWeight) -> LinearKernel:
    refusal = kernel.refuses(weight.scheme, weight.shape, CPU)
    if refusal is not None:
        pytest.skip(refusal)
    if isinstance(kernel, CpuKernel) and cpu.PATHS[kernel.widest] not in kernel.summary:
        pytest.skip(f"this machine has {kernel.summary} only")
    return kernel


def inputs(*shape: int, dtype: torch.dtype) -> Tensor:
    """Not centred, so that a wrong zero point shows."""
    return (torch.randn(shape) + 0.5).to(dtype)


def error(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> float:
    """Relative root mean square; relative to the terms of a sum where they cancel."""
    x, dense, b = x.double(), dense.double(), torch.zeros(()).double() if bias is None else bias.double()
    expected, terms = x @ dense.T + b, x.square() @ dense.square().T + b.square()
    return ((y.double() - expected).norm() / torch.maximum(terms, expected.square()).sum().sqrt()).item()


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads; one, since starting more takes long for small weights on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernel", [ReferenceKernel(), *CPU_KERNELS], ids=name_of)
def test_every_kernel_multiplies(kernel: LinearKernel, case: Case, dtype: torch.dtype) -> None:
    weight = case.weight()
    prepared, dense = usable(kernel, weight).prepare(weight), dequantize(weight)
    for rows in ROWS:
        x, bias = inputs(rows, case.inputs, dtype=dtype), torch.randn(case.outputs).to(dtype)
        for b in (None, bias):
            y = kernel.apply(x, prepared, b)
            assert y.dtype == dtype
            assert y.shape == (rows, case.outputs)
            assert rows == 0 or error(y, x, dense, b) < TOLERANCE[dtype], f"{rows} rows, bias {b is not None}"


EVERY_CODE = [
    Case(4, 64, (1, 64), "int4", scale=torch.float32),
    Case(4, 64, (1, 64), "e2m1", scale=torch.float32),
    Case(4, 64, (1, 64), "int8", scale=torch.float32),
    Case(4, 64, (1, 64), "fp8", scale=torch.float32),
]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", EVERY_CODE, ids=str)
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=name_of)
def test_every_code_means_what_the_reference_says(kernel: CpuKernel, case: Case) -> None:
    weight = replace(case.weight(), scale=torch.ones(4, 1))
    count = weight.q.numel()
    weight.q.view(torch.uint8).copy_(torch.arange(count).remainder(256).view(weight.q.shape))
    if case.kind == "fp8":
        weight.q.view(torch.uint8)[(weight.q.view(torch.uint8) & 127) == 127] = 0
    prepared, dense = usable(kernel, weight).prepare(weight), dequantize(weight)
    for dtype in TOLERANCE:
        one_hot = torch.eye(64, dtype=dtype)
        for rows in (1, 5, 64):
            y = torch.cat([kernel.apply(x, prepared, None) for x in one_hot.split(rows)])
            assert torch.equal(y.float(), dense.T), f"{rows} rows of {dtype}"


@pytest.mark.parametrize("case", [Case(33, 100, (1, 64)), Case(33, 100, (1, 24), "fp8")], ids=str)
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=name_of)
def test_nothing_around_x_is_read(kernel: CpuKernel, case: Case) -> None:
    weight = case.weight()
    prepared = usable(kernel, weight).prepare(weight)
    for dtype in TOLERANCE:
        memory = torch.full((300, 100), torch.nan, dtype=dtype)
        for rows in (1, 3, 9, 70):
            x = memory[100 : 100 + rows].copy_(inputs(rows, 100, dtype=dtype))
            assert torch.equal(kernel.apply(x, prepared, None), kernel.apply(x.clone(), prepared, None))
            assert kernel.apply(x, prepared, None).isfinite().all()
            x.fill_(torch.nan)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_inputs_are_rounded_as_the_reference_rounds_them(kind: str) -> None:
    weight = Case(48, 100, (1, 100), kind, scale=torch.float32).weight()
    hows = [
        Activation(WeightKind.FP8),  # int8: test_int8_inputs.py
        Activation(WeightKind.FP8, group=32),
        Activation(WeightKind.INT8, threshold=2.0),
    ]
    for how, dtype in product(hows, TOLERANCE):
        quantized = replace(weight, scheme=replace(weight.scheme, activation=how))
        kernel = usable(CpuKernel(), quantized)
        prepared, plain = kernel.prepare(quantized), kernel.prepare(weight)
        for rows in (1, 9, 100):
            x = inputs(rows, 100, dtype=dtype)
            rounded = quantize_dequantize(x, how, None, None)
            y = kernel.apply(x, prepared, None)
            assert y.dtype == dtype
            assert torch.equal(y, kernel.apply(rounded, plain, None).to(dtype))
            assert error(y, rounded, dequantize(weight)) < TOLERANCE[dtype]
            assert not torch.equal(y, kernel.apply(x, plain, None))


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=name_of)
def test_few_rows_of_bfloat16_round_nothing_but_the_result(kernel: CpuKernel) -> None:
    weight = Case(130, 384, (1, 128), zero_point=True).weight()
    prepared, dense = usable(kernel, weight).prepare(weight), dequantize(weight).double()
    for rows in (1, 2, 8, min(cpu.PANEL_ROWS)):
        x = inputs(rows, 384, dtype=torch.bfloat16)
        y = kernel.apply(x, prepared, None)
        assert (y == (x.double() @ dense.T).to(torch.bfloat16)).float().mean() > 0.99


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=name_of)
def test_the_number_of_threads_changes_nothing(kernel: CpuKernel) -> None:
    weight = Case(600, 1024, (1, 128), zero_point=True).weight()
    prepared = usable(kernel, weight).prepare(weight)
    for rows in (1, 16):
        x, ys = inputs(rows, 1024, dtype=torch.bfloat16), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ys.append(kernel.apply(x, prepared, None))
        assert torch.equal(ys[0], ys[1])
        assert torch.equal(ys[0], ys[2])


@pytest.mark.parametrize("kernel", [ReferenceKernel(), CpuKernel()], ids=name_of)
def test_x_of_any_shape_and_stride(kernel: LinearKernel) -> None:
    weight = Case(48, 256, (1, 64), zero_point=True).weight()
    prepared, dense = usable(kernel, weight).prepare(weight), dequantize(weight)
    a = inputs(6, 512, dtype=torch.float32)
    for x in (a[:, ::2], a[:, 256:][::2], a.view(2, 3, 2, 256)[:, :, 0], a[0, :256], a[0, ::2], a[:0, :256]):
        with torch.inference_mode():
            y = kernel.apply(x, prepared, None)
        assert y.shape == (*x.shape[:-1], 48)
        assert y.numel() == 0 or error(y, x, dense) < TOLERANCE[torch.float32]


def test_x_that_does_not_fit_is_an_error() -> None:
    weight = Case(48, 256, (1, 64)).weight()
    kernel = usable(CpuKernel(), weight)
    prepared = kernel.prepare(weight)
    for x in (torch.ones(2, 512), torch.ones(256, dtype=torch.float64), torch.ones(256, device="meta")):
        with pytest.raises(ValueError, match="the weight is 256→48 on a CPU"):
            kernel.apply(x, prepared, None)


def test_a_weight_is_prepared_without_being_changed() -> None:
    weight = Case(48, 256, (1, 64), zero_point=True, act_order=True).weight()
    before = weight.map(Tensor.clone)
    prepared = usable(CpuKernel(), weight).prepare(weight)
    assert prepared.layout == "cpu-codes"
    assert all(torch.equal(value, before.tensors()[name]) for name, value in weight.tensors().items())


SCHEME, SHAPE = Scheme(WeightKind.INT4, (1, 64)), LinearShape(256, 48)


def test_the_first_kernel_that_does_not_refuse_is_chosen() -> None:
    assert list(kernels.KERNELS)[-1] == "reference"
    choice = kernels.choose(SCHEME, SHAPE, torch.device("meta"))
    assert choice.kernel.name == "reference"
    assert choice.refusals["cpu"] == "runs on a CPU, not on meta"


def test_a_kernel_asked_for_by_name_never_falls_back() -> None:
    over_row_ends = Scheme(WeightKind.NF4, (1, 96), flat=True)
    assert kernels.choose(SCHEME, SHAPE, CPU, asked="reference").kernel.name == "reference"
    with pytest.raises(NoKernel, match=r"256→48, on cpu\. cpu: multiplies weights whose rows have scales"):
        kernels.choose(over_row_ends, SHAPE, CPU, asked="cpu")
    with pytest.raises(NoKernel, match=f"unknown kernel marlin; known: {', '.join(kernels.KERNELS)}"):
        kernels.choose(SCHEME, SHAPE, CPU, asked="marlin")


def test_without_a_compiler_the_reference_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(cpu, "SOURCE", native.Source(cpu.SOURCE.path, *cpu.SOURCE.headers))  # one that is not built yet
    choice = kernels.choose(SCHEME, SHAPE, CPU)
    assert choice.kernel.name == "reference"
    assert choice.refusals["cpu"] == "no C compiler found: install one (cc) to use it"
    with pytest.raises(NoKernel, match="no C compiler found"):
        kernels.choose(SCHEME, SHAPE, CPU, asked="cpu")


def test_choosing_imports_nothing_before_it_is_asked() -> None:
    code = "import quant.kernels, sys; assert not {'triton', 'quant.kernels.cpu', 'quant.kernels.reference'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(native, "CACHE", tmp_path / "cache")
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def test_a_library_is_built_once_and_kept_private(source: Path) -> None:
    for _ in range(2):
        assert native.load(source).answer() == 42
    (built,) = native.CACHE.iterdir()
    assert (built.stat().st_mode & 0o777, native.CACHE.stat().st_mode & 0o777) == (0o700, 0o700)
    source.write_text("int answer(void) { return 43; }\n")
    assert native.load(source).answer() == 43


def test_processes_may_build_together(source: Path) -> None:
    code = "import sys; from pathlib import Path; from quant.kernels import native; native.CACHE = Path(sys.argv[1]);"
    code += "assert native.load(Path(sys.argv[2])).answer() == 42"
    command = [sys.executable, "-c", code, str(native.CACHE), str(source)]
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(native.CACHE.iterdir())) == 1


def test_a_damaged_library_is_built_again(source: Path) -> None:
    native.load(source)
    (built,) = native.CACHE.iterdir()
    built.unlink()  # still mapped by this process: a new file, not new content
    built.write_bytes(b"not a library")
    assert native.load(source).answer() == 42


def test_a_compiler_without_openmp_will_do(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "plain-cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setattr(native, "COMPILERS", (str(compiler),))
    assert native.load(source).answer() == 42


def test_what_cannot_be_built_says_why(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("int answer(void) { return nothing; }\n")
    with pytest.raises(native.CannotBuild, match=r"cannot build answer\.c for this machine .*nothing"):
        native.load(source)
    with pytest.raises(native.CannotBuild, match="the installation is incomplete"):
        native.load(source.with_name("absent.c"))
    native.CACHE.chmod(0o777)
    with pytest.raises(native.CannotBuild, match=r"others may write to .*chmod it to 700"):
        native.load(source)
    monkeypatch.setattr(native, "CACHE", source / "below-a-file")
    with pytest.raises(native.CannotBuild, match=r"compiled kernels cannot be kept in .*make it writable"):
        native.load(source)
