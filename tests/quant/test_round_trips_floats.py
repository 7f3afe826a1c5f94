"""Floats, sparse and bitsandbytes weights over random sizes, odd ones included: what is written is read back exactly."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant.methods.bnb import BitsAndBytes
from quant.methods.compressed import CompressedTensors
from quant.methods.fp8 import FP8
from tests import packers
from tests.quant.round_trip import assert_read_back, bounded, compressed, seeds, small


@bounded
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), seeds)
def test_2_of_4_sparse(outputs: int, fours: int, fp8: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    places = np.array([[draw.permutation([1, 1, 0, 0]) for _ in range(fours)] for _ in range(outputs)])
    codes = draw.integers(1, 120, (outputs, 4 * fours)) * places.reshape(outputs, -1)
    kept, bitmask = packers.pack_bitmask(codes)
    scale = (draw.random((outputs, 1)) + 0.5).astype(np.float32)
    numbers = torch.from_numpy(kept.astype(np.uint8)).view(torch.float8_e4m3fn if fp8 else torch.int8)
    arrays: dict[str, np.ndarray | Tensor] = {"compressed": numbers, "bitmask": bitmask, "weight_scale": scale}
    number = "float" if fp8 else "int"
    config = compressed(f"{number}-quantized", "0.12.2", num_bits=8, type=number, strategy="channel")
    config["sparsity_config"] = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    values = np.array([[packers.e4m3(c) if fp8 else c for c in row] for row in codes.tolist()], np.float32)
    assert_read_back(CompressedTensors, config, arrays, values * scale)


@bounded
@given(st.integers(1, 9), st.integers(1, 5), st.booleans(), seeds)
def test_e2m1_under_nvfp4_and_mxfp4_scales(outputs: int, groups: int, mx: bool, seed: int) -> None:
    draw, group = np.random.default_rng(seed), 32 if mx else 16
    codes = draw.integers(0, 16, (outputs, group * groups))
    low, high = (118, 136) if mx else (1, 127)
    scales = draw.integers(low, high, (outputs, groups)).astype(np.uint8)
    arrays: dict[str, np.ndarray | Tensor] = {
        "weight_packed": np.array([packers.pack_nibbles(row) for row in codes.tolist()]),
        "weight_scale": torch.from_numpy(scales) if mx else torch.from_numpy(scales).view(torch.float8_e4m3fn),
    }
    divisor = 1.0
    weights: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": group}
    if not mx:
        divisor = 2.0 ** int(draw.integers(-3, 4))
        arrays["weight_global_scale"] = np.array([divisor], np.float32)
        weights["strategy"] = "tensor_group"
    worth = [[2.0 ** (int(s) - 127) if mx else packers.e4m3(int(s)) for s in row] for row in scales]
    values = [
        [packers.e2m1(int(code)) * worth[o][i // group] / divisor for i, code in enumerate(row)]
        for o, row in enumerate(codes)
    ]
    config = compressed(f"{'mxfp4' if mx else 'nvfp4'}-pack-quantized", "0.20.0", **weights)
    assert_read_back(CompressedTensors, config, arrays, np.array(values))


@bounded
@given(
    st.integers(1, 30), st.integers(1, 12), st.sampled_from([32, 64, 128, 4096]),
    st.sampled_from(["uint8", "bfloat16", "float32"]), st.booleans(), st.sampled_from(["nf4", "fp4"]), seeds,
)  # fmt: skip
def test_bitsandbytes(rows: int, eights: int, block: int, storage: str, double: bool, kind: str, seed: int) -> None:
    """Blocks run over the ends of rows, the last may be short; absmax may itself be codes under scales and an offset."""
    draw, count = np.random.default_rng(seed), 8 * rows * eights
    codes, table = draw.integers(0, 16, count), np.sort(draw.uniform(-1, 1, 16)).astype(np.float32)
    blocks, nested = -(-count // block), 16
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, 8 * eights]}
    packed = torch.from_numpy(packers.pack_nibbles(codes.tolist(), high_first=True))
    arrays: dict[str, np.ndarray | Tensor] = {
        "weight": packed.view(getattr(torch, storage))[:, None],
        "weight.quant_map": table,
    }
    if double:
        offset = float(np.float32(draw.uniform(0.5, 1)))
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        stored, map_ = draw.integers(0, 256, blocks).astype(np.uint8), draw.uniform(-0.4, 0.4, 256).astype(np.float32)
        scales = draw.uniform(0.5, 1, -(-blocks // nested)).astype(np.float32)
        arrays |= {"weight.absmax": stored, "weight.nested_quant_map": map_, "weight.nested_absmax": scales}
        absmax = [map_[byte] * scales[place // nested] + np.float32(offset) for place, byte in enumerate(stored)]
    else:
        absmax = list(draw.uniform(0.5, 1, blocks).astype(np.float32))
        arrays["weight.absmax"] = np.array(absmax)
    arrays[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    values = np.array([table[code] * absmax[place // block] for place, code in enumerate(codes)], np.float32)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    assert_read_back(BitsAndBytes, config, arrays, values.reshape(rows, -1))


@bounded
@given(small, small, seeds)
def test_llm_int8(rows: int, columns: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    codes, absmax = (
        draw.integers(-127, 128, (rows, columns)).astype(np.int8),
        draw.uniform(0.1, 9, rows).astype(np.float32),
    )
    values = codes.astype(np.float32) * (absmax / np.float32(127))[:, None]
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert_read_back(BitsAndBytes, config, {"weight": codes, "SCB": absmax}, values)


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "ue8m0"])
@bounded
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24), seeds)
def test_fp8_blocks_with_ragged_edges(scale: str, rows: int, columns: int, tall: int, wide: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 127, (rows, columns)) + 128 * draw.integers(0, 2, (rows, columns))
    blocks = (-(-rows // tall), -(-columns // wide))
    if scale == "ue8m0":
        stored = torch.from_numpy(draw.integers(118, 136, blocks).astype(np.uint8))
        worth = np.exp2(stored.numpy().astype(np.float64) - 127)
    else:
        stored = torch.from_numpy(draw.uniform(0.1, 2, blocks)).to(getattr(torch, scale))
        worth = stored.double().numpy()
    values = np.array([
        [np.float32(packers.e4m3(int(code))) * np.float32(worth[o // tall, i // wide]) for i, code in enumerate(row)]
        for o, row in enumerate(codes)
    ])  # fmt: skip
    weight = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)
    config = {"quant_method": "fp8", "weight_block_size": [tall, wide], "activation_scheme": "dynamic"}
    assert_read_back(FP8, config, {"weight": weight, "weight_scale_inv": stored}, values)
