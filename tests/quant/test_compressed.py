"""compressed-tensors: what targets mean, old packings, sparsity, contradictions and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quant.base import Activation, BadCheckpoint, LinearShape, TensorSpec, UnsupportedCheckpoint, WeightKind
from quant.compressed_config import CompressedConfig
from quant.matching import compressed_rank
from quant.methods.compressed import CompressedTensors
from quant.packing import unpack_bitmask, unpack_stream
from quant.reference import dequantize
from tests.quant.checkpoints import LAYER, headers_of, read, stored

SHAPE = LinearShape(64, 24)
INT4 = {"num_bits": 4, "group_size": 32}


def config(weights: dict[str, Any] | None = None, **entries: Any) -> dict[str, Any]:
    group = {"targets": entries.pop("targets", ["Linear"]), "weights": weights or INT4}
    group["input_activations"] = entries.pop("inputs", None)
    fixed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.20.0"}
    return fixed | {"config_groups": {"group_0": group}} | entries


def make(settings: dict[str, Any], tensors: dict[str, Tensor]) -> CompressedTensors:
    method = CompressedTensors.from_checkpoint(settings, headers_of(tensors))
    assert method is not None
    return method


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes in int32 words, none across the end of a word: compressed-tensors before 0.18."""
    each = 32 // bits
    grouped = F.pad(codes.long(), (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    packed = (grouped << torch.arange(each) * bits).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def packed(bits: int = 4, zeros: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """A layer ``a`` in groups of 32, packed the old way, and its codes."""
    codes = torch.randint(0, 2**bits, (24, 64))
    tensors = {
        "a.weight_packed": words(codes, bits),
        "a.weight_scale": torch.rand(24, 2).to(torch.bfloat16),
        "a.weight_shape": torch.tensor([24, 64]),
    }
    return tensors | ({"a.weight_zero_point": zeros} if zeros is not None else {}), codes


def spread(blocks: Tensor) -> Tensor:
    return blocks.float().repeat_interleave(32, 1)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("how", ["none", "plain", "packed"])
def test_words_and_zero_points_as_old_versions_write_them(bits: int, how: str) -> None:
    zeros = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 2))
    shifted = zeros + 2 ** (bits - 1)
    written = {"none": None, "plain": zeros.to(torch.int8), "packed": words(shifted.t(), bits).t().contiguous()}[how]
    tensors, codes = packed(bits, written)
    settings = config(INT4 | {"num_bits": bits, "symmetric": how == "none"}, version="0.12.2")
    zero = 2 ** (bits - 1) if written is None else spread(shifted)
    found = dequantize(read(make(settings, tensors), tensors, "a", SHAPE))
    assert torch.equal(found, (codes - zero) * spread(tensors["a.weight_scale"]))


def test_the_version_decides_where_the_number_of_words_does_not() -> None:
    shape = LinearShape(20, 24)  # 20 codes of 3 bits take two words either way
    codes = torch.randint(0, 8, (24, 20))
    tensors = {"a.weight_packed": words(codes, 3), "a.weight_scale": torch.ones(24, 1)}
    weights = {"num_bits": 3, "strategy": "channel"}
    old = read(make(config(weights, version="0.12.2"), tensors), tensors, "a", shape)
    new = read(make(config(weights, version="0.20.0"), tensors), tensors, "a", shape)
    assert torch.equal(dequantize(old), codes.float() - 4)
    assert not torch.equal(dequantize(new), codes.float() - 4)


def test_act_order_follows_g_idx_and_minus_one_means_unset() -> None:
    tensors, codes = packed()
    g_idx = torch.randperm(64) // 32
    values = (codes - 8) * tensors["a.weight_scale"].float()[:, g_idx]
    tensors["a.weight_g_idx"] = g_idx.to(torch.int32)
    assert torch.equal(dequantize(read(make(config(), tensors), tensors, "a", SHAPE)), values)
    tensors["a.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    natural = (codes - 8) * spread(tensors["a.weight_scale"])
    assert torch.equal(dequantize(read(make(config(), tensors), tensors, "a", SHAPE)), natural)
    tensors["a.weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(BadCheckpoint, match="weight_g_idx does not give each of 2 groups 32 of 64 inputs"):
        read(make(config(), tensors), tensors, "a", SHAPE)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_2_of_4_sparse_weights(dtype: torch.dtype) -> None:
    places = torch.zeros(24, 16, 4, dtype=torch.bool).index_fill(2, torch.tensor([1, 3]), True).flatten(1)
    numbers = torch.randint(1, 100, (24, 32)).to(dtype)
    bits = (places.view(24, 8, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    dense = torch.zeros(24, 64).masked_scatter(places, numbers.float())
    assert torch.equal(unpack_bitmask(numbers, bits, (24, 64)).float(), dense)
    tensors = {
        "a.compressed": numbers,
        "a.bitmask": bits,
        "a.shape": torch.tensor([[24], [64]]),
        "a.weight_scale": torch.rand(24, 1),
    }
    number = "float" if dtype.is_floating_point else "int"
    weights = {"num_bits": 8, "type": number, "strategy": "channel"}
    sparse = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    settings = config(weights, format=f"{number}-quantized", sparsity_config=sparse)
    assert torch.equal(
        dequantize(read(make(settings, tensors), tensors, "a", SHAPE)), dense * tensors["a.weight_scale"]
    )
    tensors["a.compressed"] = numbers.to(torch.bfloat16)
    unquantized = make(settings, tensors)
    assert unquantized.scheme_for("a", SHAPE) is None
    assert unquantized.sparse("a", SHAPE)["compressed"] == TensorSpec((24, 32), torch.bfloat16)
    assert "sizes of a 2:4 sparse" in (unquantized.ignored("a.shape") or "")


def test_targets_match_by_name_expression_and_class_the_closest_first() -> None:
    layer = "model.layers.1.mlp.down_proj"
    assert compressed_rank(layer, layer) == 0
    assert compressed_rank(r"re:.*down_proj", layer) == 1
    assert compressed_rank(r"re:model\.layers\.1", layer) == 1, "matched from the start, not to the end"
    assert compressed_rank(r"re:layers\.1", layer) is None
    assert compressed_rank("Linear", layer) == 2
    assert compressed_rank(f"language_model.{layer}", layer) == 3
    assert compressed_rank("down_proj", layer) is None
    groups = {
        "by_class": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}},
        "by_expression": {"targets": ["re:.*mlp.*"], "weights": INT4},
        "by_name": {"targets": [layer], "weights": INT4 | {"num_bits": 3}},
        "of_keys": {"targets": ["LlamaAttention"], "input_activations": {"num_bits": 8, "type": "float"}},
    }
    read_config = CompressedConfig.read(
        {"format": "pack-quantized", "config_groups": groups, "ignore": ["re:.*q_proj"]}
    )
    names = [
        group.name if (group := read_config.group_of(name)) else None for name in (layer, f"{layer}x.mlp", "lm_head")
    ]
    assert names == ["by_name", "by_expression", "by_class"]
    assert read_config.ignored("model.layers.0.self_attn.q_proj") == "re:.*q_proj"
    with pytest.raises(BadCheckpoint, match="'\\*' is not a valid regular expression"):
        compressed_rank("re:*", layer)


def test_schemes_by_name() -> None:
    """Which ones there are is compared with the library."""
    groups = CompressedConfig.read({"config_groups": {"FP8_DYNAMIC": ["re:.*mlp"], "w4afp8": ["Linear"]}}).groups
    assert [group.weights.kind for group in groups] == [WeightKind.FP8, WeightKind.INT4]
    assert [group.inputs for group in groups] == [Activation(WeightKind.FP8)] * 2
    assert groups[0].targets == ("re:.*mlp",)


def test_a_group_of_nothing_leaves_its_layers_dense() -> None:
    settings = {"quant_method": "compressed-tensors", "config_groups": {"UNQUANTIZED": ["Linear"]}}
    assert make(settings, {}).scheme_for("a", SHAPE) is None
    assert not make(settings, {}).quantizes_layers


def test_old_files_keep_their_configuration_elsewhere() -> None:
    settings, tensors = stored("llmcompressor--gptq-w4a16")
    nested = {"quant_method": "compressed-tensors", "quantization_config": settings}
    without_method = {name: value for name, value in settings.items() if name != "quant_method"}
    for variant in (nested, without_method):
        assert torch.equal(read(make(variant, tensors), tensors).q, read(make(settings, tensors), tensors).q)
    assert CompressedTensors.from_checkpoint({"quant_method": "gptq"}, {}) is None


def test_what_llmcompressor_exports_is_read_as_its_codes_say() -> None:
    settings, tensors = stored("llmcompressor--gptq-w4a16")
    weight = read(make(settings, tensors), tensors)
    codes = unpack_stream(tensors[f"{LAYER}.weight_packed"].view(torch.uint8), 4, 256).float()
    expected = (codes - 8) * tensors[f"{LAYER}.weight_scale"].float().repeat_interleave(128, 1)
    assert torch.equal(dequantize(weight), expected)


LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}


def refusal(**entries: Any) -> tuple[dict[str, Any], str]:
    message = entries.pop("message")
    return config(**entries), message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        refusal(weights={"num_bits": 6, "type": "float"}, message=r"type 'float' with 6 bits"),
        refusal(weights={"num_bits": 4, "strategy": "attn_head"}, message="strategy 'attn_head'"),
        refusal(config_groups={"W4A4_SECRET": ["Linear"]}, message="'W4A4_SECRET' is no preset"),
        refusal(
            inputs={"num_bits": 8, "strategy": "channel"}, message="input_activations of int8 with strategy 'channel'"
        ),
        refusal(inputs=LOCAL | {"dynamic": "nearby"}, message="input_activations of e2m1 .* dynamic 'nearby'"),
        refusal(inputs=LOCAL | {"type": "int"}, message="input_activations of int4 .* dynamic 'local'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_is_not_read_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        CompressedTensors.from_checkpoint(settings, {})


def test_transforms_that_are_folded_into_weights_are_nothing_to_do() -> None:
    offline = {"type": "hadamard", "apply": [{"location": "weight_input"}, {"location": "weight_output"}]}
    assert CompressedTensors.from_checkpoint(config(transform_config={"config_groups": {"R1": offline}}), {})


def test_contradictions_name_module_and_entry() -> None:
    tensors, _ = packed()
    static = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    without_scale = {name: tensor for name, tensor in tensors.items() if name != "a.weight_scale"}
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        (config(ignore=["a"]), tensors, "a: weight_packed is stored quantized, but ignore lists 'a'"),
        (config(targets=["b"]), tensors, "a: weight_packed is stored quantized, but no target"),
        (config({"num_bits": 8, "type": "float"}), tensors, "a.weight_packed is int32 .* cannot hold fp8 weights"),
        (config(), without_scale, "a: weight_packed is stored but weight_scale is missing"),
        (config(INT4 | {"symmetric": False}), tensors, "weight_zero_point is missing"),
        (config(inputs=static), tensors, "input_scale is missing"),
        (config(INT4 | {"actorder": "group"}), tensors, "weight_g_idx is missing"),
    ]
    for settings, changed, message in cases:
        with pytest.raises(BadCheckpoint, match=message):
            make(settings, changed).scheme_for("a", SHAPE)
    for order in ("static", "weight", None):
        assert make(config(INT4 | {"actorder": order}), tensors).scheme_for("a", SHAPE) is not None
    changed = tensors | {"a.weight_shape": torch.tensor([64, 24])}
    with pytest.raises(BadCheckpoint, match=r"weight_shape is \[64, 24\]"):
        read(make(config(), changed), changed, "a", SHAPE)
    frozen = {"a.weight": torch.zeros(24, 64), "a.weight_scale": torch.ones(24, 2)}
    with pytest.raises(UnsupportedCheckpoint, match="quantization_status: frozen"):
        make(config(), frozen).scheme_for("a", SHAPE)


def test_dense_layers_say_why() -> None:
    method = make(config(targets=["re:.*proj"], ignore=["lm_head"]), {"a.weight": torch.zeros(24, 64)})
    assert method.scheme_for("a", SHAPE) is None
    assert "'lm_head'" in method.dense_reason("lm_head")
    assert "no group" in method.dense_reason("gate")
    assert "no codes" in method.dense_reason("q_proj")
