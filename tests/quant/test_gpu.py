"""Triton's quantized linears without a GPU: interpreted, compiled for two architectures, refused where they must be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quant.base import LinearShape, Scheme, WeightKind
from quant.kernels.gpu import dequantize, device, hopper, multiply, share, tuned
from quant.kernels.gpu.tuned import FINE, HOPPER, SAFE, SAFE_FINE, TABLES, WIDE, WIDE_SMALL, Config
from quant.kernels.planar import block_columns, columns_of_group, planar
from quant.kernels.wna16 import WIDTH, Wna16Kernel
from tests.compiling import Build, builds, recorded
from tests.quant.gpu_suite import Case

ROOT = Path(__file__).parents[2]
KIB = 1024
SM80, SM90 = (8, 0), HOPPER
SHARED = {SM80: 99 * KIB, SM90: 227 * KIB}
"""What a program may have. Of 8.x the least, so that what is built for 8.0 also runs on the consumer cards."""
WARNS = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def test_every_kernel_in_the_interpreter() -> None:
    """In a process of its own: Triton decides between interpreter and compiler when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/quant/gpu_suite.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Compiled -------------------------------------------------------------------------------------------------------------

CASES = {
    "int4": Case("int4", 4096, 4096, (1, 128)),
    "int4 asymmetric": Case("int4", 4096, 4096, (1, 128), zero_point=True),
    "int8": Case("int8", 4096, 4096, (1, 4096)),
    "fp8": Case("fp8", 4096, 4096, (128, 128)),
    "nf4": Case("nf4", 4096, 4096, (1, 64)),
    "e2m1": Case("e2m1", 4096, 4096, (1, 32)),
}


def build(case: Case, rows: int, config: Config, capability: tuple[int, int], dtype: torch.dtype) -> Build:
    small = Case(case.kind, 64, 512, (case.block[0], min(case.block[1], 512)), case.zero_point)
    weight = planar(small.weight(torch.device("cpu")), WIDTH).map(lambda tensor: tensor.to("meta"))
    x = torch.empty(rows, 512, dtype=dtype, device="meta")
    *before, found = builds(lambda: multiply.multiply(x, weight, None, config), (multiply, device), capability)
    assert not any(each.spills for each in before)
    return found


def tables() -> Iterator[tuple[tuple[int, int], int, int, Config]]:
    for capability, table in ((SM80, SAFE), (SM90, TABLES[HOPPER]), (SM90, SAFE)):
        for bits, configs in table.items():
            yield from ((capability, bits, most, config) for most, config in configs.items())


def check(found: Build, config: Config, case: Case, capability: tuple[int, int]) -> float:
    """Instructions of the loop for one weight."""
    assert found.spills == 0, found
    assert found.shared <= SHARED[capability], found
    assert found.async_copies > 0, found
    left, right = (config.outputs, config.rows) if config.weight_first else (config.rows, config.outputs)
    on_hopper = capability == SM90 and left >= 64 and right >= 16 and config.warps >= 4
    assert (found.wgmma if on_hopper else found.mma) > 0, found
    bits = 4 if case.scheme.kind.bits <= 4 else 8
    return found.loop * config.warps * 32 / (config.outputs * block_columns(bits, WIDTH))


@WARNS
@pytest.mark.parametrize(
    ("capability", "bits", "most", "config"), [each for each in tables() if each[2] <= 16], ids=str
)
def test_configurations_for_few_rows_fit(
    capability: tuple[int, int], bits: int, most: int, config: Config, report: Callable[[str], None]
) -> None:
    case = CASES["int4" if bits == 4 else "fp8"]
    each = check(build(case, most, config, capability, torch.bfloat16), config, case, capability)
    report(f"{case.kind} sm_{capability[0]}{capability[1]} {tuple(config)}: {each:.1f} instructions a weight")


@WARNS
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("capability", "bits", "most", "config"), list(tables()), ids=str)
def test_every_configuration_fits(
    capability: tuple[int, int],
    bits: int,
    most: int,
    config: Config,
    name: str,
    dtype: torch.dtype,
    report: Callable[[str], None],
) -> None:
    case = CASES[name]
    if (case.scheme.kind.bits > 4) != (bits == 8):
        pytest.skip("the other table's")
    each = check(build(case, min(most, 64), config, capability, dtype), config, case, capability)
    report(f"{name} {dtype} sm_{capability[0]}{capability[1]} {tuple(config)}: {each:.1f} instructions a weight")


