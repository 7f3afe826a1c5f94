"""Quantized inputs: rounded to what a few bits can hold and back, in plain torch. The truth that kernels are compared with.

In the dtype of ``x``, as compressed-tensors does it: a scale that is rounded to bfloat16 moves codes. LLM.int8 alone is
computed in float32, as bitsandbytes does. Each token by itself, so that an answer does not depend on what else is in
the batch; of LLM.int8's columns that are left alone, those of the token. compressed-tensors' dynamic ``tensor`` is one scale
for everything that is multiplied together, and computed so.

Sources: compressed-tensors 0.20.0 (``quantization/utils/helpers.py`` ``calculate_qparams``, ``mxfp_utils.py``,
``lifecycle/forward_helpers.py`` ``_quantize_dequantize``), bitsandbytes 0.50.2 (``backends/default/ops.py``
``int8_vectorwise_quant``), DeepSeek-V3 (``inference/kernel.py`` ``act_quant``), FBGEMM (``quantize_fp8_per_row``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.scheme import Activation, ScaleRule, WeightKind

FP8_MAX, E2M1_MAX = 448.0, 6.0
LARGEST_EXPONENT = {WeightKind.FP8: 8, WeightKind.E2M1: 2}
"""Of the largest number of a float kind."""


def quantize_dequantize(x: Tensor, how: Activation, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """``x [.., in]`` after quantization and back. ``scale`` and ``zero`` are the stored ones, if any."""
    if how.threshold is not None:
        return _llm_int8(x.to(torch.float32), how.threshold)
    if how.whole and x.numel():
        alone = replace(how, whole=False)
        return quantize_dequantize(x.reshape(1, -1), alone, scale, zero).view(x.shape)
    inputs = x.shape[-1]
    group = min(how.group or inputs, inputs)
    grouped = F.pad(x, (0, -inputs % group)).unflatten(-1, (-1, group))
    low, high = _range(how.kind)
    if how.static:
        assert scale is not None
        step = scale
    else:
        step, zero = _dynamic(grouped, how, scale)
    shift = 0.0 if zero is None else zero
    codes = round_to((grouped / step + shift).clamp(low, high), how.kind)
    return ((codes - shift) * step).flatten(-2)[..., :inputs].to(x.dtype)


def _range(kind: WeightKind) -> tuple[float, float]:
    if kind.is_integer:
        return -(2.0 ** (kind.bits - 1)), 2.0 ** (kind.bits - 1) - 1
    largest = FP8_MAX if kind is WeightKind.FP8 else E2M1_MAX
    return -largest, largest


def round_to(x: Tensor, kind: WeightKind) -> Tensor:
    """To the nearest number of this kind, ties to the even code."""
    if kind.is_integer:
        return x.round()
    if kind is WeightKind.FP8:
        return x.to(torch.float8_e4m3fn).to(x.dtype)
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x / step).round() * step


def _dynamic(x: Tensor, how: Activation, stored: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every group of ``x [.., groups, group]``."""
    low, high = _range(how.kind)
    if not how.symmetric:
        # Zero itself must be a code, hence the zeros that the range always covers.
        least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = nonzero((most - least) / (high - low))
        return step, (low - least / step).clamp(low, high).round()
    largest = x.abs().amax(-1, keepdim=True)
    if how.clamp is not None:
        largest = largest.clamp(max=how.clamp)
    step = largest / ((high - low) / 2)
    if how.rule is ScaleRule.POWER_UP:
        step = torch.exp2(torch.log2(nonzero(step)).ceil())
    elif how.rule is ScaleRule.POWER:
        step = torch.exp2(power_exponent(largest, how.kind)).to(x.dtype)
    elif how.rule is ScaleRule.LOCAL:
        assert stored is not None
        local = (step * stored).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32)
        smallest = torch.finfo(torch.float8_e4m3fn).eps
        return torch.where(local == 0, smallest, local) / stored, None
    return nonzero(step), None


def power_exponent(largest: Tensor, kind: WeightKind) -> Tensor:
    """Exponents, in float32, of the scales of blocks with these largest magnitudes: the power of two below; above from 1.75
    times that power on, where E2M1 would round up beyond its largest number."""
    mantissa, exponent = torch.frexp(nonzero(largest).float())
    exponent = exponent - 1 + (mantissa >= 0.875).int() - LARGEST_EXPONENT[kind]
    return exponent.clamp(-127, 127).float()


def nonzero(step: Tensor) -> Tensor:
    """All zeros have no scale; any other one will do."""
    return torch.where(step == 0, 1.0, step)


def _llm_int8(x: Tensor, threshold: float) -> Tensor:
    """int8 a token, absmax on 127; from ``threshold`` on a number is an outlier, neither measured nor rounded."""
    outliers = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    regular = x.masked_fill(outliers, 0)
    largest = nonzero(regular.abs().amax(-1, keepdim=True))
    return torch.where(outliers, x, (regular * (127 / largest)).round() * (largest / 127))
