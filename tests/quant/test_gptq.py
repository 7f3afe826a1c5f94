"""The GPTQ format against packers of our own, over widths, words, groups, orders and odd shapes; and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.base import BadCheckpoint, LinearShape, QuantWeight, TensorSpec, UnsupportedCheckpoint
from quant.methods.gptq import GPTQ
from quant.methods.gptq_config import producer_of
from quant.reference import dequantize
from tests.packers import less_one_with_borrow, pack_marlin, pack_rows

GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
CONFIG: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


class Layer:
    """Random codes, scales and zero points of a layer ``a``, and the weight that they stand for."""

    def __init__(self, inputs: int, outputs: int, bits: int, group: int, act_order: bool = False) -> None:
        draw = np.random.default_rng(bits * inputs + outputs)
        self.shape, self.bits, self.groups = LinearShape(inputs, outputs), bits, -(-inputs // group)
        self.codes = draw.integers(0, 2**bits, (inputs, outputs))
        self.zeros = draw.integers(0, 2**bits, (self.groups, outputs))
        self.scales = draw.random((self.groups, outputs)).astype(np.float16)
        self.g_idx = np.arange(inputs) // group
        if act_order:
            self.g_idx = draw.permutation(self.g_idx)

    @property
    def weight(self) -> Tensor:
        values = (self.codes - self.zeros[self.g_idx]) * self.scales[self.g_idx].astype(np.float64)
        return torch.from_numpy(values.T.astype(np.float32))

    def tensors(self, width: int = 32, planes: bool = False, zeros: np.ndarray | None = None) -> dict[str, Tensor]:
        stored = self.zeros if zeros is None else zeros
        arrays = {
            "qweight": pack_rows(self.codes.T, self.bits, width, planes).T,
            "qzeros": pack_rows(stored, self.bits, width, planes),
            "scales": self.scales,
            "g_idx": self.g_idx.astype(np.int32),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def method(tensors: dict[str, Tensor], **config: Any) -> GPTQ:
    headers = {f"a.{name}": TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    found = GPTQ.from_checkpoint(CONFIG | config, headers)
    assert found is not None
    return found


def load(tensors: dict[str, Tensor], shape: LinearShape, **config: Any) -> QuantWeight:
    """As the runtime does it: what is stored is what the plan expects, then the repack; the input stays as it is."""
    reader = method(tensors, **config)
    scheme = reader.scheme_for("a", shape)
    assert scheme is not None
    specs = reader.tensors("a", shape)
    assert specs == {name: reader.headers[f"a.{name}"] for name in tensors}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    weight = reader.repack(tensors, scheme, shape)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    return weight


SHAPES = [(96, 64, 32), (64, 32, 64), (128, 96, 128)]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 24, 8), (100, 20, 32), (36, 7, 12), (33, 5, 16)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_second_version(bits: int, shape: tuple[int, int, int], act_order: bool) -> None:
    layer = Layer(shape[0], shape[1], bits, shape[2], act_order)
    weight = load(
        layer.tensors(), layer.shape, bits=bits, group_size=shape[2], desc_act=act_order, checkpoint_format="gptq_v2"
    )
    assert torch.equal(dequantize(weight), layer.weight)
    assert weight.scheme.act_order == (act_order and layer.groups > 1)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_of_every_size(bits: int, width: int) -> None:
    layer = Layer(96, 64, bits, 32)
    given = {"bits": bits, "checkpoint_format": "gptq_v2"}
    for config in (given, given | {"pack_dtype": f"int{width}"}):
        assert torch.equal(dequantize(load(layer.tensors(width), layer.shape, **config)), layer.weight)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_planar(bits: int, act_order: bool) -> None:
    layer = Layer(96, 64, bits, 32, act_order)
    weight = load(layer.tensors(planes=True), layer.shape, bits=bits, format="gptq_p", desc_act=act_order)
    assert torch.equal(dequantize(weight), layer.weight)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_odd_widths_are_planar_by_gptqmodel_and_a_stream_by_auto_round(bits: int) -> None:
    layer = Layer(64, 32, bits, 32)
    for planes, config in ((True, GPTQMODEL), (False, {"provider": "auto-round"})):
        weight = load(layer.tensors(planes=planes), layer.shape, bits=bits, format="gptq_v2", **config)
        assert torch.equal(dequantize(weight), layer.weight)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_first_version_by_gptqmodel_borrows(bits: int, width: int) -> None:
    layer = Layer(64, 48, bits, 16)
    assert (layer.zeros == 0).any()
    tensors = layer.tensors(width)
    tensors["qzeros"] = torch.from_numpy(less_one_with_borrow(tensors["qzeros"].numpy(), bits))
    weight = load(tensors, layer.shape, bits=bits, group_size=16, **GPTQMODEL)
    assert torch.equal(dequantize(weight), layer.weight)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_first_version_by_gptqmodel_counts_modulo_in_odd_widths(bits: int) -> None:
    layer = Layer(64, 64, bits, 16)
    tensors = layer.tensors(planes=bits > 3, zeros=(layer.zeros - 1) % 2**bits)
    weight = load(tensors, layer.shape, bits=bits, group_size=16, **GPTQMODEL)
    assert torch.equal(dequantize(weight), layer.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_first_version_by_anybody(bits: int) -> None:
    layer = Layer(64, 64, bits, 16)
    layer.zeros = np.maximum(layer.zeros, 1)
    for config in ({}, {"provider": "auto-round"}):
        weight = load(layer.tensors(zeros=layer.zeros - 1), layer.shape, bits=bits, group_size=16, **config)
        assert torch.equal(dequantize(weight), layer.weight)


@pytest.mark.parametrize(("bits", "act_order", "read"), [(4, False, 0), (3, False, 8), (4, True, 16), (8, True, 0)])
def test_all_ones_of_auto_gptq_are_read_as_it_reads_them(bits: int, act_order: bool, read: int) -> None:
    layer = Layer(64, 64, bits, 16, act_order)
    tensors = layer.tensors(zeros=np.full_like(layer.zeros, 2**bits - 1))
    weight = load(tensors, layer.shape, bits=bits, group_size=16, desc_act=act_order)
    assert weight.zero is not None
    assert weight.zero.unique().tolist() == [read]


def test_symmetric_weights_need_no_zero_points() -> None:
    layer = Layer(64, 64, 4, 32)
    layer.zeros[:] = 8
    for config in ({"sym": True}, {"sym": None}, {"sym": False}, {"sym": True, "desc_act": None}):
        weight = load(layer.tensors(zeros=layer.zeros - 1), layer.shape, **config)
        assert not weight.scheme.zero_point
        assert not weight.scheme.act_order
        assert torch.equal(dequantize(weight), layer.weight)
    without = {name: tensor for name, tensor in layer.tensors().items() if name not in ("qzeros", "g_idx")}
    assert torch.equal(dequantize(load(without, layer.shape, sym=True)), layer.weight)


def test_one_group_a_row() -> None:
    layer = Layer(96, 64, 4, 96)
    for config in ({"group_size": -1, "desc_act": True}, {"group_size": 128}):
        weight = load(layer.tensors(), layer.shape, checkpoint_format="gptq_v2", **config)
        assert torch.equal(dequantize(weight), layer.weight)
        assert weight.scheme.block == (1, 96)


def test_a_group_size_that_is_not_given_is_that_of_the_scales() -> None:
    layer = Layer(96, 64, 4, 24)
    reader = method(layer.tensors(), checkpoint_format="gptq_v2")
    config = {name: value for name, value in CONFIG.items() if name != "group_size"}
    found = GPTQ.from_checkpoint(config, reader.headers)
    assert found is not None
    scheme = found.scheme_for("a", layer.shape)
    assert scheme is not None
    assert scheme.group == 24


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "config", [{"is_marlin_format": True}, {"quant_method": "marlin"}, {"format": "marlin"}], ids=str
)
def test_marlin(config: dict[str, Any], groups: int) -> None:
    layer = Layer(64, 128, 4, 64 // groups)
    layer.zeros[:] = 8
    packed, scales = pack_marlin(layer.codes, layer.scales)
    tensors = {"B": torch.from_numpy(packed), "s": torch.from_numpy(scales)}
    weight = load(tensors, layer.shape, **config, sym=True, group_size=64 // groups if groups > 1 else -1)
    assert torch.equal(dequantize(weight), layer.weight)


def test_dynamic_rules_hold_in_order_and_skips_first() -> None:
    rules = {r".*\.1\.": {"bits": 8}, r"+:.*\.[12]\.": {"group_size": 16}, r"-:.*\.3\.": {}, r".*\.3\.x": {"bits": 2}}
    selection = method(Layer(64, 64, 4, 32).tensors(), dynamic=rules).selection
    assert (selection.options_for("m.1.a").bits, selection.options_for("m.1.a").group_size) == (8, 32)
    assert (selection.options_for("m.2.a").bits, selection.options_for("m.2.a").group_size) == (4, 16)
    assert "dynamic" in selection.dense_reason("m.3.x")
    assert selection.unmatched(["m.1.a", "m.3.a"]) == [r"dynamic: .*\.3\.x"]


def test_modules_in_block_to_quantize_explain_what_is_dense() -> None:
    listed = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    selection = method(Layer(64, 64, 4, 32).tensors(), modules_in_block_to_quantize=listed).selection
    assert "modules_in_block_to_quantize" in selection.dense_reason("model.layers.0.mlp.up_proj")
    assert "no qweight" in selection.dense_reason("model.layers.0.mlp.down_proj")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert selection.unmatched(names) == ["modules_in_block_to_quantize: self_attn.k_proj"]


@pytest.mark.parametrize("value", [[1], [["a", {}]]])
def test_a_list_of_modules_that_is_none(value: object) -> None:
    with pytest.raises(BadCheckpoint, match="modules_in_block_to_quantize must be a list of module names"):
        method(Layer(64, 64, 4, 32).tensors(), modules_in_block_to_quantize=value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "gptq_v3"}, "format 'gptq_v3'.*known formats are gptq, gptq_v2, gptq_p, marlin"),
        ({"bits": 9}, "9 bits"),
        ({"bits": True}, "True bits"),
        ({"dynamic": {"x": {"bits": 1}}}, r"1 bits \(quantization_config: dynamic 'x': bits\)"),
        ({"pack_dtype": "int4"}, "pack_dtype 'int4'.*only int8, int16, int32, int64"),
        ({"format": "marlin", "bits": 8}, "format 'marlin' with 8 bits"),
        ({"format": "marlin", "sym": False}, "'marlin' with .*asymmetric"),
    ],
)
def test_what_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        method(Layer(64, 64, 4, 32).tensors(), **config)


@pytest.mark.parametrize(
    ("config", "producer"),
    [
        (GPTQMODEL, "gptqmodel"),
        ({"meta": {"quantizer": "GPTQModel:1.0"}, "provider": "x"}, "gptqmodel"),
        ({"meta": {"quantizer": ["optimum:1.2"]}}, "optimum"),
        ({"meta": {"quantizer": None}, "provider": "auto-round"}, "auto-round"),
        ({"autoround_version": "0.2"}, "auto-round"),
        ({"meta": ["odd"]}, ""),
        ({}, ""),
    ],
)
def test_who_wrote_a_file(config: dict[str, Any], producer: str) -> None:
    assert producer_of(config) == producer


def test_activation_quantization_is_told_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    method(Layer(64, 64, 4, 32).tensors(), activation={"bits": 8}, sym=True)
    assert "only the weights are quantized" in caplog.text


def test_contradictions_name_module_and_entry() -> None:
    layer = Layer(64, 64, 4, 32)
    tensors = layer.tensors()
    dense = {"weight": torch.zeros(64, 64)}
    for stored, config, message in (
        ({n: t for n, t in tensors.items() if n != "qweight"}, {}, "a: scales is there but qweight is missing"),
        (tensors | dense, {}, "a: both qweight and a dense weight"),
        ({n: t for n, t in tensors.items() if n != "qzeros"}, {}, "a: qzeros is missing.*sym: false"),
        ({n: t for n, t in tensors.items() if n != "g_idx"}, {"desc_act": True}, "a: g_idx is missing.*desc_act: true"),
        (tensors, {"bits": 8}, r"a\.qweight is int32 \[8, 64\]: 4 bits for 64 inputs, but quantization_config says 8"),
        (tensors, {"dynamic": {"-:a": {}}}, "a: qweight is stored, but dynamic leaves it dense by '-:a'"),
        (tensors, {"dynamic": {"(": {}}}, r"'\(' is not a valid regular expression"),
        (tensors, {"modules_to_not_convert": ["a"]}, "a: qweight is stored, but modules_to_not_convert lists 'a'"),
    ):
        with pytest.raises(BadCheckpoint, match=message):
            method(stored, **config).scheme_for("a", layer.shape)
    planar = Layer(40, 64, 5, 8)
    with pytest.raises(BadCheckpoint, match="planar 5-bit codes come in blocks of 32"):
        method(planar.tensors(), bits=5, format="gptq_p", group_size=8).scheme_for("a", planar.shape)


def test_values_that_contradict_the_configuration() -> None:
    layer = Layer(64, 64, 4, 32)
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"sym": True}, r"zero points are not 8.*sym: true.*set sym: false"),
        ({"g_idx": [1] * 32 + [0] * 32}, {}, "g_idx is a permutation.*desc_act: false.*set desc_act: true"),
        ({"g_idx": [2] * 64}, {"desc_act": True}, "64 of 64 groups are outside 0 to 1"),
        ({"g_idx": [0] * 40 + [1] * 24}, {"desc_act": True}, "different sizes, up to 40 inputs where group_size is 32"),
    ]
    for changes, config, message in cases:
        tensors = layer.tensors() | {name: torch.tensor(v, dtype=torch.int32) for name, v in changes.items()}
        with pytest.raises(BadCheckpoint, match=message):
            load(tensors, layer.shape, **config)
