"""Quantizing while loading: the numbers are those of the definition, written out in loops, or of the library itself."""

from __future__ import annotations

from itertools import product
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from quant import onload
from quant.base import LinearShape, QuantWeight, UnsupportedCheckpoint, WeightKind
from quant.onload import base
from quant.packing import E2M1_VALUES, swap_nibbles, unpack_stream
from quant.reference import dequantize

SHAPE = LinearShape(96, 70)


def weight_of(shape: LinearShape = SHAPE, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of very different size, one of zeros, one of one sign, so that neighbours' scales and zeros show."""
    weight = torch.randn(shape.out_features, shape.in_features) * torch.logspace(-3, 1, shape.out_features)[:, None]
    weight[3] = 0
    weight[5] = weight[5].abs() + 0.5
    return weight.to(dtype)


def quantized(name: str, weight: Tensor, **options: Any) -> QuantWeight:
    method = onload.create(name, options, {}, weight.dtype)
    assert method is not None
    shape = LinearShape(weight.shape[1], weight.shape[0])
    scheme = method.scheme_for("layer", shape)
    assert scheme is not None
    return method.repack({"weight": weight}, scheme, shape)


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a few rows are worked on in several parts, too."""
    for module in (base, onload.rounding, onload.bnb):
        monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", 32 * 96, raising=True)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 32, False), (3, -1, True), (4, 32, False), (6, 96, True), (8, 32, True)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_integers_are_the_nearest_codes(bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = weight_of(dtype=dtype)
    found = quantized(f"int{bits}", weight, group_size=group, symmetric=symmetric)
    size, top = 96 if group == -1 else group, 2**bits - 1
    codes = unpack_stream(found.q, bits, 96)
    for row, place in product(range(70), range(96 // size)):
        part = weight[row, place * size : (place + 1) * size].float()
        low, high = min(0.0, part.min().item()), max(0.0, part.max().item())
        exact = (high - low) / top if not symmetric else part.abs().max().item() / (top / 2)
        scale = found.scale[row, place].item()
        assert scale == pytest.approx(exact or 1.0, rel=2.0**-8 if dtype == torch.bfloat16 else 1e-6)
        middle = 2 ** (bits - 1) if symmetric else min(max(round(-low / scale), 0), top)
        assert found.zero is None or found.zero[row, place] == middle
        for column in range(size):
            wanted = part[column].item() / scale + middle
            code = codes[row, place * size + column].item()
            assert abs(code - min(max(wanted, 0), top)) <= 0.5 + 1e-4


def test_zeros_stay_zero_whatever_the_width() -> None:
    for name in ("int4", "int8", "fp8", "mxfp4", "bitsandbytes"):
        assert not dequantize(quantized(name, weight_of()))[3].any(), name


def test_a_group_that_does_not_divide_falls_back_to_a_divisor_and_says_so() -> None:
    method = onload.create("int4", {}, {}, torch.bfloat16)
    assert method is not None
    for inputs, group in ((256, 128), (48, 48), (3420, 114), (200, 100), (131, 1)):
        shape = LinearShape(inputs, 8)
        assert method.scheme(shape).group == group  # type: ignore[union-attr]
        assert (method.remark(shape) is None) == (group in (128,))


def test_fp8_is_torchs_rounding_under_one_scale_a_row() -> None:
    weight = weight_of()
    found = quantized("fp8", weight)
    for row in range(70):
        largest = weight[row].abs().max().float()
        scale = largest / 448 if largest else torch.tensor(1.0)
        assert found.scale[row, 0] == scale
        assert torch.equal(found.q[row].float(), (weight[row].float() / scale).to(torch.float8_e4m3fn).float())
    assert found.scheme.activation is not None
    assert found.scheme.activation.kind is WeightKind.FP8


def test_mxfp4_is_compressed_tensors() -> None:
    mxfp = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    weight = weight_of(dtype=torch.float32)
    found = quantized("mxfp4", weight)
    amax = weight.view(70, 3, 32).abs().amax(-1)
    exponents = mxfp.generate_mx_scales(x=amax, num_bits=4).int()
    seen = found.scale.view(torch.uint8).int()
    assert torch.equal(seen[amax > 0], exponents[amax > 0])
    scales = torch.exp2(seen.float() - 127).repeat_interleave(32, 1)
    values = torch.tensor(sorted(set(E2M1_VALUES)))
    steps = (weight / scales)[..., None] - values
    assert torch.equal(dequantize(found), values[steps.abs().argmin(-1)] * scales)  # no ties among random numbers


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("inputs", [128, 96, 37])
def test_four_bits_are_the_librarys(kind: str, double: bool, inputs: int) -> None:
    weight = weight_of(LinearShape(inputs, 70))
    found = quantized("bitsandbytes", weight, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    codes = unpack_stream(swap_nibbles(packed.view(1, -1)), 4, weight.numel()).view(weight.shape)
    assert torch.equal(unpack_stream(found.q, 4, inputs), codes)
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    assert torch.equal(found.scale.flatten(), absmax)
    blocks = absmax.repeat_interleave(64)[: weight.numel()].view(weight.shape)
    assert torch.equal(dequantize(found), state.code[codes.int()] * blocks)
    if inputs == 128:  # bitsandbytes 0.50.2 dequantizes wrongly on a CPU where blocks run over the ends of rows
        assert torch.equal(dequantize(found).bfloat16(), bnb.dequantize_4bit(packed, state))


def test_llm_int8_is_the_librarys() -> None:
    weight = weight_of()
    found = quantized("bitsandbytes", weight, load_in_8bit=True, llm_int8_threshold=4.0)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal((found.q ^ 128).view(torch.int8), codes)
    assert torch.equal(found.scale.flatten(), absmax / 127)
    assert found.scheme.activation is not None
    assert found.scheme.activation.threshold == 4.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("awq", {}, r"--quantization awq was asked for.*not quantized.*llm-compressor.*GPTQModel.*int4"),
        ("gptq_marlin", {}, r"written by GPTQModel"),
        ("compressed-tensors", {}, r"written by llm-compressor"),
        ("int9", {}, r"int9: no such format; known: .*int8"),
        ("mxfp8", {}, r"not quantized.*choose one of .*fp8"),
        (None, {"group_size": 64}, r"group_size say how.*add --quantization"),
        ("int4", {"groupsize": 64}, r"unknown option 'groupsize'. Did you mean group_size"),
        ("int4", {"group_size": 0}, r"group_size must be a positive number.*0"),
        ("int4", {"group_size": True}, r"group_size must be int, not True"),
        ("int4", {"symmetric": 1}, r"symmetric must be bool, not 1"),
        ("int4", {"load_in_4bit": True}, r"load_in_4bit means nothing for --quantization int4"),
        ("fp8", {"group_size": 64}, r"group_size means nothing for --quantization fp8"),
        ("bnb", {"load_in_4bit": True, "load_in_8bit": True}, r"exclude each other"),
        ("bnb", {"load_in_4bit": False}, r"one of them must be"),
        ("bnb", {"bnb_4bit_quant_type": "int4"}, r"must be nf4 or fp4, not 'int4'"),
        ("bnb", {"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, r"means nothing for load_in_8bit"),
        ("bnb", {"llm_int8_threshold": 5.0}, r"means nothing for load_in_4bit"),
    ],
)
def test_what_means_nothing_is_refused(name: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        onload.create(name, options, {}, torch.bfloat16)


def test_an_option_of_bitsandbytes_implies_it() -> None:
    method = onload.create(None, {"load_in_8bit": True}, {}, torch.bfloat16)
    assert method is not None
    assert method.name == "bitsandbytes"
    assert onload.create(None, None, {}, torch.bfloat16) is None