@WARNS
@pytest.mark.parametrize(
    "group", [32, pytest.param(64, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("capability", [SM80, SM90])
def test_configurations_for_small_groups_fit(capability: tuple[int, int], group: int) -> None:
    case = Case("int4", 4096, 4096, (1, group), zero_point=True)
    for most, config in {SM80: SAFE_FINE, SM90: FINE[SM90]}[capability].items():
        check(build(case, min(most, 64), config, capability, torch.bfloat16), config, case, capability)


@WARNS
@pytest.mark.parametrize("capability", [SM80, SM90])
def test_making_a_dense_copy_fits(capability: tuple[int, int]) -> None:
    weight = planar(Case("int4", 64, 512, (1, 128), True).weight(torch.device("cpu")), WIDTH)
    weight = weight.map(lambda tensor: tensor.to("meta"))
    (found,) = builds(lambda: dequantize.dequantize(weight, 0, 64, torch.bfloat16), (dequantize,), capability)
    assert found.spills == 0
    assert found.shared <= SHARED[capability]


# Many rows, on Hopper -------------------------------------------------------------------------------------------------

WIDE_CASES = {
    **CASES,
    "int8 asymmetric": Case("int8", 4096, 4096, (1, 128), zero_point=True),
    "int4 in small groups": Case("int4", 4096, 4096, (1, 32), zero_point=True),
    "int4 by channel": Case("int4", 4096, 4096, (1, 4096), zero_point=True),
}
WIDE_CEILINGS = {32: 7.6, 64: 5.7, 128: 5.8, 256: 5.9}
"""Instructions of the loop for one weight, by the rows of a tile, of int4 with zero points: a tenth above Triton 3.9's."""


def build_wide(case: Case, config: Config, dtype: torch.dtype) -> Build:
    small = Case(case.kind, 64, 512, (case.block[0], min(case.block[1], 512)), case.zero_point)
    weight = planar(small.weight(torch.device("cpu")), WIDTH).map(lambda tensor: tensor.to("meta"))
    x = torch.empty(config.rows, 512, dtype=dtype, device="meta")
    (found,) = builds(lambda: hopper.multiply_wide(x, weight, None, config), (hopper, device), SM90)
    return found


def check_wide(found: Build) -> None:
    assert found.wgmma > 0, found
    assert found.mma == found.spills == 0, found
    assert found.shared <= SHARED[SM90], found
    assert found.overwritten == 0, f"left operands are overwritten while they are read: {found}"


WIDE_CONFIGS = sorted({config._replace(programs=0) for table in (WIDE, WIDE_SMALL) for config in table.values()})


@WARNS
@pytest.mark.parametrize("config", WIDE_CONFIGS, ids=str)
def test_configurations_for_many_rows_fit(config: Config, report: Callable[[str], None]) -> None:
    found = build_wide(CASES["int4 asymmetric"], config._replace(programs=1), torch.bfloat16)
    check_wide(found)
    each = found.loop * config.warps * 32 / (config.outputs * block_columns(4, WIDTH))
    report(f"sm_90 {tuple(config)}: {each:.1f} instructions a weight")
    assert each <= WIDE_CEILINGS[config.rows]


@WARNS
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WIDE_CASES)
@pytest.mark.parametrize("config", WIDE_CONFIGS, ids=str)
def test_every_configuration_for_many_rows_fits(config: Config, name: str, dtype: torch.dtype) -> None:
    check_wide(build_wide(WIDE_CASES[name], config._replace(programs=1), dtype))


def test_what_is_not_for_the_kernel_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = planar(Case("int4", 64, 512, (1, 128)).weight(torch.device("cpu")), WIDTH)
    x = torch.zeros(40, 512, dtype=torch.bfloat16)
    assert hopper.takes(x, weight)
    assert not hopper.takes(x.float(), weight)
    assert not hopper.takes(x[:, :500], weight), "planes cut short"
    assert not hopper.takes(torch.zeros(40 * 512 + 1, dtype=x.dtype)[1:].view(40, 512), weight), "not aligned"
    assert hopper.takes(x.half(), weight)
    exact = Case("int4", 64, 512, (1, 128), scale=torch.float32).weight(torch.device("cpu"))
    assert hopper.takes(x, planar(exact, WIDTH))
    assert not hopper.takes(x.half(), planar(exact, WIDTH)), "scales that float16 cannot hold"
    assert not hopper.takes(x, planar(Case("e2m1", 64, 512, (1, 16)).weight(torch.device("cpu")), 16)), "narrow planes"
    monkeypatch.setattr(hopper, "device_of", lambda index: device.Device(132, (8, 0)))
    assert not hopper.takes(x, weight)


@pytest.mark.parametrize(("capability", "early"), [(SM80, False), (SM90, True)])
def test_launches_overlap_where_the_device_can(capability: tuple[int, int], early: bool) -> None:
    weight = planar(Case("int4", 64, 512, (1, 128)).weight(torch.device("cpu")), WIDTH).map(lambda t: t.to("meta"))
    x = torch.empty(1, 512, dtype=torch.bfloat16, device="meta")
    with recorded((multiply, device), capability) as launches:
        multiply.multiply(x, weight, None)
    assert (launches[0].arguments["EARLY"], launches[0].options["launch_pdl"]) == (early, early)


CEILINGS = {"int4": 2.1, "int4 asymmetric": 2.2, "int8": 4.3, "fp8": 4.0, "nf4": 5.4, "e2m1": 4.0}
"""Instructions of the loop for one weight, 8 rows by 32 outputs, sm_90: a tenth above what Triton 3.9 makes."""


@WARNS
@pytest.mark.skipif(multiply.triton.__version__[:4] != "3.9.", reason="the counts are of another compiler")
@pytest.mark.parametrize("name", CEILINGS)
def test_loops_do_not_grow(name: str) -> None:
    config = Config(8, 32, 1, 3, True, 4)
    assert check(build(CASES[name], 8, config, SM90, torch.bfloat16), config, CASES[name], SM90) <= CEILINGS[name]


# On the host ----------------------------------------------------------------------------------------------------------


def test_groups_cross_no_border() -> None:
    """Blocks of 256 columns, planes of 32."""
    wanted = {16: 32, 20: 32, 32: 32, 64: 64, 96: 128, 128: 128, 160: 256, 256: 256, 300: 512, 1024: 1024}
    assert {group: columns_of_group(group, 256, 32) for group in wanted} == wanted


def test_splits_fill_the_device_and_no_more() -> None:
    config = Config(16, 64, 4, 4, False, 4)
    assert share.splits_of(64, 16, config, 132) == 8
    assert share.splits_of(64, 4, config, 132) == 4, "a block each"
    assert share.splits_of(1000, 16, config, 132) == 1
    assert share.splits_of(1 << 13, 1 << 20, config._replace(programs=1 << 10), 132) == 1, "more tiles than counters"


def test_every_number_of_rows_has_a_configuration() -> None:
    for capability in (SM80, SM90, (12, 0)):
        for bits in (4, 8):
            for rows in (1, 16, 17, 64, tuned.MOST_ROWS):
                assert tuned.config_for(bits, rows, capability).rows >= 8


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, cpu, shape = Wna16Kernel(), torch.device("cpu"), LinearShape(256, 64)
    int4 = Scheme(WeightKind.INT4, (1, 128))
    assert kernel.refuses(int4, shape, cpu) == "runs on a CUDA device, not on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel.refuses(int4, shape, cpu) is None
    flat = Scheme(WeightKind.NF4, (1, 64), flat=True)
    assert "64 does not divide 200 inputs" in (kernel.refuses(flat, LinearShape(200, 64), cpu) or "")
    assert "counts up to" in (kernel.refuses(int4, LinearShape(1 << 20, 1 << 20), cpu) or "")
    monkeypatch.setattr("quant.kernels.wna16.find_spec", lambda name: None)
    assert "pip install 'relinear[gpu]'" in (kernel.refuses(int4, shape, cpu) or "")


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    refusal = Wna16Kernel().refuses(Scheme(WeightKind.INT4, (1, 128)), LinearShape(256, 64), torch.device("cuda"))
    assert refusal == "needs compute capability 8.0, and this device has 7.5"
