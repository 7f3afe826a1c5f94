"""Names in the file to names in the tree, where one stored tensor is cut into several parameters (HRM's fused projections)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import LLM, LoadError, load_model
from tests.architectures.sweep import eager_model

FUSED = "model.L_module.layers.0.mlp.gate_up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers.models.hrm_text")
    folder = tmp_path_factory.mktemp("hrm")
    eager_model("hrm_text").save_pretrained(folder)
    return folder


def test_every_part_has_its_source(folder: Path) -> None:
    assert FUSED in load_file(folder / "model.safetensors")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        wanted = eager_model("hrm_text")(ids).logits
        torch.testing.assert_close(load_model(folder, dtype="float32")(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_quantized_while_loading(folder: Path) -> None:
    llm = LLM(str(folder), dtype="float32", quantization="int8", skip_tokenizer_init=True, max_total_tokens=64)
    assert any(
        "gate_proj" in name for name in llm.engine.loaded.plan.modules if llm.engine.loaded.plan.modules[name].scheme
    )


def test_a_tensor_too_short_for_its_parts_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[FUSED] = tensors[FUSED][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(LoadError, match=r"gate_proj\.weight, .*up_proj\.weight are cut from it and have"):
        load_model(tmp_path)
