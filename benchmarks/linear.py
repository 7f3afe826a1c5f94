"""Times quantized linear layers against bfloat16 and torch's own 4-bit operator, with weights cold in memory.

    python -m benchmarks.linear [--kinds int4 nf4] [--kernel NAME] [--rows 1 8 64 256] [--group 128] [--threads 2]

Every path is compared with the reference first; one that is wrong gets no number and fails the run. "Of bound" is the
time that reading the path's weight would take at the rate measured in the same turns, relative to the time it took.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import copies_beyond_cache, in_turn, measure, print_json, reader
from quant import kernels
from quant.base import LinearShape, QuantWeight, Scheme, WeightKind, canonical_specs
from quant.packing import unpack_stream
from quant.reference import dequantize

SHAPES = (LinearShape(4096, 4096), LinearShape(4096, 14336))
TOLERANCE = 4e-3
"""Relative root mean square error: what a bfloat16 weight and result cost."""
READ_BYTES = 32 << 20
BASELINE = "bf16 F.linear"
INT4PACK_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Peer:
    """One path: how it multiplies, and as many copies of its weight, of ``nbytes`` each, as no cache holds."""

    multiply: Callable[[Tensor, Any], Tensor]
    copies: list[Any]
    nbytes: int


KINDS = ("int4", "int8", "nf4", "mxfp4", "nvfp4", "fp8", "fp8-block")
"""Integers have the group asked for and zero points; the others the groups that their formats have."""


def scheme_of(kind: str, shape: LinearShape, group: int) -> tuple[Scheme, torch.dtype]:
    """What a kind of :data:`KINDS` is, and the dtype of its scales."""
    if kind.startswith("int"):
        return Scheme(WeightKind(kind), (1, group), zero_point=True), torch.float16
    return {
        "nf4": (Scheme(WeightKind.NF4, (1, 64)), torch.float32),
        "mxfp4": (Scheme(WeightKind.E2M1, (1, 32)), torch.float8_e8m0fnu),
        "nvfp4": (Scheme(WeightKind.E2M1, (1, 16), global_scale=True), torch.float8_e4m3fn),
        "fp8": (Scheme(WeightKind.FP8, (1, shape.in_features)), torch.float32),
        "fp8-block": (Scheme(WeightKind.FP8, (128, 128)), torch.float32),
    }[kind]


def random_weight(kind: str, shape: LinearShape, group: int) -> QuantWeight:
    scheme, dtype = scheme_of(kind, shape, group)
    sizes = canonical_specs(scheme, shape)
    q = torch.randint(256, sizes["q"], dtype=torch.uint8)
    if scheme.kind is WeightKind.FP8:
        q = q.masked_fill((q & 127) == 127, 0).view(torch.float8_e4m3fn)  # the code of NaN
    return QuantWeight(
        scheme,
        shape,
        q=q,
        scale=(torch.rand(sizes["scale"]) * 0.01 + 0.01).to(dtype),
        zero=torch.randint(2**scheme.kind.bits, sizes["zero"], dtype=torch.uint8) if scheme.zero_point else None,
        table=torch.linspace(-1, 1, 16) if scheme.kind.has_table else None,
        global_scale=torch.ones(1) if scheme.global_scale else None,
    )


def ours(weight: QuantWeight, asked: str | None) -> tuple[str, Peer]:
    choice = kernels.choose(weight.scheme, weight.shape, weight.device, asked)
    for name, refusal in choice.refusals.items():
        print(f"{name}: {refusal}")
    kernel = choice.kernel
    first = kernel.prepare(weight)
    copies = [first, *(kernel.prepare(weight) for _ in range(1, copies_beyond_cache(first.nbytes)))]
    return f"{kernel.name} ({kernel.summary})", Peer(lambda x, w: kernel.apply(x, w, None), copies, first.nbytes)


def bf16(weight: QuantWeight) -> Peer:
    dense = dequantize(weight).to(torch.bfloat16)
    return Peer(F.linear, [dense.clone() for _ in range(copies_beyond_cache(dense.nbytes))], dense.nbytes)


def int4pack(weight: QuantWeight) -> Peer:
    """torch's operator: scale and zero point in bfloat16, ``w = (code - 8) * scale + zero``."""
    assert weight.zero is not None
    codes = unpack_stream(weight.q, 4, weight.shape.in_features).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    zero = (8 - weight.zero.float()) * weight.scale.float()
    parameters = torch.stack([weight.scale.float(), zero], dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
    nbytes = packed.nbytes + parameters.nbytes
    copies = [(packed.clone(), parameters.clone()) for _ in range(copies_beyond_cache(nbytes))]
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Peer(lambda x, w: operator(x, w[0], weight.scheme.group, w[1]), copies, nbytes)


def error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


def run(
    kind: str, shape: LinearShape, group: int, every_rows: list[int], asked: str | None
) -> tuple[list[dict[str, Any]], bool]:
    """The table of one kind and shape, printed and as data, and whether every path was right."""
    weight = random_weight(kind, shape, group)
    print(f"\n{kind}: {weight.scheme}, {shape}")
    name, peer = ours(weight, asked)
    peers = {BASELINE: bf16(weight), name: peer}
    if weight.scheme.kind is WeightKind.INT4 and group in INT4PACK_GROUPS:
        peers["torch int4pack"] = int4pack(weight)
    read, dense = reader(READ_BYTES), dequantize(weight).double()
    table, right = [], True
    print(f"{'rows':>5} {'path':28} {'ms':>8} {'spread':>7} {'x bf16':>7} {'of bound':>9}")
    for rows in every_rows:
        x = torch.randn(rows, shape.in_features).to(torch.bfloat16)
        expected = x.double() @ dense.T
        errors = {name: error(peer.multiply(x, peer.copies[0]), expected) for name, peer in peers.items()}
        correct = {name: peer for name, peer in peers.items() if errors[name] < TOLERANCE}
        for name in peers.keys() - correct.keys():
            print(f"{rows:5} {name:28} WRONG: relative error {errors[name]:.1e}")
            right = False
        timings = measure(
            {"read": read, **{name: in_turn(partial(p.multiply, x), p.copies) for name, p in correct.items()}}
        )
        rate = READ_BYTES / timings["read"].seconds
        print(f"{'':5} {'(reading memory)':28} {rate / 1e9:8.1f} GB/s")
        for name, peer in correct.items():
            timing = timings[name]
            of_bound, speedup = peer.nbytes / rate / timing.seconds, math.nan
            if BASELINE in timings:
                speedup = timings[BASELINE].seconds / timing.seconds
            busy = any(timings[other].disturbed for other in {name, BASELINE, "read"} & timings.keys())
            row = {
                "shape": [shape.out_features, shape.in_features],
                "kind": kind,
                "group": weight.scheme.group,
                "rows": rows,
                "path": name,
                "milliseconds": timing.seconds * 1e3,
                "spread": timing.spread,
                "times_bf16": speedup,
                "of_bound": of_bound,
                "error": errors[name],
                "disturbed": busy,
            }
            print(
                f"{rows:5} {name:28} {timing.seconds * 1e3:8.3f} {timing.spread:7.0%} {speedup:7.2f} {of_bound:9.0%}"
                + (" the machine was busy" if busy else "")
            )
            table.append(row)
    return table, right


def main() -> int:
    parser = argparse.ArgumentParser(description="Times quantized linear layers against bfloat16.")
    parser.add_argument("--kernel", choices=list(kernels.KERNELS), help="default: the one that would be chosen")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], metavar="M")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["int4"])
    parser.add_argument("--group", type=int, default=128, help="of integers; torch's operator knows 32 to 256")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    asked = [(kind, shape) for kind in options.kinds for shape in SHAPES]
    results = [run(*each, options.group, options.rows, options.kernel) for each in asked]
    print()
    print_json("linear", table=[row for table, _ in results for row in table])
    return 0 if all(right for _, right in results) else 1


if __name__ == "__main__":
    sys.exit(main())
