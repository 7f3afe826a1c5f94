"""Every committed checkpoint reproduces the logits of the library that wrote it, with every kernel that takes it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from quant.linear import QuantLinear
from runtime import load_model
from tests.formats import CASES, Case


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.checkpoint)
def test_logits_are_those_of_the_writer(case: Case, kernel: str | None) -> None:
    reference = load_file(case.folder / "reference.safetensors")
    model = load_model(case.folder, dtype="float32", kernel=kernel)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    with torch.inference_mode():
        logits = model(reference["input_ids"]).logits
    assert logits.shape == reference["logits"].shape
    difference = (logits - reference["logits"]).abs().max().item()
    moved = (reference["logits"] - reference["dense_logits"]).abs().max().item()
    assert difference < case.tolerance < moved / 10, (difference, moved)
