"""Wrong answers without an error (complaints 1 to 11): the situations, and what happens in them here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant.linear import QuantLinear
from quant.reference import dequantize
from runtime import LoadError, inspect, load_model
from tests.awq_writer import quantize
from tests.packers import pack_rows
from tests.runtime.test_loader import edit_quantization, edit_tensors
from tests.tiny_models import VOCABULARY, tiny_model

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
FP8 = CHECKPOINTS / "transformers-fp8--block128"
IDS = torch.arange(24)[None] * 3 % VOCABULARY


def copy(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to / "model"))


@torch.inference_mode()
def logits(folder: Path, **options: Any) -> Tensor:
    return load_model(folder, **options)(IDS).logits


def write_fp8(model: nn.Module, folder: Path) -> None:
    """Save a model with every linear but lm_head in FP8 under one scale; the model is changed to the dequantized weights."""
    model.save_pretrained(folder)  # type: ignore[operator]
    stored = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            scale = module.weight.data.abs().max() / 448
            codes = (module.weight.data / scale).to(torch.float8_e4m3fn)
            module.weight.data = codes.float() * scale
            stored |= {f"{name}.weight": codes, f"{name}.weight_scale": scale.reshape(1)}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def test_scales_that_an_index_names_and_no_shard_holds(tmp_path: Path) -> None:
    folder = copy(FP8, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    save_file({name: t for name, t in tensors.items() if "scale" not in name}, folder / "one.safetensors")
    with pytest.raises(LoadError, match=r"14 tensors that no shard holds, e\.g\. \S+scale_inv"):
        load_model(folder)


def test_an_fp8_weight_without_its_scale(tmp_path: Path) -> None:
    folder = copy(FP8, tmp_path)
    edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale_inv"))
    with pytest.raises(LoadError, match=r"model\.layers\.1\.mlp\.up_proj: an FP8 weight is stored with no scale"):
        load_model(folder)


def test_a_skip_entry_that_is_part_of_another_name(tmp_path: Path) -> None:
    folder = copy(FP8, tmp_path)
    edit_quantization(folder, modules_to_not_convert=["lm_head", "mlp.gate", "layers.0.mlp.gate.", "_proj"])
    assert {module.name for module in inspect(folder).plan.quantized} == {
        module.name for module in inspect(FP8).plan.quantized
    }
    assert torch.equal(logits(folder), logits(FP8))


@pytest.mark.parametrize(
    "skipped",
    [
        ["self_attn.q_proj"],
        ["model.layers.0.self_attn.qkv_proj"],
        ["model.language_model.layers.0.self_attn.q_proj"],
        [],
    ],
    ids=["short", "fused", "wrapper", "none"],
)
def test_tensors_decide_whatever_the_skip_list_says(skipped: list[str], tmp_path: Path) -> None:
    """The first query projection is stored in bfloat16, the second in FP8 or, where the list says so, dense as well."""
    folder = copy(FP8, tmp_path)
    original = load_model(FP8, kernel="reference")
    dense = ["model.layers.0.self_attn.q_proj"] + ["model.layers.1.self_attn.q_proj"] * (
        skipped == ["self_attn.q_proj"]
    )

    def store_dense(tensors: dict[str, Tensor]) -> None:
        for name in dense:
            layer = original.get_submodule(name)
            assert isinstance(layer, QuantLinear)
            assert layer.quant_weight is not None
            tensors[f"{name}.weight"] = dequantize(layer.quant_weight).bfloat16()
            del tensors[f"{name}.weight_scale_inv"]

    edit_tensors(folder, store_dense)
    edit_quantization(folder, modules_to_not_convert=["lm_head", *skipped])
    model = load_model(folder, kernel="reference")
    assert all(type(model.get_submodule(name)) is nn.Linear for name in dense)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize(("said", "held"), [("gptq", 8), ("gptq_v2", 7)])
def test_zero_points_of_the_other_gptq_version(said: str, held: int, tmp_path: Path) -> None:
    folder = copy(CHECKPOINTS / "gptqmodel--gptq-w4-int8", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    zeros = {name: tensor for name, tensor in tensors.items() if name.endswith("qzeros")}
    other = {
        n: torch.from_numpy(pack_rows(np.full((z.shape[0], 2 * z.shape[1]), held), 4, 8)) for n, z in zeros.items()
    }
    assert other.keys() == zeros.keys() != set()
    save_file(tensors | other, folder / "model.safetensors", metadata={"format": "pt"})
    edit_quantization(folder, checkpoint_format=said)
    right = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[said]
    with pytest.raises(LoadError, match=rf"q_proj: .*every zero point.*checkpoint_format: {right}"):
        load_model(folder)
    edit_quantization(folder, checkpoint_format=right)
    assert torch.equal(logits(folder), logits(CHECKPOINTS / "gptqmodel--gptq-w4-int8"))


@pytest.mark.parametrize("architecture", ["phi3"])
def test_fused_projections_under_one_scale(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    write_fp8(model, tmp_path)
    assert any("qkv_proj" in module.name for module in inspect(tmp_path).plan.quantized)
    with torch.inference_mode():
        torch.testing.assert_close(logits(tmp_path, dtype="float32"), model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_biases_beside_fp8_weights(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    write_fp8(model, tmp_path)
    with torch.inference_mode():
        expected = model(IDS).logits
        torch.testing.assert_close(logits(tmp_path, dtype="float32"), expected, rtol=1e-4, atol=1e-4)
        model.get_submodule("model.layers.0.self_attn.q_proj").bias.data.zero_()
        assert (model(IDS).logits - expected).abs().max() > 0.01, "this bias would not be missed"
    edit_tensors(tmp_path, lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"))
    with pytest.raises(LoadError, match=r"stored nowhere: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(tmp_path)


def test_awq_experts_are_right(tmp_path: Path) -> None:
    """Each expert's matrices quantized on disk, under the names of the model's authors."""
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "awq")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    codes = dict(dense)
    for name in [name for name in dense if ".experts." in name]:
        tensors, dense[name] = quantize(codes.pop(name), 16)
        codes |= {f"{name.removesuffix('.weight')}.{local}": tensor for local, tensor in tensors.items()}
    assert codes.keys() != dense.keys()
    save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    save_file(codes, tmp_path / "awq" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    (tmp_path / "awq" / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    found = logits(tmp_path / "awq", dtype="float32")
    torch.testing.assert_close(found, logits(tmp_path / "dense", dtype="float32"), rtol=1e-4, atol=1e-4)
