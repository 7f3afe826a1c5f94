"""Times paged attention against PyTorch's own over unpaged keys, and against what the device can do.

    python -m benchmarks.attention [--device cuda] [--backend NAME] [--samples 11]

The shape is that of a layer of an 8B model, on a CPU of a 1B model; "latent" cases are a layer of DeepSeek-V3, on a CPU of
DeepSeek-V2-Lite, which PyTorch's own has no kernel for. Every case is compared with the reference first; one that is wrong gets
no number and fails the run. Ours stores the new tokens and attends; the others only attend, and "gather + sdpa" takes its keys
out of the same pages first. "Of bound" is the time that reading the keys and values (decode) or multiplying (prefill) would
take at the measured rate of the device, relative to the time it took.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch

from attention import AttentionBackend, AttentionSpec, select
from attention.kv_dtypes import cache_dtype
from attention.reference import ReferenceBackend
from benchmarks.attention_cases import Case, Filled
from benchmarks.gpu_timing import copy_rate, matmul_rate, measure_cuda
from benchmarks.timing import Timing, in_turn, measure, print_json, reader
from quant.kernels import native

TOLERANCE = 6e-3
"""Relative error: what rounding weights and result to bfloat16 costs."""
MODEL = torch.bfloat16
GPU_SPEC = AttentionSpec(32, 8, 128, 128, scale=128**-0.5)
CPU_SPEC = AttentionSpec(32, 8, 64, 64, scale=64**-0.5)
GPU_LATENT = AttentionSpec(128, 1, 576, 512, scale=192**-0.5, latent=True)
CPU_LATENT = replace(GPU_LATENT, heads=16)
BEYOND_CACHE = 256 << 20
CPU_LIMIT = 12
"""Seconds of a case on a busy machine, so that the whole takes five minutes at most."""
READ_BYTES = 32 << 20


def cases(device: torch.device) -> list[Case]:
    found = []
    names = ("bf16", "fp8_e4m3", "int8") if device.type == "cuda" else ("bf16", "int8")
    for stored in (cache_dtype(name, MODEL) for name in names):
        if device.type == "cuda":
            decode = [(c, b) for c in (1024, 8192, 32768) for b in (1, 8, 32)]
            prefill, spec, latent = [2048, 8192], GPU_SPEC, GPU_LATENT
        else:
            decode = [(c, b) for c in (128, 1024, 4096) for b in (1, 8)]
            prefill, spec, latent = [512, 2048], CPU_SPEC, CPU_LATENT
        found += [Case(spec, batch, context, 1, stored) for context, batch in decode]
        found += [Case(spec, 1, context, context, stored) for context in prefill]
        found += [Case(latent, batch, context, 1, stored) for context, batch in decode[-2:]]
    return found


def rates(device: torch.device) -> dict[str, float]:
    """Bytes and operations per second."""
    if device.type == "cuda":
        return {"bytes": copy_rate(), "operations": matmul_rate()}
    a = torch.randn(1024, 1024).to(MODEL)
    timings = measure({"read": reader(READ_BYTES), "multiply": lambda: a @ a}, samples=5)
    return {"bytes": READ_BYTES / timings["read"].seconds, "operations": 2 * 1024**3 / timings["multiply"].seconds}


def timings_of(filled: Filled, backend: AttentionBackend, device: torch.device, samples: int) -> dict[str, Timing]:
    candidates = {backend.name: filled.forwards(backend)}
    if filled.case.stored == MODEL and not filled.case.spec.latent:
        candidates |= filled.peers()
    if device.type == "cuda":
        return measure_cuda(candidates, samples)
    turns = {name: in_turn(lambda call: call(), calls) for name, calls in candidates.items()}
    return measure(turns, samples, CPU_LIMIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="default: the best on the device")
    parser.add_argument("--samples", type=int, default=11)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    backend = select([GPU_SPEC], device, arguments.backend, native.build).backend
    peak = rates(device)
    print(backend.summary)
    print(f"{peak['bytes'] / 1e9:.0f} GB/s, {peak['operations'] / 1e12:.1f} TFLOP/s in bfloat16")
    print(f"{'case':22} {'kv cache':14} {'path':12} {'us':>10} {'spread':>7} {'of bound':>9} {'x ours':>7}")

    table: list[dict[str, Any]] = []
    right = True
    for case in cases(device):
        filled = Filled(case, MODEL, device, 1 if device.type == "cpu" and case.queries > 1 else BEYOND_CACHE)
        error = filled.error(backend, ReferenceBackend())
        stored = str(case.stored).removeprefix("torch.")
        if not error < TOLERANCE:
            print(f"{case!s:22} {stored:14} {backend.name:12} WRONG: relative error {error:.1e}")
            right = False
            continue
        bound = case.nbytes / peak["bytes"] if case.queries == 1 else case.operations / peak["operations"]
        timings = timings_of(filled, backend, device, arguments.samples)
        ours = timings[backend.name].seconds
        for name, timing in timings.items():
            row = {"case": str(case), "kv": stored, "path": name, "microseconds": round(timing.seconds * 1e6, 2)}
            row |= {"of_bound": round(bound / timing.seconds, 3), "speed_of_ours": round(ours / timing.seconds, 3)}
            table.append(row | ({"error": error} if name == backend.name else {}))
            print(
                f"{case!s:22} {stored:14} {name:12} {timing.seconds * 1e6:10.1f} {timing.spread:7.1%} "
                f"{bound / timing.seconds:9.0%} {ours / timing.seconds:7.2f}",
                flush=True,
            )
    print_json("attention", rates=peak, table=table)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
