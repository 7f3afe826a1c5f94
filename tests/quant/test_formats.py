"""Every committed checkpoint reproduces what the library that wrote it computes, with every kernel that takes it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant.linear import QuantLinear
from quant.reference import dequantize
from runtime import load_model
from tests.formats import CASES, CHECKPOINTS, INTEGER_CASES, Case

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FP8_STEP = 2.0**-3
LAYER = "model.layers.0.self_attn.k_proj"
DENSE = load_file(CHECKPOINTS / "dense.safetensors")
WITH_LOGITS = [case for case in CASES if case.tolerance is not None]
WITH_WEIGHTS = [case for case in CASES if (case.folder / "reference.safetensors").is_file()]


def difference(case: Case, dtype: str, kernel: str | None) -> tuple[Tensor, float]:
    """Of our logits from the writer's, and the largest by which quantization itself moved them."""
    reference = load_file(case.reference)
    model = load_model(case.folder, dtype=dtype, kernel=kernel)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers
    assert any(layer.scheme.activation for layer in layers) == case.inputs
    if kernel is None:
        assert {layer.kernel.name for layer in layers} == {"cpu"}
    with torch.inference_mode():
        logits = model(reference["input_ids"]).logits.float()
    assert logits.shape == reference["logits"].shape
    theirs = reference["logits"].float()
    config = json.loads((case.folder / "config.json").read_text())
    moved = (theirs - DENSE[f"logits.{config.get('dtype') or config['torch_dtype']}"]).abs().max().item()
    return (logits - theirs).abs(), moved


@pytest.mark.parametrize("case", WITH_LOGITS, ids=lambda case: case.checkpoint)
def test_logits_are_those_of_the_writer(case: Case) -> None:
    found, moved = difference(case, case.dtype, "reference")
    assert case.tolerance is not None
    assert found.max() < case.tolerance
    assert case.mean is None or found.mean() < case.mean
    assert not case.bites or case.tolerance < moved / 10, moved
    assert case not in INTEGER_CASES or found.max() < moved / 5, "as near to the dense model as to the quantized one"


@pytest.mark.parametrize("case", [case for case in WITH_LOGITS if not case.inputs], ids=lambda case: case.checkpoint)
def test_the_kernel_that_is_chosen_computes_the_same(case: Case) -> None:
    found, _ = difference(case, "float32", None)
    assert case.tolerance is not None
    assert found.max() < case.tolerance


@pytest.mark.parametrize("case", WITH_WEIGHTS, ids=lambda case: case.checkpoint)
def test_weights_are_those_that_the_writer_dequantizes(case: Case) -> None:
    reference = load_file(case.folder / "reference.safetensors")
    model = load_model(case.folder, dtype="float32", kernel="reference")
    stored = {name.removeprefix("dequant."): value for name, value in reference.items() if name.startswith("dequant.")}
    assert stored
    for name, theirs in stored.items():
        ours = weight(model, name).to(theirs.dtype)
        if case.family == "modelopt":
            # It rounds in float32 before export and in bfloat16 when it exports: ties fall to the neighbouring FP8 number.
            torch.testing.assert_close(ours, theirs, rtol=FP8_STEP + ULP[theirs.dtype], atol=0)
            assert (ours != theirs).float().mean() < 0.05 or "PB_WO" in case.variant
        else:
            exact = theirs.dtype == torch.float32 and case in INTEGER_CASES
            torch.testing.assert_close(ours, theirs, rtol=0 if exact else ULP[theirs.dtype], atol=0)


@pytest.mark.parametrize("name", ["auto_awq", "auto_round-sym"])
def test_weights_of_auto_round_are_the_dense_ones_rounded(name: str) -> None:
    """auto-round ran none of these files. GPTQModel's 8-bit weights stand for the dense ones: they are within 1 / 100 of a
    4-bit step, and auto-round moves a weight by less than one step."""
    model = load_model(CHECKPOINTS / f"auto-round--{name}", dtype="float32", kernel="reference")
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, QuantLinear)
    assert layer.quant_weight is not None
    dense = DENSE[LAYER]
    steps = (weight(model, LAYER) - dense).abs() / layer.quant_weight.scale.repeat_interleave(32, 1)
    assert steps.max() < 1.1
    assert steps.mean() < 0.3


def weight(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    assert layer.quant_weight is not None
    return dequantize(layer.quant_weight)
