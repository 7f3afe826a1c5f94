"""auto-round: which tensors its packing formats mean, settings of single modules, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant.base import BadCheckpoint, LinearShape, TensorSpec, UnsupportedCheckpoint
from quant.methods.auto_round import AutoRound
from quant.methods.awq import AWQ
from quant.methods.compressed import CompressedTensors
from quant.methods.gptq import GPTQ
from quant.reference import dequantize
from tests.quant.checkpoints import LAYER, headers_of, read, stored
from tests.quant.test_gptq import Layer

CONFIG = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}


def make(headers: dict[str, TensorSpec] | None = None, **config: Any) -> AutoRound:
    found = AutoRound.from_checkpoint(CONFIG | config, headers or {})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("config", "reader", "version"),
    [
        ({}, GPTQ, "gptq"),
        ({"packing_format": "auto"}, GPTQ, "gptq"),
        ({"packing_format": "auto_round:auto_gptq"}, GPTQ, "gptq"),
        ({"packing_format": "auto_round:gptq"}, GPTQ, "gptq"),
        ({"packing_format": "auto_round:gptqmodel"}, GPTQ, "gptq_v2"),
        ({"packing_format": "auto_round"}, GPTQ, "gptq_v2"),
        ({"backend": "auto_round:exllamav2"}, GPTQ, "gptq_v2"),
        ({"backend": "autoround:gptq:exllamav2"}, GPTQ, "gptq"),
        ({"packing_format": "auto_round:auto_awq"}, AWQ, "gemm"),
        ({"packing_format": "auto_round:awq", "backend": "auto"}, AWQ, "gemm"),
        ({"quant_method": "intel/auto-round"}, GPTQ, "gptq"),
        ({"quant_method": "auto_round"}, GPTQ, "gptq"),
    ],
)
def test_packing_formats(config: dict[str, Any], reader: type, version: str) -> None:
    inner = make(**config).inner
    assert type(inner) is reader
    assert isinstance(inner, AWQ | GPTQ)
    assert (inner.version if isinstance(inner, AWQ) else inner.format) == version


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel", "auto_round:auto_gptq"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_tensors_without_group_indices(bits: int, packing: str) -> None:
    layer = Layer(64, 64, bits, 32)
    first = packing == "auto_round:auto_gptq"
    if first:
        layer.zeros = layer.zeros.clip(1)
    tensors = layer.tensors(zeros=layer.zeros - first)
    del tensors["g_idx"]
    headers = {f"a.{name}": TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    method = make(headers, bits=bits, packing_format=packing)
    scheme = method.scheme_for("a", layer.shape)
    assert scheme is not None
    assert method.tensors("a", layer.shape) == {name[2:]: spec for name, spec in headers.items()}
    assert torch.equal(dequantize(method.repack(tensors, scheme, layer.shape)), layer.weight)


def test_the_other_version_is_named_in_its_own_words() -> None:
    layer = Layer(64, 64, 4, 32)
    layer.zeros[:] = 8
    tensors = {name: tensor for name, tensor in layer.tensors(zeros=layer.zeros - 1).items() if name != "g_idx"}
    headers = {f"a.{name}": TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    method = make(headers, packing_format="auto_round:gptqmodel", sym=None)
    scheme = method.scheme_for("a", layer.shape)
    assert scheme is not None
    with pytest.raises(BadCheckpoint, match="Set packing_format: auto_round:auto_gptq in quantization_config"):
        method.repack(tensors, scheme, layer.shape)


def test_settings_of_single_modules() -> None:
    extra = {"lm_head": {"bits": 16, "data_type": "float"}, r".*\.down": {"bits": 8, "group_size": 16}}
    headers = {
        "l.0.down.qweight": TensorSpec((16, 64), torch.int32),
        "l.0.down.qzeros": TensorSpec((4, 16), torch.int32),
    }
    method = make(headers, extra_config=extra)
    scheme = method.scheme_for("l.0.down", LinearShape(64, 64))
    assert scheme is not None
    assert (scheme.kind.bits, scheme.group) == (8, 16)
    assert method.dense_reason("lm_head") == "left dense by extra_config ('lm_head')"
    assert method.unmatched(["lm_head"]) == [r"extra_config: .*\.down"]


@pytest.mark.parametrize(
    ("checkpoint", "data_type", "group"),
    [
        ("llmcompressor--gptq-w4a16", "int", 128),
        ("compressed-tensors--mxfp4a16", "mx_fp", 32),
        ("compressed-tensors--nvfp4a16", "nv_fp4_with_static_gs", 16),
    ],
)
def test_the_tensors_of_compressed_tensors(checkpoint: str, data_type: str, group: int) -> None:
    """The same file under both configurations is the same weight."""
    config, tensors = stored(checkpoint)
    theirs = CompressedTensors.from_checkpoint(config, headers_of(tensors))
    extra = {r"\.down_proj$": {"bits": 16}, LAYER: {"bits": 4}, "lm_head": {"bits": 16}}
    ours = make(
        headers_of(tensors), packing_format="auto_round:llm_compressor", data_type=data_type, group_size=group, sym=True,
        act_bits=16, extra_config=extra,
    )  # fmt: skip
    assert theirs is not None
    assert torch.equal(dequantize(read(ours, tensors)), dequantize(read(theirs, tensors)))
    with pytest.raises(BadCheckpoint, match=r"down_proj: .* but ignore lists"):
        ours.scheme_for("model.layers.0.mlp.down_proj", LinearShape(512, 256))
    assert ours.dense_reason("lm_head") == "named in ignore ('lm_head')"


def test_a_setting_of_a_layer_outranks_the_general_one_in_compressed_tensors() -> None:
    method = make(
        packing_format="auto_round:llm_compressor",
        sym=True,
        extra_config={"l.0.x": {"bits": 8}, "y$": {"group_size": -1}},
    )
    assert isinstance(method.inner, CompressedTensors)
    groups = {name: method.inner.config.group_of(name) for name in ("l.0.x", "l.0.y", "l.0.z")}
    found = {name: (group.weights.kind.bits, group.weights.block) for name, group in groups.items() if group}
    assert found == {"l.0.x": (8, (1, 32)), "l.0.y": (4, (1, -1)), "l.0.z": (4, (1, 32))}


def test_the_name_confirms() -> None:
    assert make().name == "auto-round"
    assert AutoRound.from_checkpoint({"quant_method": "gptq"}, {}) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data_type": "mx_fp4"}, "data_type 'mx_fp4'.*only int"),
        ({"data_type": "nv_fp4_with_static_gs"}, "data_type 'nv_fp4_with_static_gs'"),
        ({"extra_config": {"x": {"data_type": "mx_fp", "bits": 4}}}, "extra_config 'x': data_type 'mx_fp'"),
        ({"rotation_config": {"type": "hadamard"}}, "rotation_config .*at run time"),
        ({"packing_format": "auto_round:llm_compressor", "act_bits": 4, "data_type": "mx_fp"}, "act_bits 4"),
        ({"packing_format": "auto_round:llm_compressor", "data_type": "fp8"}, "only int and mx_fp and nv_fp"),
        ({"packing_format": "auto_round:fp8_static"}, "its weights are FP8"),
        ({"packing_format": "auto_round:fake"}, "only rounded"),
        ({"packing_format": "auto_round:mx_fp"}, "'auto_round:mx_fp'.*not known; known: auto_round:auto_gptq"),
        ({"packing_format": "mlx"}, "Apple"),
        ({"packing_format": "gguf:q4_k_m"}, "GGUF is not supported, by design"),
    ],
)
def test_what_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        make(**config)
