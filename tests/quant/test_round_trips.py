"""Integers of 2 to 8 bits in every packing, over random sizes, odd ones included: what is written is read back exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant.methods.awq import AWQ
from quant.methods.compressed import CompressedTensors
from quant.methods.gptq import GPTQ
from quant.packing import pack_stream, unpack_stream
from tests import packers
from tests.quant.round_trip import assert_read_back, bounded, compressed, seeds, small

widths = st.integers(2, 8)


class Integers:
    """Random codes ``[out, in]``, scales (float16) and zero points ``[out, groups]`` of groups along the inputs."""

    def __init__(self, inputs: int, outputs: int, bits: int, group: int, seed: int, order: bool = False) -> None:
        draw = np.random.default_rng(seed)
        self.g_idx = np.arange(inputs) // group
        if order:
            self.g_idx = draw.permutation(self.g_idx)
        blocks = (outputs, -(-inputs // group))
        self.codes, self.zeros = draw.integers(0, 2**bits, (outputs, inputs)), draw.integers(0, 2**bits, blocks)
        self.scales = (draw.random(blocks) + 0.01).astype(np.float16)

    def weight(self) -> np.ndarray:
        values = np.empty(self.codes.shape)
        for (o, i), code in np.ndenumerate(self.codes):
            g = self.g_idx[i]
            values[o, i] = (int(code) - int(self.zeros[o, g])) * float(self.scales[o, g])
        return values


@bounded
@given(widths, st.integers(1, 4), st.integers(1, 100), seeds)
def test_streams(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count)).astype(np.uint8)
    packed = torch.from_numpy(packers.pack_rows(codes, bits, 8)).view(torch.uint8)
    assert torch.equal(pack_stream(torch.from_numpy(codes), bits), packed)
    assert torch.equal(unpack_stream(packed, bits, count), torch.from_numpy(codes))


# AWQ


@bounded
@given(widths, small, st.integers(1, 6), st.integers(1, 20), seeds)
def test_awq_gemm(bits: int, group: int, groups: int, outputs: int, seed: int) -> None:
    outputs = outputs * 8 if bits == 4 else outputs
    layer = Integers(group * groups, outputs, bits, group, seed)
    pack: Callable[[np.ndarray], np.ndarray] = (
        packers.pack_awq_gemm if bits == 4 else lambda codes: packers.pack_rows(codes, bits)
    )
    arrays = {"qweight": pack(layer.codes.T), "qzeros": pack(layer.zeros.T), "scales": layer.scales.T}
    config = {"quant_method": "awq", "version": "gemm", "bits": bits, "group_size": group}
    assert_read_back(AWQ, config, arrays, layer.weight())


@bounded
@given(st.sampled_from([32, 64, 128, 136, 320]), st.integers(1, 9), st.integers(1, 5), st.booleans(), seeds)
def test_awq_gemv_and_its_fast_versions(group: int, groups: int, outputs: int, named: bool, seed: int) -> None:
    """Groups are filled up to whole words, these to what the kernels of the time read at once."""
    outputs, groups = 4 * outputs, min(groups, 1280 // group)
    layer = Integers(group * groups, outputs, 4, group, seed)
    multiple = {32: 32, 64: 16}.get(group, 8)
    padding = ((0, 0), (0, -groups % multiple))
    zeros, scales = np.pad(layer.zeros, padding), np.pad(layer.scales, padding)
    arrays = {"qweight": packers.pack_rows(layer.codes, 4), "qzeros": packers.pack_rows(zeros, 4), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group}
    assert_read_back(AWQ, config | {"version": "gemv"}, arrays, layer.weight())
    if layer.codes.shape[1] % 64:
        return
    scaled = -(scales.astype(np.float32) * zeros).astype(np.float16)
    version, local = ("llm-awq", "scaled_zeros") if named else ("gemv_fast", "qzeros")
    fast = {"qweight": packers.pack_awq_fast(layer.codes), local: scaled.T, "scales": scales.T}
    assert_read_back(AWQ, config | {"version": version}, fast, layer.weight())


@bounded
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans(), seeds)
def test_marlin_tiles_of_awq_and_gptq(groups: int, rows: int, columns: int, awq: bool, seed: int) -> None:
    layer = Integers(16 * rows * groups, 64 * columns, 4, 16 * rows, seed)
    layer.zeros[:] = 8
    packed, scales = packers.pack_marlin(layer.codes.T, layer.scales.T)
    config = {"bits": 4, "group_size": 16 * rows if groups > 1 else -1}
    if awq:
        arrays = {"qweight": packed, "scales": scales}
        assert_read_back(
            AWQ, config | {"quant_method": "awq", "version": "marlin", "zero_point": False}, arrays, layer.weight()
        )
    else:
        config |= {"quant_method": "gptq", "checkpoint_format": "marlin", "sym": True}
        assert_read_back(GPTQ, config, {"B": packed, "s": scales}, layer.weight())


# GPTQ


def gptq(layer: Integers, bits: int, width: int, planes: bool, zeros: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "qweight": packers.pack_rows(layer.codes, bits, width, planes).T,
        "qzeros": packers.pack_rows(zeros.T, bits, width, planes),
        "scales": layer.scales.T,
        "g_idx": layer.g_idx.astype(np.int32),
    }


@bounded
@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([8, 16, 32, 64]), st.integers(1, 70), st.integers(1, 40), small,
    st.booleans(), seeds,
)  # fmt: skip
def test_gptq_words(bits: int, width: int, inputs: int, outputs: int, group: int, order: bool, seed: int) -> None:
    """The second version in every word, sizes that fill neither a group nor a word, and the first with borrows."""
    layer = Integers(inputs, outputs, bits, group, seed, order)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": order}
    arrays = gptq(layer, bits, width, False, layer.zeros)
    second = config | {"checkpoint_format": "gptq_v2", "pack_dtype": f"int{width}"}
    assert_read_back(GPTQ, second, arrays, layer.weight())
    if bits == 3 or outputs * bits % width:
        return
    arrays["qzeros"] = packers.less_one_with_borrow(arrays["qzeros"], bits)
    assert_read_back(GPTQ, config | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}, arrays, layer.weight())


@bounded
@given(widths, st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 20, 32]), st.booleans(), seeds)
def test_gptq_planes(bits: int, rows: int, columns: int, group: int, order: bool, seed: int) -> None:
    layer = Integers(32 * rows, 32 * columns, bits, group, seed, order)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": order}
    planar = gptq(layer, bits, 32, True, layer.zeros)
    assert_read_back(GPTQ, config | {"format": "gptq_p"}, planar, layer.weight())
    if bits in (5, 6, 7):
        first = gptq(layer, bits, 32, True, (layer.zeros - 1) % 2**bits)
        assert_read_back(GPTQ, config | {"meta": {"quantizer": "gptqmodel:7"}}, first, layer.weight())


# compressed-tensors


@bounded
@given(
    widths,
    st.booleans(),
    st.sampled_from(["none", "plain", "packed"]),
    small,
    st.integers(1, 6),
    st.integers(1, 40),
    seeds,
)
def test_compressed_words(bits: int, new: bool, how: str, group: int, groups: int, outputs: int, seed: int) -> None:
    """Continuous since 0.18, before with no code across the end of a word; zero points packed along the outputs or plain."""
    layer = Integers(group * groups, outputs, bits, group, seed, order=how == "plain")
    pack = packers.pack_rows if new else packers.pack_apart
    arrays: dict[str, np.ndarray | Tensor] = {
        "weight_packed": pack(layer.codes, bits),
        "weight_scale": layer.scales,
        "weight_shape": np.array(layer.codes.shape),
    }
    if how == "none":
        layer.zeros[:] = 2 ** (bits - 1)
    elif how == "plain":
        arrays["weight_zero_point"] = (layer.zeros - 2 ** (bits - 1)).astype(np.int8)
        arrays["weight_g_idx"] = layer.g_idx.astype(np.int32)
    else:
        arrays["weight_zero_point"] = pack(layer.zeros.T, bits).T
    weights = {"num_bits": bits, "strategy": "group", "group_size": group, "symmetric": how == "none"}
    config = compressed("pack-quantized", "0.20.0" if new else "0.12.2", **weights)
    assert_read_back(CompressedTensors, config, arrays, layer.weight())
