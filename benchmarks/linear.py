"""Times quantized linear layers against bfloat16 and torch's own 4-bit operator, with weights cold in memory.

    python -m benchmarks.linear [--kinds awq nf4] [--kernel NAME] [--rows 1 8 64 256] [--group 128] [--threads 2]

All kinds of a shape take turns, so that their ratios to each other hold on a machine that does not. Every path is compared
with the reference first; one that is wrong gets no number and fails the run. "Of bound" is the time that reading the path's
weight would take at the rate measured in the same turns, relative to the time it took.
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
from quant.activation import quantize_dequantize
from quant.base import Activation, LinearShape, QuantWeight, Scheme, WeightKind, canonical_specs
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
    """One path: how it multiplies, as many copies of its weight, of ``nbytes`` each, as no cache holds, and what it should
    give for ``x``."""

    multiply: Callable[[Tensor, Any], Tensor]
    copies: list[Any]
    nbytes: int
    expected: Callable[[Tensor], Tensor]


KINDS = (
    "awq", "gptq", "gptq-act-order", "compressed-tensors", "w4a8", "int8", "w8a8", "nf4", "mxfp4", "nvfp4", "fp8",
    "fp8-block",
)  # fmt: skip
"""Integers have the group asked for, ``w8a8`` one scale an output; the others the groups that their formats have. ``awq`` has
zero points; so has ``w4a8``, whose inputs are rounded to int8, in groups too."""
COMPARED = "awq"
"""What the other kinds of 4 bits should be as fast as."""


def scheme_of(kind: str, shape: LinearShape, group: int) -> tuple[Scheme, torch.dtype]:
    """What a kind of :data:`KINDS` is, and the dtype of its scales."""
    int4, int8, rows = WeightKind.INT4, WeightKind.INT8, (1, shape.in_features)
    return {
        "awq": (Scheme(int4, (1, group), zero_point=True), torch.float16),
        "gptq": (Scheme(int4, (1, group)), torch.float16),
        "gptq-act-order": (Scheme(int4, (1, group), act_order=True), torch.float16),
        "compressed-tensors": (Scheme(int4, (1, group)), torch.bfloat16),
        "w4a8": (Scheme(int4, (1, group), zero_point=True, activation=Activation(int8, group)), torch.float16),
        "int8": (Scheme(int8, (1, group), zero_point=True), torch.float16),
        "w8a8": (Scheme(int8, rows, activation=Activation(int8)), torch.bfloat16),
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
        order=torch.randperm(shape.in_features, dtype=torch.int32) if scheme.act_order else None,
        table=torch.linspace(-1, 1, 16) if scheme.kind.has_table else None,
        global_scale=torch.ones(1) if scheme.global_scale else None,
    )


def product_with(weight: QuantWeight) -> Callable[[Tensor], Tensor]:
    """The product in float64, of rounded inputs where they are to be."""
    dense, how = dequantize(weight).double(), weight.scheme.activation
    return lambda x: (x if how is None else quantize_dequantize(x, how, None, None)).double() @ dense.T


def ours(kind: str, weight: QuantWeight, asked: str | None) -> tuple[str, Peer]:
    choice = kernels.choose(weight.scheme, weight.shape, weight.device, asked)
    for name, refusal in choice.refusals.items():
        print(f"{name}: {refusal}")
    kernel = choice.kernel
    first = kernel.prepare(weight)
    copies = [first, *(kernel.prepare(weight) for _ in range(1, copies_beyond_cache(first.nbytes)))]
    print(f"{kind}: {weight.scheme}, by {kernel.name} ({kernel.summary})")
    return kind, Peer(lambda x, w: kernel.apply(x, w, None), copies, first.nbytes, product_with(weight))


def bf16(weight: QuantWeight) -> Peer:
    dense = dequantize(weight).to(torch.bfloat16)
    copies = [dense.clone() for _ in range(copies_beyond_cache(dense.nbytes))]
    return Peer(F.linear, copies, dense.nbytes, product_with(weight))


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
    return Peer(lambda x, w: operator(x, w[0], weight.scheme.group, w[1]), copies, nbytes, product_with(weight))


def error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


def run(
    kinds: list[str], shape: LinearShape, group: int, every_rows: list[int], asked: str | None
) -> tuple[list[dict[str, Any]], bool]:
    """The table of one shape, printed and as data, and whether every path was right."""
    print(f"\n{shape}")
    weights = {kind: random_weight(kind, shape, group) for kind in kinds}
    peers = {BASELINE: bf16(next(iter(weights.values())))}
    peers |= dict(ours(kind, weight, asked) for kind, weight in weights.items())
    if "awq" in weights and group in INT4PACK_GROUPS:
        peers["torch int4pack"] = int4pack(weights["awq"])
    read = reader(READ_BYTES)
    table, right = [], True
    print(f"{'rows':>5} {'path':28} {'ms':>8} {'spread':>7} {'x bf16':>7} {'x ' + COMPARED:>7} {'of bound':>9}")
    for rows in every_rows:
        x = torch.randn(rows, shape.in_features).to(torch.bfloat16)
        errors = {name: error(peer.multiply(x, peer.copies[0]), peer.expected(x)) for name, peer in peers.items()}
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
            of_bound = peer.nbytes / rate / timing.seconds
            speedup, beside = (
                timings[other].seconds / timing.seconds if other in timings else math.nan
                for other in (BASELINE, COMPARED)
            )
            busy = any(timings[other].disturbed for other in {name, BASELINE, "read"} & timings.keys())
            row = {
                "shape": [shape.out_features, shape.in_features],
                "group": weights[name].scheme.group if name in weights else group,
                "rows": rows,
                "path": name,
                "milliseconds": timing.seconds * 1e3,
                "spread": timing.spread,
                "times_bf16": speedup,
                f"times_{COMPARED}": beside if math.isfinite(beside) else None,
                "of_bound": of_bound,
                "error": errors[name],
                "disturbed": busy,
            }
            print(
                f"{rows:5} {name:28} {timing.seconds * 1e3:8.3f} {timing.spread:7.0%} {speedup:7.2f} {beside:7.2f} "
                f"{of_bound:9.0%}" + (" the machine was busy" if busy else "")
            )
            table.append(row)
    return table, right


def main() -> int:
    parser = argparse.ArgumentParser(description="Times quantized linear layers against bfloat16.")
    parser.add_argument("--kernel", choices=list(kernels.KERNELS), help="default: the one that would be chosen")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], metavar="M")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--group", type=int, default=128, help="of integers; torch's operator knows 32 to 256")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = [run(options.kinds, shape, options.group, options.rows, options.kernel) for shape in SHAPES]
    print()
    print_json("linear", table=[row for table, _ in results for row in table])
    return 0 if all(right for _, right in results) else 1


if __name__ == "__main__":
    sys.exit(main())
