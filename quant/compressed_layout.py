"""How compressed-tensors arranges one layer's tensors: what shapes they must have, and how they become canonical.

Source: compressed-tensors 0.20.0 and 0.12.2, ``compressors/``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quant.base import BadCheckpoint, LinearShape, Scheme, TensorSpec, WeightKind, canonical_specs
from quant.float8 import POWER_DTYPES, SCALE_DTYPES
from quant.packing import pack_stream, unpack_bitmask, unpack_words


def word_counts(bits: int, count: int) -> tuple[int, int]:
    """int32 words of ``count`` codes: in one continuous stream, and with no code across the end of a word."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def expected_codes(local: str, stored: TensorSpec, scheme: Scheme, shape: LinearShape) -> dict[str, TensorSpec]:
    """The tensors that hold the codes, as they must be."""
    rows, columns, bits = shape.out_features, shape.in_features, scheme.kind.bits
    if local == "weight_packed" and scheme.kind.is_integer:
        counts = word_counts(bits, columns)
        words = stored.shape[-1] if stored.shape and stored.shape[-1] in counts else counts[0]
        return {local: TensorSpec((rows, words), torch.int32)}
    if local == "weight_packed":
        return {local: TensorSpec((rows, columns // 2), torch.uint8)}
    dtype = torch.float8_e4m3fn if scheme.kind is WeightKind.FP8 else torch.int8
    if local == "weight":
        return {local: TensorSpec((rows, columns), dtype)}
    return {
        "compressed": TensorSpec((rows, columns // 2), dtype),
        "bitmask": TensorSpec((rows, -(-columns // 8)), torch.uint8),
    }


def expected_scales(stored: Mapping[str, TensorSpec], scheme: Scheme, shape: LinearShape) -> dict[str, TensorSpec]:
    """The scales and zero points as they must be; where several forms are written, the one that is stored."""
    blocks = canonical_specs(scheme, shape)["scale"]
    forms = {(1, 1): [(), (1,), (1, 1)], (shape.out_features, 1): [(shape.out_features, 1), (shape.out_features,)]}
    scale = stored["weight_scale"]
    fitting = scale.shape if scale.shape in forms.get((blocks[0], blocks[1]), [blocks]) else blocks
    if scheme.global_scale:
        dtypes: tuple[torch.dtype, ...] = (torch.float8_e4m3fn,)
    else:
        dtypes = SCALE_DTYPES if scheme.kind.is_integer else (*SCALE_DTYPES, *POWER_DTYPES)
    specs = {"weight_scale": TensorSpec(fitting, scale.dtype if scale.dtype in dtypes else dtypes[0])}
    for local in ("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale"):
        if local in stored and math.prod(stored[local].shape) != 1:
            specs[local] = TensorSpec((1,), stored[local].dtype)
    zero = stored.get("weight_zero_point")
    if zero is not None and not _is_packed(zero, scheme, shape) and zero.shape != fitting:
        specs["weight_zero_point"] = TensorSpec(fitting, torch.int8)
    return specs


def canonical_codes(tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape, continuous: bool) -> Tensor:
    """``q``, columns in the order of the file. ``continuous`` decides where the number of words leaves both possible."""
    if scheme.kind is WeightKind.E2M1:
        return tensors["weight_packed"]
    if "compressed" in tensors:
        numbers = unpack_bitmask(tensors["compressed"], tensors["bitmask"], (shape.out_features, shape.in_features))
    elif "weight" in tensors:
        numbers = tensors["weight"]
    else:
        return pack_stream(
            _from_words(tensors["weight_packed"], scheme, shape.in_features, continuous), scheme.kind.bits
        )
    if scheme.kind is WeightKind.FP8:
        return numbers
    return pack_stream(_unsigned(numbers, scheme, "weight"), scheme.kind.bits)


def canonical_zeros(tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape, continuous: bool) -> Tensor:
    """``zero``, from zero points packed along the outputs or plain."""
    zeros = tensors["weight_zero_point"]
    if _is_packed(TensorSpec(tuple(zeros.shape), zeros.dtype), scheme, shape):
        return _from_words(zeros.t(), scheme, shape.out_features, continuous).t().contiguous()
    return _unsigned(zeros, scheme, "weight_zero_point").reshape(canonical_specs(scheme, shape)["zero"])


def sorted_by_group(g_idx: Tensor, group: int) -> Tensor:
    """``order``: inputs sorted by the group that ``weight_g_idx`` gives them. -1 anywhere means that it was never set."""
    count = len(g_idx)
    if bool((g_idx < 0).any()):
        return torch.arange(count, dtype=torch.int32, device=g_idx.device)
    order = torch.argsort(g_idx, stable=True)
    natural = torch.arange(count, device=g_idx.device) // group
    if not torch.equal(g_idx[order].to(natural.dtype), natural):
        raise BadCheckpoint(
            f"weight_g_idx does not give each of {-(-count // group)} groups {group} of {count} inputs. The file is damaged."
        )
    return order.to(torch.int32)


def _is_packed(zero: TensorSpec, scheme: Scheme, shape: LinearShape) -> bool:
    blocks = canonical_specs(scheme, shape)["zero"]
    counts = word_counts(scheme.kind.bits, shape.out_features)
    return (
        scheme.kind.is_integer
        and zero.dtype == torch.int32
        and len(zero.shape) == 2
        and zero.shape[0] in counts
        and zero.shape[1] == blocks[1]
    )


def _from_words(words: Tensor, scheme: Scheme, count: int, continuous: bool) -> Tensor:
    across, apart = word_counts(scheme.kind.bits, count)
    runs_on = continuous if across == apart else words.shape[1] == across
    return unpack_words(words, scheme.kind.bits, count, runs_on)


def _unsigned(numbers: Tensor, scheme: Scheme, name: str) -> Tensor:
    """Signed integers, one a byte or wider, to unsigned codes."""
    half = 2 ** (scheme.kind.bits - 1)
    low, high = int(numbers.min()), int(numbers.max())
    if low < -half or high >= half:
        raise BadCheckpoint(
            f"{name} holds {low} to {high}, but {scheme.kind.value} is {-half} to {half - 1} (quantization_config: num_bits)."
        )
    return (numbers.to(torch.int16) + half).to(torch.uint8)
