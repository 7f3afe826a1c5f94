"""Mixtures of experts whose experts are quantized: equal to the dense model with the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.experts import QuantExperts
from quant.linear import QuantLinear
from runtime import inspect, load_model
from tests.moe_writer import FAMILIES, MODELS, SIZES, dense_twin, moe_model, write_moe, write_mxfp4
from tests.tiny_models import VOCABULARY, tiny_model


def written(name: str, folder: Path, family: str, **options: Any) -> Path:
    write_moe(moe_model(name), folder, FAMILIES[family], **options)
    return folder


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(0))
    return model(ids).logits


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = logits(found), logits(expected)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < 2e-6
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format(tmp_path: Path, family: str) -> None:
    folder = written("qwen3_moe", tmp_path, family)
    model = load_model(folder, dtype="float32", weight_only=True)
    assert_same(model, dense_twin(folder))
    layers = [m for name, m in model.named_modules() if ".experts." in name and isinstance(m, QuantLinear)]
    assert len(layers) == 4 * 3


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(tmp_path: Path, name: str) -> None:
    folder = written(name, tmp_path, "fp8-block")
    model = load_model(folder, dtype="float32")
    assert_same(model, dense_twin(folder))
    assert any(isinstance(module, QuantExperts) for module in model.modules())


def test_experts_in_one_tensor_with_biases_and_an_interleaved_gate(tmp_path: Path) -> None:
    write_mxfp4(tiny_model("gpt_oss", **SIZES, layer_types=["sliding_attention", "full_attention"]), tmp_path)
    assert_same(load_model(tmp_path, dtype="float32"), dense_twin(tmp_path))
    assert "mxfp4" in str(inspect(tmp_path))
