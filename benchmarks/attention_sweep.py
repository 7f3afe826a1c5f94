"""Finds the tile sizes of ``attention/kernels/tuned.py`` on the GPU at hand.

    python -m benchmarks.attention_sweep [--processes 14] [--seconds 300] [--only "varlen 128 bfloat16" ...]

Builds all candidates first, in many processes, into Triton's cache; then times each on every case of its kind. The score of
a candidate is its mean slowdown against the best of each case. Prints the best ones; all of them in JSON, on the last line.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch

from attention import AttentionSpec
from attention.kernels.decode import decode
from attention.kernels.tuned import Config
from attention.kernels.varlen import varlen
from benchmarks.attention_cases import Case, Filled
from benchmarks.gpu_timing import measure_cuda
from benchmarks.timing import print_json

MODEL = torch.bfloat16
CUDA = torch.device("cuda")
BEYOND_CACHE = 128 << 20
LATENT = 576
EXPANDED = 192
"""Of the keys that prompts make of latents."""


class Group(NamedTuple):
    """What shares one row of a table."""

    kernel: str
    dim: int
    stored: torch.dtype

    def __str__(self) -> str:
        return f"{self.kernel} {self.dim} {str(self.stored).removeprefix('torch.')}"

    @property
    def spec(self) -> AttentionSpec:
        if self.dim == LATENT:
            return AttentionSpec(128, 1, 576, 512, scale=192**-0.5, latent=True)
        if self.dim == EXPANDED:
            return AttentionSpec(32, 32, 192, 128, scale=192**-0.5)
        return AttentionSpec(32, 8, self.dim, self.dim, scale=self.dim**-0.5)

    def cases(self) -> list[Case]:
        """Batch, keys and new tokens of what is timed. Latents are attended to by short pieces of prompts only."""
        if self.kernel == "decode":
            sizes = [(32, 8192, 1), (32, 1024, 1), (1, 8192, 1), (8, 4096, 1)]
        elif self.dim == LATENT:
            sizes = [(8, 4096, 16), (1, 8192, 64)]
        else:
            sizes = [(1, 8192, 8192), (1, 2048, 2048), (4, 1024, 1024)]
        return [Case(self.spec, *size, self.stored) for size in sizes]

    def configs(self) -> Iterator[Config]:
        if self.kernel == "decode":
            rows = (16, 32, 64) if self.dim == LATENT else (16,)
            keys = {64: (64, 128), 128: (32, 64, 128), 256: (16, 32, 64), LATENT: (16, 32, 64)}[self.dim]
            warps, stages = (2, 4, 8) if self.dim <= 128 else (4, 8), (2, 3, 4, 6)
        else:
            rows = (16, 32, 64) if self.dim == LATENT else (64, 128)
            keys = (16, 32, 64) if self.dim == LATENT else (32, 64, 128)
            warps, stages = (4, 8), (2, 3, 4)
        for shape in itertools.product(rows, keys, warps, stages):
            yield Config(*shape)


def groups() -> list[Group]:
    half, codes = torch.bfloat16, (torch.float8_e4m3fn, torch.int8)
    kernels = ("decode", "varlen")
    return [
        *(Group(kernel, 128, stored) for stored in (half, *codes) for kernel in kernels),
        *(Group(kernel, dim, half) for dim in (64, 256, LATENT) for kernel in kernels),
        Group("varlen", EXPANDED, half),
    ]


def _parts(configs: list[Config]) -> list[list[Config]]:
    return [configs[start : start + 6] for start in range(0, len(configs), 6)]


def launch(filled: Filled, config: Config, kernel: str, call: int = 0) -> torch.Tensor:
    out = torch.empty(filled.q.shape[0], filled.case.spec.heads, filled.case.spec.value_dim, dtype=MODEL, device=CUDA)
    attend = decode if kernel == "decode" else varlen
    attend(call, filled.case.spec, filled.q, filled.batch, filled.cache, None, out, config)
    return out


def build(group: Group, configs: list[Config]) -> list[bool]:
    """Whether each configuration compiles and fits. On the cases themselves: what is compiled depends on their numbers."""
    filled, fits = [Filled(case, MODEL, CUDA, 1) for case in group.cases()], []
    for config in configs:
        try:
            for each, variant in itertools.product(filled, variants(group, config)):
                launch(each, variant, group.kernel)
            torch.cuda.synchronize()
            fits.append(True)
        except Exception as error:
            print(f"{group} {tuple(config)}: {str(error).splitlines()[0][:90]}", flush=True)
            fits.append(False)
    return fits


def variants(group: Group, config: Config) -> list[Config]:
    return [config._replace(programs=n) for n in (1, 2, 4, 8)] if group.kernel == "decode" else [config]


def time_group(group: Group, configs: list[Config]) -> dict[Config, list[float]]:
    """Seconds of each configuration on each case."""
    result: dict[Config, list[float]] = {}
    for case in group.cases():
        filled = Filled(case, MODEL, CUDA, BEYOND_CACHE)
        for config in configs:
            for each in variants(group, config):
                calls = [partial(launch, filled, each, group.kernel, call) for call in filled.copies]
                result.setdefault(each, []).append(measure_cuda({"": calls}, samples=3)[""].seconds)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=300, help="groups that come later are left out")
    parser.add_argument("--only", nargs="*", help="groups, as they are printed")
    arguments = parser.parse_args()
    begin = time.monotonic()
    chosen = [group for group in groups() if not arguments.only or str(group) in arguments.only]
    jobs = [(group, part) for group in chosen for part in _parts(list(group.configs()))]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        answers = list(pool.map(build, *zip(*jobs, strict=True)))
    print(f"built in {time.monotonic() - begin:.0f} s", flush=True)
    fitting: dict[Group, list[Config]] = {}
    for (group, part), fits in zip(jobs, answers, strict=True):
        fitting.setdefault(group, []).extend(config for config, fit in zip(part, fits, strict=True) if fit)

    everything = {}
    for group, configs in fitting.items():
        if time.monotonic() - begin > arguments.seconds:
            print(f"{group}: no time left")
            continue
        seconds = time_group(group, configs)
        best = [min(column) for column in zip(*seconds.values(), strict=True)]
        scores = {
            config: statistics.fmean(s / b for s, b in zip(row, best, strict=True)) for config, row in seconds.items()
        }
        everything[str(group)] = [[*config, *(round(s * 1e6, 1) for s in row)] for config, row in seconds.items()]
        print(f"{group}: best {[round(b * 1e6, 1) for b in best]} us, after {time.monotonic() - begin:.0f} s")
        for config in sorted(scores, key=scores.__getitem__)[:5]:
            times = [round(s * 1e6, 1) for s in seconds[config]]
            print(f"  {scores[config]:.3f} {tuple(config)} {times}", flush=True)
    print_json("attention sweep", microseconds=everything)
    return 0


if __name__ == "__main__":
    sys.exit(main())
