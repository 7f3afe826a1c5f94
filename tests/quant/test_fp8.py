"""FP8 under its many names: blocks with ragged edges, every family of scales, contradictions and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.base import BadCheckpoint, LinearShape, QuantWeight, UnsupportedCheckpoint
from quant.methods.compressed import CompressedTensors
from quant.methods.fp8 import FP8
from quant.methods.modelopt import ModelOpt
from quant.reference import dequantize
from tests.quant.checkpoints import LAYER, headers_of, read, stored
from tests.quant.checkpoints import SHAPE as SHAPE_OF_LAYER

SHAPE = LinearShape(200, 72)
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}


def make(config: dict[str, Any], tensors: dict[str, Tensor]) -> FP8:
    method = FP8.from_checkpoint(config, headers_of(tensors))
    assert method is not None
    return method


def layer(**tensors: Tensor) -> dict[str, Tensor]:
    """A layer ``a`` with random FP8 weights and these tensors beside them."""
    weight = torch.randn(SHAPE.out_features, SHAPE.in_features).to(torch.float8_e4m3fn)
    return {"a.weight": weight} | {f"a.{name}": tensor for name, tensor in tensors.items()}


def found(config: dict[str, Any], tensors: dict[str, Tensor]) -> QuantWeight:
    return read(make(config, tensors), tensors, "a", SHAPE)


@pytest.mark.parametrize("block", [[128, 128], [32, 64], [1, 32]])
def test_ragged_blocks_use_the_block_size_of_the_configuration(block: list[int]) -> None:
    scales = torch.rand(-(-72 // block[0]), -(-200 // block[1]))
    tensors = layer(weight_scale_inv=scales)
    values = dequantize(found(BLOCKS | {"weight_block_size": block}, tensors))
    for row, column in ((0, 0), (71, 199), (33, 130)):
        expected = tensors["a.weight"][row, column].float() * scales[row // block[0], column // block[1]]
        assert values[row, column] == expected


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (72,), (72, 1)])
def test_every_name_and_shape_of_a_scale(name: str, shape: tuple[int, ...]) -> None:
    scale = torch.rand(shape) + 0.5
    tensors = layer(**{name: scale})
    expected = tensors["a.weight"].float() * (scale.view(-1, 1) if scale.numel() > 1 else scale)
    assert torch.equal(dequantize(found(TENSOR, tensors)), expected)


@pytest.mark.parametrize("shape", [(), (72,), (1, 2)])
def test_scales_of_gptqmodel_are_divisors(shape: tuple[int, ...]) -> None:
    """``quantize_fp8_weight`` stores ``448 / absmax`` and says so."""
    divisor = torch.rand(shape) * 1000 + 400
    tensors = layer(weight_scale_inv=divisor)
    config = {"quant_method": "fp8", "format": "float8_e4m3fn", "weight_scale_semantics": "inverse"}
    block = {"weight_scale_method": "block", "weight_block_size": [128, 128]} if len(shape) == 2 else {}
    spread = divisor[0].repeat_interleave(128)[:200] if block else divisor.view(-1, 1)
    torch.testing.assert_close(dequantize(found(config | block, tensors)), tensors["a.weight"].float() / spread)
    with pytest.raises(UnsupportedCheckpoint, match="weight_scale_semantics 'direct'"):
        make(config | {"weight_scale_semantics": "direct"}, tensors)


def test_rules_of_gptqmodel_for_single_modules() -> None:
    """``dynamic``: another block, one scale a row, or dense."""
    blocks = {"weight_scale_method": "block", "weight_scale_semantics": "inverse"}
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], **blocks}
    small = {"+:a": {"weight_block_size": [32, 64], **blocks}}
    divisor = torch.rand(3, 4) * 1000 + 400
    weight = found(config | {"dynamic": small}, tensors := layer(weight_scale_inv=divisor))
    spread = divisor.repeat_interleave(32, 0)[:72].repeat_interleave(64, 1)[:, :200]
    torch.testing.assert_close(dequantize(weight), tensors["a.weight"].float() / spread)
    assert weight.scheme.activation is not None
    assert weight.scheme.activation.group == 64
    rows = layer(weight_scale_inv=divisor.view(-1)[:1].expand(72).contiguous())
    assert found(config | {"dynamic": {"a": {"weight_scale_method": "row"}}}, rows).scheme.block == (1, 200)
    method = make(config | {"dynamic": {"-:a": {}, "nobody": {}}}, tensors)
    assert method.unmatched(["a"]) == ["dynamic: nobody"]
    assert "dynamic leaves it dense by '-:a'" in method.dense_reason("a")
    with pytest.raises(BadCheckpoint, match="a: a quantized weight is stored, but dynamic leaves it dense by '-:a'"):
        method.scheme_for("a", LinearShape(200, 72))
    with pytest.raises(UnsupportedCheckpoint, match=r"weight_scale_semantics 'direct' .*dynamic 'a'"):
        make(config | {"dynamic": {"a": {"weight_scale_semantics": "direct"}}}, tensors)


def test_the_clamp_that_old_fbgemm_files_store_needs_no_owner() -> None:
    method = make({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, {})
    assert "activation_scale_ub" in (method.ignored("model.layers.0.mlp.up_proj.input_scale_ub") or "")
    assert method.ignored("model.layers.0.mlp.up_proj.weight_scale") is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_powers_of_two(dtype: torch.dtype) -> None:
    codes = torch.randint(118, 130, (1, 2), dtype=torch.uint8)
    tensors = layer(weight_scale_inv=codes.view(dtype))
    weight = found(BLOCKS | {"scale_fmt": "ue8m0"}, tensors)
    powers = torch.exp2(codes.float() - 127).repeat_interleave(128, 1)[:, :200]
    assert torch.equal(dequantize(weight), tensors["a.weight"].float() * powers)
    assert "power of two, rounded up" in str(weight.scheme.activation)


def test_a_scale_byte_that_means_nan_is_an_error() -> None:
    tensors = layer(weight_scale_inv=torch.tensor([[127, 255]], dtype=torch.uint8))
    with pytest.raises(BadCheckpoint, match="1 of 2 scales are the byte 255"):
        found(BLOCKS, tensors)


@pytest.mark.parametrize("name", ["activation_scale", "input_scale", "qscale_act"])
def test_static_inputs_under_every_name(name: str) -> None:
    weight = found(STATIC, layer(weight_scale=torch.tensor(0.5), **{name: torch.tensor([0.25])}))
    assert weight.input_scale is not None
    assert weight.input_scale.tolist() == [0.25]


def test_inputs_are_quantized_as_the_dialect_says() -> None:
    rows, blocks = layer(weight_scale=torch.rand(72, 1)), layer(weight_scale_inv=torch.rand(1, 2))
    mx = layer(weight_scale_inv=torch.randint(120, 130, (72, 7), dtype=torch.uint8))
    fbgemm = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 900.0}
    assert str(found(TENSOR, rows).scheme.activation) == "fp8 per token"
    assert str(found(BLOCKS, blocks).scheme.activation) == "fp8 per 128 inputs"
    assert str(found({"quant_method": "mxfp8"}, mx).scheme.activation) == "fp8 per 32 inputs, scale power of two"
    activation = found(fbgemm, rows).scheme.activation
    assert activation is not None
    assert activation.clamp == 900.0


def test_scales_of_the_kv_cache_are_left_out_with_a_reason() -> None:
    method = make(TENSOR, layer(weight_scale=torch.tensor(1.0)))
    attention = "model.layers.0.self_attn"
    for name in ("k_scale", "v_scale", "kv_scale", "k_proj.k_scale", "v_proj.output_scale", "q_scale", "k_zero_point"):
        assert "KV cache" in (method.ignored(f"{attention}.{name}") or "")
    for name in ("k_proj.weight_scale", "k_proj.input_scale", "o_proj.output_scale", "k_norm.weight"):
        assert method.ignored(f"{attention}.{name}") is None


def test_a_modelopt_file_and_the_same_file_under_vllms_names_are_one() -> None:
    config, tensors = stored("modelopt--fp8-kv")
    modelopt = ModelOpt.from_checkpoint(config, headers_of(tensors))
    assert modelopt is not None
    ours, theirs = read(modelopt, tensors), read(make(STATIC, tensors), tensors)
    assert ours.scheme == theirs.scheme
    assert torch.equal(dequantize(ours), dequantize(theirs))
    assert torch.equal(ours.input_scale, theirs.input_scale)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            BLOCKS | {"activation_scheme": "static"},
            UnsupportedCheckpoint,
            r"'static' together with weight_block_size \[128",
        ),
        (TENSOR | {"activation_scheme": "per_head"}, UnsupportedCheckpoint, "activation_scheme 'per_head'"),
        (TENSOR | {"fmt": "e5m2"}, UnsupportedCheckpoint, r"'e5m2' .*fmt.*only 'e4m3'"),
        (TENSOR | {"weight_block_size": [128]}, BadCheckpoint, r"weight_block_size must be two positive integers"),
    ],
)
def test_configurations_that_cannot_be_read(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FP8.from_checkpoint(config, {})
    assert FP8.from_checkpoint({"quant_method": "awq"}, {}) is None


def test_contradictions_name_module_and_entry() -> None:
    one = torch.tensor(1.0)
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        (TENSOR, layer(), r"a: an FP8 weight is stored with no scale"),
        (TENSOR, layer(weight_scale=one, weight_scale_inv=one), r"several scales \(weight_scale_inv, weight_scale\)"),
        (BLOCKS, layer(weight_scale_inv=one), r"a\.weight_scale_inv is float32 \[\].*weight_block_size\) has \[1, 2\]"),
        (TENSOR, layer(weight_scale=torch.ones(1, 2)), r"neither one scale nor one for each of 72 rows"),
        (TENSOR, layer(weight_scale=one, input_scale=one), r"input_scale is stored.*activation_scheme: dynamic"),
        (STATIC, layer(weight_scale=one), r"activation_scheme: static, which needs one scale.*stored is none"),
        (TENSOR | {"ignored_layers": ["a"]}, layer(weight_scale=one), r"ignored_layers lists 'a'"),
        (TENSOR, layer(weight_scale=one) | {"a.weight": torch.zeros(72, 200)}, "not FP8"),
    ]
    for config, tensors, message in cases:
        with pytest.raises(BadCheckpoint, match=message):
            make(config, tensors).scheme_for("a", SHAPE)


def test_modelopt_layouts_and_its_side_file() -> None:
    one = torch.tensor(1.0)
    blocks = layer(weight_scale=torch.rand(1, 1, 2, 1))
    rows = layer(weight_scale=torch.rand(72))

    def scheme(algorithm: str, tensors: dict[str, Tensor], **more: Any) -> str:
        side_file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm} | more}
        method = ModelOpt.from_checkpoint(side_file, headers_of(tensors))
        assert method is not None
        return str(read(method, tensors, "a", SHAPE).scheme)

    assert scheme("FP8", layer(weight_scale=one, input_scale=one)) == "fp8 block 72x200, inputs fp8 static"
    assert scheme("fp8_pb_wo", blocks) == "fp8 block 128x128"
    assert scheme("FP8_PER_CHANNEL_PER_TOKEN", rows) == "fp8 g200, inputs fp8 per token"
    mixed = {"a": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}
    assert scheme("MIXED_PRECISION", rows, quantized_layers=mixed) == "fp8 g200, inputs fp8 per token"
    with pytest.raises(BadCheckpoint, match=r"a is stored as FP8_PER_CHANNEL_PER_TOKEN, but .* quant_algo: FP8\."):
        scheme("FP8", rows)
    with pytest.raises(BadCheckpoint, match=r"exclude_modules lists '\*'"):
        scheme("FP8_PER_CHANNEL_PER_TOKEN", rows, exclude_modules=["*"])


@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "W4A16_AWQ", "W4A8_AWQ", "W4A8_NVFP4_FP8", "INT8_SQ", "MXFP8"])
def test_modelopt_algorithms_that_are_not_read_are_refused_by_name(algorithm: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=rf"modelopt algorithm '{algorithm}'.*known: FP8"):
        ModelOpt.from_checkpoint({"quant_method": "modelopt", "quant_algo": algorithm}, {})
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"b": {"quant_algo": algorithm}}}
    with pytest.raises(UnsupportedCheckpoint, match=rf"'{algorithm}' .*quantized_layers: b"):
        ModelOpt.from_checkpoint({"quant_method": "modelopt"} | mixed, {})


def test_a_modelopt_layer_without_the_scale_that_the_others_have() -> None:
    scales = {"weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(0.25)}
    other = {name.replace("a.", "b."): tensor for name, tensor in layer(**scales).items()}
    alone = layer(weight_scale=torch.tensor(0.5))
    for tensors, complete in ((alone | other, False), (alone, True), (layer(**scales) | other, True)):
        method = ModelOpt.from_checkpoint({"quant_method": "modelopt", "quant_algo": "FP8"}, headers_of(tensors))
        assert method is not None
        if complete:
            assert method.scheme_for("a", SHAPE) is not None
            continue
        with pytest.raises(BadCheckpoint, match="a: input_scale is missing, and other layers have one"):
            method.scheme_for("a", SHAPE)


def test_modelopt_4_bit_tensors_under_an_fp8_configuration_are_refused() -> None:
    tensors = {"a.weight": torch.zeros(36, 200, dtype=torch.uint8), "a.pre_quant_scale": torch.ones(200)}
    method = ModelOpt.from_checkpoint({"quant_method": "modelopt", "quant_algo": "FP8"}, headers_of(tensors))
    assert method is not None
    with pytest.raises(UnsupportedCheckpoint, match=r"a\.weight is uint8 \[36, 200\], modelopt's AWQ"):
        method.scheme_for("a", SHAPE)


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_nvfp4_of_modelopt_is_that_of_compressed_tensors_under_reciprocal_scales(algorithm: str) -> None:
    config, tensors = stored("compressed-tensors--nvfp4a16")
    library = CompressedTensors.from_checkpoint(config, headers_of(tensors))
    assert library is not None
    exported = {
        f"{LAYER}.weight": tensors[f"{LAYER}.weight_packed"],
        f"{LAYER}.weight_scale": tensors[f"{LAYER}.weight_scale"],
        f"{LAYER}.weight_scale_2": 1 / tensors[f"{LAYER}.weight_global_scale"].reshape(()),
    }
    if algorithm == "NVFP4":
        exported[f"{LAYER}.input_scale"] = torch.tensor(0.125)
    settings = {"quant_method": "modelopt", "quant_algo": algorithm}
    method = ModelOpt.from_checkpoint(settings, headers_of(exported))
    assert method is not None
    weight = read(method, exported)
    assert torch.equal(dequantize(weight), dequantize(read(library, tensors)))
    assert (weight.input_scale is not None) == (algorithm == "NVFP4")
    assert weight.input_scale is None or weight.input_scale.tolist() == [8.0]
    short = exported | {f"{LAYER}.weight_scale": exported[f"{LAYER}.weight_scale"][:, :-1]}
    damaged = ModelOpt.from_checkpoint(settings, headers_of(short))
    assert damaged is not None
    assert damaged.tensors(LAYER, SHAPE_OF_LAYER)["weight_scale"].shape == (128, 16)


def test_dense_layers_say_why() -> None:
    method = make(TENSOR | {"modules_to_not_convert": ["lm_head"]}, {"b.weight": torch.zeros(72, 200)})
    assert method.scheme_for("b", SHAPE) is None
    assert "not FP8" in method.dense_reason("b")
    assert "'lm_head'" in method.dense_reason("lm_head")
