"""Round-to-nearest of our own, from the formats' descriptions: what a quantizer does that knows the weights alone.

Integers with a zero point span the range of their group, symmetric ones its largest magnitude; NF4 and FP4 are the tables of
bitsandbytes under the largest magnitude of 64 weights; FP8 is one scale an output; E2M1 (MXFP4) a power of two for 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.base import LinearShape, QuantWeight, Scheme, WeightKind
from quant.packing import E2M1_VALUES, pack_stream

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA (arXiv 2305.14314), appendix E."""
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
"""bitsandbytes' FP4: a sign, two bits of exponent, one of mantissa; the largest is 1."""


def quantize(weight: Tensor, scheme: Scheme, shape: LinearShape) -> QuantWeight:
    """The nearest weight of a scheme with blocks of one output, for ``weight [out, in]``. A group has to divide the inputs."""
    kind, group = scheme.kind, scheme.group
    grouped = weight.float().unflatten(-1, (-1, group))
    largest = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    if kind.is_integer:
        return _integers(grouped, scheme, shape)
    if kind is WeightKind.FP8:
        scale = largest / 448
        return QuantWeight(scheme, shape, (grouped / scale).flatten(1).to(torch.float8_e4m3fn), scale.squeeze(-1))
    if kind is WeightKind.E2M1:
        exponent = largest.log2().floor() - 2
        codes = _nearest(grouped / exponent.exp2(), torch.tensor(E2M1_VALUES))
        scale = (exponent.squeeze(-1) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        return QuantWeight(scheme, shape, pack_stream(codes.flatten(1), 4), scale)
    table = torch.tensor(NF4 if kind is WeightKind.NF4 else FP4)
    codes = _nearest(grouped / largest, table)
    return QuantWeight(scheme, shape, pack_stream(codes.flatten(1), 4), largest.squeeze(-1), table=table)


def integer_grid(grouped: Tensor, bits: int, zero_point: bool) -> tuple[Tensor, Tensor]:
    """Scale (float16, in float32) and zero of groups ``[..., group]``."""
    top = 2**bits - 1
    if zero_point:
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / top).half().float().clamp(min=1e-7)
        return scale, (-low / scale).round().clamp(0, top)
    scale = (2 * grouped.abs().amax(-1, keepdim=True) / top).half().float().clamp(min=1e-7)
    return scale, torch.full_like(scale, 2 ** (bits - 1))


def _integers(grouped: Tensor, scheme: Scheme, shape: LinearShape) -> QuantWeight:
    bits = scheme.kind.bits
    scale, zero = integer_grid(grouped, bits, scheme.zero_point)
    codes = ((grouped / scale).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)
    zeros = zero.squeeze(-1).to(torch.uint8) if scheme.zero_point else None
    return QuantWeight(scheme, shape, pack_stream(codes.flatten(1), bits), scale.squeeze(-1).half(), zeros)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Codes of the nearest entries, whatever order the table is in."""
    ordered, codes = table.sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    return codes[torch.bucketize(values, middles)].to(torch.uint8)
