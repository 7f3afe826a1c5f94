"""Every arrangement of AWQ against packers of our own, over groups and odd shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.base import BadCheckpoint, LinearShape, QuantWeight, TensorSpec
from quant.methods.awq import AWQ
from quant.reference import dequantize
from tests.packers import pack_awq_fast, pack_awq_gemm, pack_marlin, pack_rows


class Layer:
    """Random codes ``[in, out]``, scales and zero points ``[groups, out]``, and the weight that they stand for."""

    def __init__(self, inputs: int, outputs: int, group: int, bits: int = 4) -> None:
        draw = np.random.default_rng(inputs + outputs + bits)
        self.shape, self.bits, self.group, groups = LinearShape(inputs, outputs), bits, group, inputs // group
        self.codes = draw.integers(0, 2**bits, (inputs, outputs))
        self.zeros = draw.integers(0, 2**bits, (groups, outputs))
        self.scales = (draw.random((groups, outputs)) + 0.01).astype(np.float16)

    @property
    def weight(self) -> Tensor:
        spread = np.arange(self.shape.in_features) // self.group
        values = (self.codes - self.zeros[spread]) * self.scales[spread].astype(np.float64)
        return torch.from_numpy(values.T.astype(np.float32))

    def padded(self, values: np.ndarray) -> np.ndarray:
        """Groups filled up with zeros as AutoAWQ's ``calculate_zeros_width`` says."""
        multiple = {32: 4, 64: 2}.get(self.group, 1)
        words = -(-len(values) // 8)
        words = -(-words // multiple) * multiple
        return np.pad(values, ((0, 8 * words - len(values)), (0, 0)))

    def gemm(self) -> dict[str, np.ndarray]:
        pack = pack_awq_gemm if self.bits == 4 else lambda codes: pack_rows(codes, self.bits)
        return {"qweight": pack(self.codes), "qzeros": pack(self.zeros), "scales": self.scales}

    def gemv(self) -> dict[str, np.ndarray]:
        zeros, scales = self.padded(self.zeros).T, self.padded(self.scales).T
        return {"qweight": pack_rows(self.codes.T, 4), "qzeros": pack_rows(zeros, 4), "scales": scales}

    def gemv_fast(self, zeros: str = "qzeros") -> dict[str, np.ndarray]:
        scaled = -(self.scales.astype(np.float32) * self.zeros).astype(np.float16)
        scales = self.padded(self.scales)
        return {"qweight": pack_awq_fast(self.codes.T), zeros: self.padded(scaled), "scales": scales}

    def marlin(self) -> dict[str, np.ndarray]:
        packed, scales = pack_marlin(self.codes, self.scales)
        return {"qweight": packed, "scales": scales}


def load(arrays: dict[str, np.ndarray], layer: Layer, version: str, **config: Any) -> QuantWeight:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    headers = {f"a.{name}": TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    general = {"quant_method": "awq", "version": version, "bits": layer.bits, "group_size": layer.group}
    reader = AWQ.from_checkpoint(general | config, headers)
    assert reader is not None
    scheme = reader.scheme_for("a", layer.shape)
    assert scheme is not None
    assert reader.tensors("a", layer.shape) == {name: headers[f"a.{name}"] for name in tensors}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    weight = reader.repack(tensors, scheme, layer.shape)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    return weight


@pytest.mark.parametrize("shape", [(96, 64, 32), (40, 24, 8), (35, 8, 5), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_gemm(bits: int, shape: tuple[int, int, int]) -> None:
    layer = Layer(*shape, bits=bits)
    assert torch.equal(dequantize(load(layer.gemm(), layer, "GEMM")), layer.weight)


@pytest.mark.parametrize("outputs", [1, 7, 33])
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_a_stream_needs_no_multiple_of_eight(bits: int, outputs: int) -> None:
    layer = Layer(32, outputs, 16, bits)
    assert torch.equal(dequantize(load(layer.gemm(), layer, "gemm")), layer.weight)


SHAPES = [(128, 24, 32), (128, 20, 64), (256, 12, 128), (1152, 4, 128), (320, 8, 32), (640, 4, 640)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemv(shape: tuple[int, int, int]) -> None:
    layer = Layer(*shape)
    assert torch.equal(dequantize(load(layer.gemv(), layer, "gemv")), layer.weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemv_fast(shape: tuple[int, int, int]) -> None:
    layer = Layer(*shape)
    for version, zeros in (("gemv_fast", "qzeros"), ("llm-awq", "scaled_zeros")):
        assert torch.equal(dequantize(load(layer.gemv_fast(zeros), layer, version)), layer.weight)
    named_by_backend = load(layer.gemv_fast("scaled_zeros"), layer, "gemm", backend="llm-awq")
    assert torch.equal(dequantize(named_by_backend), layer.weight)


def test_scales_too_small_for_a_division_and_scales_of_zero() -> None:
    layer = Layer(128, 8, 32)
    layer.scales[:] = np.array([0, 6e-8, 1.2e-7, 6e-5, 1e-4, 1, 6e4 / 16, 2], np.float16)
    weight = load(layer.gemv_fast(), layer, "gemv_fast")
    assert torch.equal(dequantize(weight), layer.weight)


@pytest.mark.parametrize("shape", [(64, 64, 32), (128, 192, 64), (48, 128, 48)], ids=str)
def test_marlin(shape: tuple[int, int, int]) -> None:
    layer = Layer(*shape)
    layer.zeros[:] = 8
    weight = load(layer.marlin(), layer, "marlin", zero_point=False)
    assert not weight.scheme.zero_point
    assert torch.equal(dequantize(weight), layer.weight)


def test_zero_points_of_eight_are_dropped_and_others_count_whatever_the_configuration_says() -> None:
    layer = Layer(64, 32, 32)
    assert load(layer.gemm(), layer, "gemm", zero_point=False).scheme.zero_point
    layer.zeros[:] = 8
    weight = load(layer.gemm(), layer, "gemm", zero_point=False)
    assert not weight.scheme.zero_point
    assert torch.equal(dequantize(weight), layer.weight)


def test_synonyms() -> None:
    layer = Layer(64, 32, 16)
    given = {"bits": None, "w_bit": 4, "q_group_size": 16}
    reader = AWQ.from_checkpoint({"quant_method": "awq", **given, "zero_point": True}, {})
    assert reader is not None
    assert reader.summary == "awq gemm, 4 bits, group 16, asymmetric"
    named = load(layer.gemm(), layer, "gemm", format="gemm", checkpoint_format="gemm")
    assert torch.equal(dequantize(named), layer.weight)


@pytest.mark.parametrize(
    ("version", "shape", "message"),
    [
        ("gemm", (64, 12, 32), "12 outputs are not a multiple of 8"),
        ("gemv", (48, 8, 16), "groups of 32, 64 or at least 128, not 16"),
        ("gemv_fast", (96, 8, 32), "blocks are 4 outputs of 64 inputs, but the layer is 96→8"),
        ("marlin", (64, 96, 32), "tiles of 16 inputs x 64 outputs, but the layer is 64→96"),
    ],
)
def test_shapes_that_a_version_cannot_hold(version: str, shape: tuple[int, int, int], message: str) -> None:
    layer = Layer(*shape)
    headers = {"a.qweight": TensorSpec((1, 1), torch.int32), "a.qzeros": TensorSpec((1, 1), torch.int32)}
    reader = AWQ.from_checkpoint({"quant_method": "awq", "version": version, "group_size": layer.group}, headers)
    assert reader is not None
    with pytest.raises(BadCheckpoint, match=message):
        reader.scheme_for("a", layer.shape)


@pytest.mark.parametrize("written", ["gemm", "gemv", "gemv_fast", "marlin"])
@pytest.mark.parametrize("said", ["gemm", "gemv", "gemv_fast", "marlin"])
def test_a_version_that_is_not_the_file_s(written: str, said: str) -> None:
    layer = Layer(128, 64, 32)
    if said == written:
        return
    with pytest.raises(BadCheckpoint, match=rf"a\.qweight is .*: version {written} with 4 bits .* says {said} with 4"):
        load(getattr(layer, written)(), layer, said, zero_point=False)


def test_a_width_that_is_not_the_file_s() -> None:
    layer = Layer(128, 64, 32, bits=8)
    with pytest.raises(BadCheckpoint, match=r"version gemm with 8 bits .* says gemm with 4"):
        load(layer.gemm(), layer, "gemm", bits=4)


def test_scaled_zeros_that_are_no_zero_points() -> None:
    layer = Layer(128, 8, 32)
    arrays = layer.gemv_fast()
    arrays["qzeros"] = np.abs(arrays["qzeros"]) + 1
    with pytest.raises(BadCheckpoint, match=r"qzeros: \d+ of 32 values are not minus a scale times a whole number"):
        load(arrays, layer, "gemv_fast")
