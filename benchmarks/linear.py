"""Times 4-bit linear layers against bfloat16 and torch's own 4-bit operator, with weights cold in memory.

    python -m benchmarks.linear [--kernel NAME] [--rows 1 8 64 256] [--group 128] [--threads 2]

Every path is compared with the reference first; one that is wrong gets no number and fails the run. "Of bound" is the
time that reading the path's weight would take at the rate measured in the same turns, relative to the time it took.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import copies_beyond_cache, in_turn, measure, print_json, reader
from quant import kernels
from quant.base import LinearShape, QuantWeight, Scheme, WeightKind
from quant.packing import unpack_stream
from quant.reference import dequantize

SHAPES = (LinearShape(4096, 4096), LinearShape(4096, 14336))
TOLERANCE = 4e-3
"""Relative root mean square error: what a bfloat16 weight and result cost."""
READ_BYTES = 32 << 20
BASELINE = "bf16 F.linear"


@dataclass(frozen=True)
class Peer:
    """One path: ``calls`` are the same multiplication by as many copies of the weight, of ``nbytes`` each."""

    nbytes: int
    calls: list[Callable[[Tensor], Tensor]]


def random_weight(shape: LinearShape, group: int) -> QuantWeight:
    groups = shape.in_features // group
    return QuantWeight(
        Scheme(WeightKind.INT4, (1, group), zero_point=True),
        shape,
        q=torch.randint(256, (shape.out_features, shape.in_features // 2), dtype=torch.uint8),
        scale=(torch.rand(shape.out_features, groups) * 0.01).to(torch.float16),
        zero=torch.randint(16, (shape.out_features, groups), dtype=torch.uint8),
    )


def ours(weight: QuantWeight, asked: str | None) -> tuple[str, Peer]:
    choice = kernels.choose(weight.scheme, weight.shape, weight.device, asked)
    for name, refusal in choice.refusals.items():
        print(f"{name}: {refusal}")
    kernel, prepared = choice.kernel, choice.kernel.prepare(weight)
    copies = [prepared.map(Tensor.clone) for _ in range(copies_beyond_cache(prepared.nbytes))]
    peer = Peer(prepared.nbytes, [lambda x, w=w: kernel.apply(x, w, None) for w in copies])
    return f"{kernel.name} ({kernel.summary})", peer


def bf16(weight: QuantWeight) -> Peer:
    dense = dequantize(weight).to(torch.bfloat16)
    copies = [dense.clone() for _ in range(copies_beyond_cache(dense.nbytes))]
    return Peer(dense.nbytes, [lambda x, w=w: F.linear(x, w) for w in copies])


def int4pack(weight: QuantWeight) -> Peer:
    """torch's operator: scale and zero point in bfloat16, ``w = (code - 8) * scale + zero``."""
    assert weight.zero is not None
    codes = unpack_stream(weight.q, 4, weight.shape.in_features).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    zero = (8 - weight.zero.float()) * weight.scale.float()
    parameters = torch.stack([weight.scale.float(), zero], dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
    nbytes = packed.nbytes + parameters.nbytes
    copies = [(packed.clone(), parameters.clone()) for _ in range(copies_beyond_cache(nbytes))]
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Peer(nbytes, [lambda x, w=w: multiply(x, w[0], weight.scheme.group, w[1]) for w in copies])


def error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


def run(shape: LinearShape, group: int, every_rows: list[int], asked: str | None) -> tuple[list[dict[str, Any]], bool]:
    """The table of one shape, printed and as data, and whether every path was right."""
    weight, right, table = random_weight(shape, group), True, []
    dense = dequantize(weight).double()
    name, peer = ours(weight, asked)
    peers = {BASELINE: bf16(weight), "torch int4pack": int4pack(weight), name: peer}
    read = reader(READ_BYTES)
    print(f"\n{weight.scheme}, {shape}\n{'rows':>5} {'path':28} {'ms':>8} {'spread':>7} {'x bf16':>7} {'of bound':>9}")
    for rows in every_rows:
        x = torch.randn(rows, shape.in_features).to(torch.bfloat16)
        errors = {name: error(peer.calls[0](x), x.double() @ dense.T) for name, peer in peers.items()}
        wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
        candidates = {
            name: in_turn(lambda call, x=x: call(x), p.calls) for name, p in peers.items() if name not in wrong
        }
        timings = measure({"read": read, **candidates})
        rate = READ_BYTES / timings["read"].seconds
        for name, peer in peers.items():
            if name in wrong:
                print(f"{rows:5} {name:28} WRONG: relative error {wrong[name]:.1e}")
                right = False
                continue
            seconds, speedup = timings[name].seconds, timings[BASELINE].seconds / timings[name].seconds
            bound = peer.nbytes / rate
            print(
                f"{rows:5} {name:28} {seconds * 1e3:8.3f} {timings[name].spread:7.0%} {speedup:7.2f} {bound / seconds:9.0%}"
            )
            table.append(
                {
                    "shape": [shape.out_features, shape.in_features],
                    "group": group,
                    "rows": rows,
                    "path": name,
                    "milliseconds": round(seconds * 1e3, 4),
                    "bf16_ratio": round(speedup, 3),
                    "of_bound": round(bound / seconds, 3),
                    "read_gb_s": round(rate / 1e9, 2),
                    "error": errors[name],
                }
            )
        print(f"{'':5} reading memory: {rate / 1e9:.1f} GB/s")
    return table, right


def main() -> int:
    parser = argparse.ArgumentParser(description="Times 4-bit linear layers against bfloat16.")
    parser.add_argument("--kernel", choices=list(kernels.KERNELS), help="default: the one that would be chosen")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], metavar="M")
    parser.add_argument("--group", type=int, default=128, choices=(32, 64, 128, 256))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = [run(shape, options.group, options.rows, options.kernel) for shape in SHAPES]
    print_json("linear", table=[row for table, _ in results for row in table])
    return 0 if all(right for _, right in results) else 1


if __name__ == "__main__":
    sys.exit(main())
