"""Times quantized linears on the GPU at hand against bfloat16 through cuBLAS, and finds tile sizes.

    python -m benchmarks.gpu_linear --sweep [--seconds 280] [--processes 14]   # all of it, in 8 minutes
    python -m benchmarks.gpu_linear --table-seconds 300                       # without the sweep

First what the device can do; then every kind of weight against a float64 product. One that is wrong, or fails, gets no number
in what follows: its traceback is printed, the rest goes on, and the exit status is 1. With ``--sweep``, the best tile sizes
of ``quant/kernels/gpu/tuned.py`` for this device, which the table then uses: the lines ``4: {16: Config(...), ...}`` that it
prints are to be put into ``TABLES`` there, under the printed capability. The table is the ratio to bfloat16 of one product,
replayed from a CUDA graph, over copies of the weights that no cache holds together. All of it in JSON, on the last line and
in ``$OUT/gpu_linear.json``.

Aims on an H200 for int4 in groups of 128: 2.2, 2.2, 1.3, 0.6 and 0.95 times bfloat16 at 1, 16, 64, 256 and 4096 rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_timing import copy_rate, matmul_rate, measure_cuda
from benchmarks.timing import print_json
from quant import kernels
from quant.base import LinearShape, QuantWeight, Scheme, WeightKind, canonical_specs
from quant.kernels.gpu import tuned
from quant.kernels.gpu.multiply import multiply
from quant.kernels.gpu.tuned import Config
from quant.kernels.planar import PlanarWeight, planar
from quant.reference import dequantize

CUDA = torch.device("cuda")
MODEL = torch.bfloat16
SHAPES = (LinearShape(4096, 4096), LinearShape(4096, 14336), LinearShape(14336, 4096))
ROWS = (1, 16, 64, 128, 256, 4096)
BEYOND_CACHE = 192 << 20
TOLERANCE = 5e-3
"""Relative root mean square error: what rounding the weight and the result to bfloat16 costs."""
KINDS = {
    "int4 g128": Scheme(WeightKind.INT4, (1, 128)),
    "int4 g128 asymmetric": Scheme(WeightKind.INT4, (1, 128), zero_point=True),
    "int4 g32": Scheme(WeightKind.INT4, (1, 32)),
    "int8 channel": Scheme(WeightKind.INT8, (1, 1 << 30)),
    "fp8 channel": Scheme(WeightKind.FP8, (1, 1 << 30)),
    "fp8 128x128": Scheme(WeightKind.FP8, (128, 128)),
    "nf4 g64": Scheme(WeightKind.NF4, (1, 64)),
    "e2m1 g32": Scheme(WeightKind.E2M1, (1, 32)),
}
OTHER_KINDS = {
    "int4 g128 act-order": Scheme(WeightKind.INT4, (1, 128), zero_point=True, act_order=True),
    "int4 channel": Scheme(WeightKind.INT4, (1, 1 << 30), zero_point=True),
    "int4 g40": Scheme(WeightKind.INT4, (1, 40), zero_point=True),
    "int3 g64": Scheme(WeightKind.INT3, (1, 64), zero_point=True),
    "int8 g128 asymmetric": Scheme(WeightKind.INT8, (1, 128), zero_point=True),
    "e2m1 g16": Scheme(WeightKind.E2M1, (1, 16)),
}
"""Checked, not timed."""
SWEPT = {
    8: ("int4 g128 asymmetric", (1, 8)),
    16: ("int4 g128 asymmetric", (16,)),
    32: ("int4 g128 asymmetric", (32,)),
    64: ("int4 g128 asymmetric", (64,)),
    128: ("int4 g128 asymmetric", (128,)),
    256: ("int4 g128 asymmetric", (192, 256)),
    8008: ("fp8 channel", (1, 8)),
    8016: ("fp8 channel", (16,)),
    8064: ("fp8 channel", (64,)),
    8256: ("fp8 channel", (128, 256)),
}
"""Rows of a table (8000 more: that of 8 bits), what stands for them, and the numbers of rows that are timed."""
WIDTH = 32


def random_weight(scheme: Scheme, shape: LinearShape) -> QuantWeight:
    scheme = replace(scheme, block=(scheme.block[0], min(scheme.block[1], shape.in_features)))
    sizes = canonical_specs(scheme, shape)
    q = torch.randint(256, sizes["q"], dtype=torch.uint8, device=CUDA)
    if scheme.kind is WeightKind.FP8:
        q = torch.randn(sizes["q"], device=CUDA).to(torch.float8_e4m3fn)
    return QuantWeight(
        scheme,
        shape,
        q=q,
        scale=(torch.rand(sizes["scale"], device=CUDA) * 0.01 + 1e-3).to(torch.float16),
        zero=torch.randint(16, sizes["zero"], dtype=torch.uint8, device=CUDA) if scheme.zero_point else None,
        order=torch.randperm(shape.in_features, dtype=torch.int32, device=CUDA) if scheme.act_order else None,
        table=torch.randn(16, device=CUDA) if scheme.kind.has_table else None,
    )


def relative_error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


def copies_of(weight: PlanarWeight) -> list[PlanarWeight]:
    count = max(2, -(-BEYOND_CACHE // weight.nbytes))
    return [weight, *(weight.map(torch.clone) for _ in range(1, count))]


def guarded(what: str, failures: list[str], call: Callable[[], Any]) -> Any:
    """The result, or ``None`` after printing what happened."""
    try:
        return call()
    except Exception as error:
        print(f"FAILED: {what}", flush=True)
        print("\n".join(traceback.format_exc().splitlines()[-25:]), flush=True)
        failures.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
        return None


# Correctness ----------------------------------------------------------------------------------------------------------


def check(name: str) -> tuple[str, list[str]]:
    """Small and odd sizes, both dtypes, few and many rows; two runs give the same bits. What is wrong, in a process of its own:
    a kernel that reads what it must not ends no other's."""
    wrong: list[str] = []
    try:
        torch.manual_seed(0)
        for shape, dtype in itertools.product(
            (LinearShape(4096, 512), LinearShape(640, 200)), (torch.bfloat16, torch.float16)
        ):
            weight = random_weight((KINDS | OTHER_KINDS)[name], shape)
            kernel = kernels.choose(weight.scheme, shape, CUDA).kernel
            prepared, dense = kernel.prepare(weight), dequantize(weight).double()
            for rows in (1, 5, 16, 33, 64, 150, 300):
                x = (torch.randn(rows, shape.in_features, device=CUDA) + 0.1).to(dtype)
                bias = torch.randn(shape.out_features, device=CUDA).to(dtype)
                y = kernel.apply(x, prepared, bias)
                error = relative_error(y, x.double() @ dense.T + bias.double())
                same = torch.equal(kernel.apply(x, prepared, bias), y)
                if not (error < TOLERANCE and same and kernel.name != "reference"):
                    wrong.append(f"{shape} {dtype} {rows} rows, {kernel.name}: error {error:.1e}, same twice: {same}")
    except Exception:
        wrong += traceback.format_exc().splitlines()[-25:]
    return name, wrong


