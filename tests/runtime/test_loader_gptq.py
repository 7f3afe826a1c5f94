"""What loading does for GPTQ files alone: extra biases, a quantized output layer that was tied, names of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.linear import QuantLinear
from runtime import inspect, load_model
from runtime.checkpoint import Checkpoint
from runtime.errors import LoadError
from runtime.loader import load
from runtime.plan import make_plan
from tests.gptq_writer import write_gptq
from tests.tiny_models import tiny_model

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
IDS = torch.arange(12).reshape(1, 12)


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINTS / name, tmp_path / name))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "architecture", ["llama-tied-rope3", "qwen3", "phi3", "gemma2", "stablelm", "opt", "gpt_neox", "gpt2"]
)
def test_models_and_shapes_of_every_kind(architecture: str, bits: int, tmp_path: Path) -> None:
    """Fused projections, tied embeddings, biases; 32 and 48 inputs in groups of 20, the last one cut short, shuffled."""
    model = tiny_model(architecture)
    write_gptq(model, tmp_path, bits, group=20, act_order=bits != 8)
    with torch.inference_mode():
        expected = model(IDS).logits
        for kernel in (None, "reference"):
            logits = load_model(tmp_path, dtype="float32", kernel=kernel)(IDS).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_quantized_output_layer_leaves_a_tied_embedding_dense(tmp_path: Path) -> None:
    folder = copy("gptqmodel--gptq-w4-lm-head", tmp_path)
    with torch.inference_mode():
        untied = load_model(folder)(IDS).logits
    edit_config(folder, tie_word_embeddings=True)
    model = load_model(folder)
    assert isinstance(model.lm_head, QuantLinear)
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, stored.to(model.dtype))
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, untied)
    assert inspect(folder).data()["missing"] == []


def test_biases_of_zero_are_dropped_and_others_are_added(tmp_path: Path) -> None:
    folder = copy("auto-gptq--w4g32-desc", tmp_path)
    file = next(folder.glob("gptq_model-*.safetensors"))
    layer = "model.layers.1.mlp.down_proj"
    model = load_model(folder, dtype="float32")
    assert model.get_submodule(layer).bias is None
    tensors = load_file(file)
    tensors[f"{layer}.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    shifted = load_model(folder, dtype="float32").get_submodule(layer)
    x = torch.randn(2, 512)
    torch.testing.assert_close(shifted(x), model.get_submodule(layer)(x) + 1)
    tensors[f"{layer}.bias"] = tensors[f"{layer}.bias"][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"down_proj\.bias is float16 \[255\].*needs float16 \[256\]"):
        load_model(folder)


def test_the_file_that_was_checked_is_the_file_that_is_read(tmp_path: Path) -> None:
    """``transformers_weights`` in config.json would make Transformers read another one."""
    folder = copy("gptqmodel--gptq-w4-asym-v2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")
    model = load_model(folder)
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"].to(model.dtype))
    assert "transformers_weights" not in model.config.to_dict(), "a saved copy would name a file that it has not"


def test_a_plan_of_act_order_is_settled_by_the_tensors() -> None:
    """Static groups: ``desc_act`` is set, the stored order is the natural one."""
    plan = make_plan(Checkpoint.open(CHECKPOINTS / "auto-gptq--w4g32-desc-static"))
    assert all(module.scheme is not None and module.scheme.act_order for module in plan.quantized)
    model = load(plan).model
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers
    assert not any(layer.scheme.act_order for layer in layers)


def test_the_module_is_named_where_values_contradict(tmp_path: Path) -> None:
    folder = copy("auto-gptq--w4g32-desc", tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=config | {"desc_act": False})
    with pytest.raises(LoadError, match=r"model\.layers\.\S+: g_idx is a permutation.*set desc_act: true"):
        load_model(folder)


def test_inspection_tells_what_each_rule_did(tmp_path: Path) -> None:
    folder = copy("gptqmodel--gptq-w4-dynamic", tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["dynamic"][r".*\.experts\."] = {"bits": 2}
    edit_config(folder, quantization_config=config)
    inspection = inspect(folder)
    modules = {module["name"]: module for module in inspection.data()["modules"]}
    assert modules["model.layers.0.mlp.down_proj"]["format"] == "dense"
    assert "dynamic" in modules["model.layers.0.mlp.down_proj"]["why"]
    assert (modules["model.layers.1.mlp.up_proj"]["bits"], modules["model.layers.1.mlp.up_proj"]["group"]) == (8, 64)
    assert modules["model.layers.0.self_attn.o_proj"]["group"] == 128
    assert inspection.data()["unmatched"] == [r"dynamic: .*\.experts\."]
    assert r".*\.experts\. names no module" in str(inspection)
