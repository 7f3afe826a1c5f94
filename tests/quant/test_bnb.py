"""bitsandbytes: files of the library, blocks that run over the ends of rows, contradictions and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.base import BadCheckpoint, LinearShape, TensorSpec, UnsupportedCheckpoint, WeightKind
from quant.methods.bnb import BitsAndBytes
from quant.reference import dequantize
from tests.quant.checkpoints import LAYER, headers_of, read, stored

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
TABLE = torch.linspace(-1, 1, 16)


def make(config: dict[str, Any], tensors: dict[str, Tensor]) -> BitsAndBytes:
    method = BitsAndBytes.from_checkpoint(config, headers_of(tensors))
    assert method is not None
    return method


def quantized(shape: LinearShape, block: int, storage: torch.dtype = torch.uint8) -> tuple[dict[str, Tensor], Tensor]:
    """A layer ``a`` as bitsandbytes stores it, and its weight, written here from the description of the format."""
    count = shape.out_features * shape.in_features
    codes, absmax = torch.randint(0, 16, (count,)), torch.rand(-(-count // block)) + 0.5
    weight = (TABLE[codes] * absmax.repeat_interleave(block)[:count]).view(shape.out_features, shape.in_features)
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
    state = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": [shape.out_features, shape.in_features],
    }
    tensors = {
        "a.weight": packed.view(storage)[:, None],
        "a.weight.absmax": absmax,
        "a.weight.quant_map": TABLE,
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return tensors, weight


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        (LinearShape(128, 24), 64),
        (
            LinearShape(40, 24),
            64,
        ),  # blocks run over the ends of rows; bitsandbytes 0.50.2 itself misreads them on a CPU
        (LinearShape(72, 26), 128),  # and the last one is short
        (LinearShape(24, 4), 4096),  # a single block
    ],
    ids=str,
)
def test_weights_are_exact_whatever_the_blocks_and_the_storage(
    shape: LinearShape, block: int, storage: torch.dtype
) -> None:
    tensors, weight = quantized(shape, block, storage)
    found = read(make(FOUR, tensors), tensors, "a", shape)
    assert torch.equal(dequantize(found), weight)


def test_rows_of_whole_blocks_are_ordinary_groups() -> None:
    tensors, _ = quantized(LinearShape(128, 24), 64)
    scheme = make(FOUR, tensors).scheme_for("a", LinearShape(128, 24))
    assert scheme is not None
    assert (scheme.kind, scheme.block, scheme.flat) == (WeightKind.NF4, (1, 64), False)


def test_storage_as_bfloat16_is_told_by_absmax_not_by_its_dtype() -> None:
    config, tensors = stored("bitsandbytes--nf4-storage-bf16")
    assert tensors[f"{LAYER}.weight"].dtype == torch.bfloat16
    assert read(make(config, tensors), tensors).scheme.kind is WeightKind.NF4


def test_a_file_without_quant_method_is_known_by_its_flags() -> None:
    tensors, _ = quantized(LinearShape(128, 24), 64)
    assert BitsAndBytes.from_checkpoint({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, headers_of(tensors))
    assert BitsAndBytes.from_checkpoint({"quant_method": "gptq"}, {}) is None


def test_int8_executes_inputs_with_the_threshold_of_the_file() -> None:
    config, tensors = stored("bitsandbytes--int8")
    weight = read(make(config | {"llm_int8_threshold": 5.5}, tensors), tensors)
    assert weight.scheme.activation is not None
    assert weight.scheme.activation.threshold == 5.5


def test_gpu_arrangements_of_int8_are_refused_by_name() -> None:
    config, tensors = stored("bitsandbytes--int8")
    tensors[f"{LAYER}.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(UnsupportedCheckpoint, match=r"weight_format 2 \(col_turing\)"):
        read(make(config, tensors), tensors)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (FOUR | {"bnb_4bit_quant_type": "int4"}, UnsupportedCheckpoint, "bnb_4bit_quant_type 'int4'"),
        (FOUR | {"load_in_8bit": True}, BadCheckpoint, "load_in_4bit and load_in_8bit are both True"),
        (EIGHT | {"llm_int8_has_fp16_weight": True}, UnsupportedCheckpoint, "llm_int8_has_fp16_weight"),
        ({"quant_method": "bitsandbytes", "format": "nf4", "block_size": 64}, UnsupportedCheckpoint, "GPTQModel's own"),
    ],
)
def test_configurations_that_cannot_be_read(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BitsAndBytes.from_checkpoint(config, {})


def test_contradictions_name_module_and_entry() -> None:
    shape = LinearShape(128, 24)
    tensors, _ = quantized(shape, 64)
    with pytest.raises(BadCheckpoint, match=r"a: weight\.absmax is stored, but .*load_in_8bit"):
        make(EIGHT, tensors).scheme_for("a", shape)
    with pytest.raises(BadCheckpoint, match="a: a quantized weight is stored, but llm_int8_skip_modules lists 'a'"):
        make(FOUR | {"llm_int8_skip_modules": ["a"]}, tensors).scheme_for("a", shape)
    with pytest.raises(BadCheckpoint, match=r"a\.weight\.absmax is float32 \[47\].*3072 weights"):
        make(FOUR, tensors | {"a.weight.absmax": torch.ones(47)}).scheme_for("a", shape)
    broken = tensors | {"a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b"{"), dtype=torch.uint8)}
    with pytest.raises(BadCheckpoint, match=r"quant_state is not JSON"):
        read(make(FOUR, broken), broken, "a", shape)
    twice = tensors | {"a.weight.quant_state.bitsandbytes__fp4": torch.zeros(1, dtype=torch.uint8)}
    with pytest.raises(BadCheckpoint, match="exactly once, found nf4, fp4"):
        make(FOUR, twice).scheme_for("a", shape)


def test_dense_layers_say_why() -> None:
    method = BitsAndBytes.from_checkpoint(
        FOUR | {"llm_int8_skip_modules": ["lm_head"]}, {"b.weight": TensorSpec((2, 2), torch.bfloat16)}
    )
    assert method is not None
    assert method.scheme_for("b", LinearShape(2, 2)) is None
    assert "weight.absmax" in method.dense_reason("b")
    assert "llm_int8_skip_modules" in method.dense_reason("lm_head")