def check_all(processes: int, failures: list[str]) -> list[str]:
    """The kinds that are right."""
    right = []
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        for answer in [pool.submit(check, name) for name in KINDS | OTHER_KINDS]:
            found = guarded("check", failures, answer.result)
            if found is None:
                continue
            name, wrong = found
            print(f"{name}: {'right' if not wrong else 'WRONG'}", *wrong[:40], sep="\n    ", flush=True)
            if wrong:
                failures.append(f"{name}: {wrong[-1]}")
            else:
                right.append(name)
    return right


# Sweep ----------------------------------------------------------------------------------------------------------------


def candidates(most_rows: int) -> Iterator[Config]:
    """Configurations without their number of programs. Shared memory has 228 KiB, and a warp no more than 32 outputs."""
    most = most_rows % 8000
    for rows in {8: (8,), 16: (16,), 32: (32, 16), 64: (64,), 128: (64, 128)}.get(most, (64, 128)):
        if rows <= 16:
            shapes = itertools.product((16, 32, 64, 128), (1, 2, 4), (3, 4))
        elif rows == 32:
            shapes = itertools.product((64, 128), (2, 4, 8), (3, 4))
        else:
            shapes = itertools.product((64, 128), (4, 8), (2, 3, 4))
        for n, warps, stages in shapes:
            if 16 <= n // warps <= 32:
                yield from (
                    Config(rows, n, warps, stages, first, 1) for first in ((True,) if rows == 8 else (False, True))
                )


def build(kind: str, most_rows: int, configs: list[Config]) -> list[str]:
    """Why each configuration cannot run; empty if it can."""
    answers = []
    weights = [planar(random_weight(KINDS[kind], shape), WIDTH) for shape in SHAPES[:1]]
    for config in configs:
        try:
            for weight in weights:
                x = torch.randn(most_rows % 8000, weight.shape.in_features, device=CUDA).to(MODEL)
                multiply(x, weight, None, config._replace(programs=64))  # shared out
                multiply(x, weight, None, config._replace(blocks=1 << 20))  # not
            torch.cuda.synchronize()
            answers.append("")
        except Exception as error:
            answers.append((str(error).splitlines() or [type(error).__name__])[0][:120])
    return answers


def sweep(seconds: float, processes: int, failures: list[str]) -> dict[str, Any]:
    begin = time.monotonic()
    jobs = []
    for most_rows, (kind, _) in SWEPT.items():
        configs = list(candidates(most_rows))
        jobs += [(kind, most_rows, configs[start : start + 4]) for start in range(0, len(configs), 4)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        answers = list(pool.map(build, *zip(*jobs, strict=True)))
    print(f"built {sum(len(job[2]) for job in jobs)} configurations in {time.monotonic() - begin:.0f} s", flush=True)
    fitting: dict[int, list[Config]] = {most_rows: [] for most_rows in SWEPT}
    for (_, most_rows, configs), whys in zip(jobs, answers, strict=True):
        for config, why in zip(configs, whys, strict=True):
            if why:
                print(f"left out: {most_rows} {tuple(config)}: {why}")
            else:
                fitting[most_rows].append(config)
    results: dict[str, Any] = {}
    for index, (most_rows, (kind, every_rows)) in enumerate(SWEPT.items()):
        stop = time.monotonic() + (begin + seconds - time.monotonic()) / (len(SWEPT) - index)
        found = guarded(
            f"sweep {most_rows}", failures, partial(sweep_one, most_rows, kind, every_rows, fitting[most_rows], stop)
        )
        if found:
            results[str(most_rows)] = found
    return results


def sweep_one(most_rows: int, kind: str, every_rows: tuple[int, ...], fitting: list[Config], stop: float) -> list[Any]:
    """Times every candidate on every case until the time is over, those that are much too slow for the first on no other; the
    best goes into the table in use."""
    scheme = KINDS[kind]
    cases = list(itertools.product(SHAPES[: 3 if most_rows < 8000 else 2], every_rows))
    seconds: dict[Config, list[float]] = {}
    begin, late = time.monotonic(), False
    for number, (shape, rows) in enumerate(cases):
        weight = random_weight(scheme, shape)
        copies = copies_of(planar(weight, WIDTH))
        x = torch.randn(rows, shape.in_features, device=CUDA).to(MODEL)
        expected = x.double() @ dequantize(weight).double().T
        limit = begin + (stop - begin) * (number + 1) / len(cases)
        survivors = [config._replace(programs=programs) for config in fitting for programs in (1, 2, 4, 8)]
        if number:
            survivors = sorted(seconds, key=lambda config: sum(seconds[config]))
            survivors = [each for each in survivors if sum(seconds[each]) < 1.3 * sum(seconds[survivors[0]])]
        for config in survivors:
            if time.monotonic() > limit:
                late = True
                continue
            if relative_error(multiply(x, copies[0], None, config), expected) > TOLERANCE:
                print(f"WRONG: {kind} {shape} {rows} rows, {tuple(config)}")
                continue
            calls = [partial(multiply, x, copy, None, config) for copy in copies]
            seconds.setdefault(config, []).append(measure_cuda({"": calls}, samples=3)[""].seconds)
        seconds = {config: row for config, row in seconds.items() if len(row) == number + 1}
        del copies, weight, expected
        torch.cuda.empty_cache()
    best = [min(column) for column in zip(*seconds.values(), strict=True)]
    score = {key: statistics.fmean(s / b for s, b in zip(row, best, strict=True)) for key, row in seconds.items()}
    order = sorted(score, key=score.__getitem__)
    print(
        f"\n{kind}, up to {most_rows % 8000} rows; best us {[round(b * 1e6, 1) for b in best]}" + " (cut short)" * late
    )
    for config in order[:6]:
        times = [round(s * 1e6, 1) for s in seconds[config]]
        print(f"  {score[config]:.3f} {tuple(config)} {times}", flush=True)
    adopt(most_rows, order[0])
    return [[*config, *(round(s * 1e6, 2) for s in seconds[config])] for config in order[:40]]


def adopt(most_rows: int, config: Config) -> None:
    bits = 8 if most_rows > 8000 else 4
    tables = tuned.TABLES.setdefault(torch.cuda.get_device_capability(), {4: {}, 8: {}})
    tables[bits][most_rows % 8000] = config
    tables[bits] = dict(sorted(tables[bits].items()))


# Table ----------------------------------------------------------------------------------------------------------------


def table_of(kind: str, shape: LinearShape, rates: tuple[float, float]) -> list[dict[str, Any]]:
    weight = random_weight(KINDS[kind], shape)
    kernel = kernels.choose(weight.scheme, shape, CUDA).kernel
    dense = dequantize(weight).to(MODEL)
    prepared = kernel.prepare(weight)
    assert isinstance(prepared, PlanarWeight)
    copies = copies_of(prepared)
    denses = [dense, *(dense.clone() for _ in range(1, max(2, -(-BEYOND_CACHE // dense.nbytes))))]
    found = []
    for rows in ROWS:
        x = torch.randn(rows, shape.in_features, device=CUDA).to(MODEL)
        error = relative_error(kernel.apply(x, prepared, None), x.double() @ dense.double().T)
        if not error < TOLERANCE:
            print(f"WRONG: {kind} {shape} {rows} rows: error {error:.1e}", flush=True)
            raise AssertionError(f"{kind} {shape} {rows} rows: error {error:.1e}")
        # Many rows take long, and few copies will do then.
        timings = measure_cuda(
            {
                "bf16": [partial(F.linear, x, each) for each in denses[: 2 if rows > 256 else None]],
                "ours": [partial(kernel.apply, x, each, None) for each in copies[: 2 if rows > 256 else None]],
            },
            samples=7,
        )
        ours, theirs = timings["ours"].seconds, timings["bf16"].seconds
        bound = max(prepared.nbytes / rates[0], 2 * rows * shape.in_features * shape.out_features / rates[1])
        row = {
            "kind": kind,
            "shape": [shape.out_features, shape.in_features],
            "rows": rows,
            "microseconds": ours * 1e6,
            "bf16_microseconds": theirs * 1e6,
            "times_bf16": theirs / ours,
            "of_bound": bound / ours,
            "spread": timings["ours"].spread,
            "error": error,
        }
        print(
            f"{kind:22} {shape.out_features:6}x{shape.in_features:<6} {rows:5} {ours * 1e6:9.1f} {theirs * 1e6:9.1f} "
            f"{theirs / ours:7.2f} {bound / ours:7.0%} {timings['ours'].spread:6.0%}",
            flush=True,
        )
        found.append(row)
    return found


def save(result: dict[str, Any]) -> None:
    if out := os.environ.get("OUT"):
        Path(out, "gpu_linear.json").write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=280, help="of the sweep, building counted in")
    parser.add_argument("--table-seconds", type=float, default=80, help="what comes later is left out of the table")
    arguments = parser.parse_args()
    begin = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    failures: list[str] = []
    capability = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, compute capability {capability}, torch {torch.__version__}", flush=True)
    rates = (copy_rate(), matmul_rate())
    print(f"{rates[0] / 1e9:.0f} GB/s, {rates[1] / 1e12:.1f} TFLOP/s in bfloat16", flush=True)

    right = check_all(arguments.processes, failures)
    print(f"checked after {time.monotonic() - begin:.0f} s", flush=True)
    swept: dict[str, Any] = {}
    if arguments.sweep:
        swept = guarded("sweep", failures, partial(sweep, arguments.seconds, arguments.processes, failures)) or {}
        save({"sweep": swept})
        print(f"\ntuned.py, TABLES[{capability}]:")
        for bits, rows in tuned.TABLES.get(capability, {}).items():
            entries = ", ".join(f"{most}: Config{tuple(config)}" for most, config in rows.items())
            print(f"    {bits}: {{{entries}}},", flush=True)

    print(
        f"\n{'kind':22} {'out x in':13} {'rows':>5} {'us':>9} {'bf16 us':>9} {'x bf16':>7} {'bound':>7} {'spread':>6}"
    )
    table: list[dict[str, Any]] = []
    stop = time.monotonic() + arguments.table_seconds
    for kind, shape in itertools.product(KINDS, SHAPES):
        if kind not in right or time.monotonic() > stop:
            print(f"{kind} {shape}: left out, {'no time left' if kind in right else 'it is wrong'}")
            continue
        table += guarded(f"table {kind} {shape}", failures, partial(table_of, kind, shape, rates)) or []
    for failure in failures:
        print(f"FAILED: {failure}")
    result = {"rates": rates, "right": right, "failures": failures, "table": table}
    save(result | {"sweep": swept})
    print_json("gpu_linear", **result)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
