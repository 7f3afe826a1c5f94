"""Checkpoints that would not load (complaints 12 to 22): the situations, and what happens in them here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant.linear import QuantLinear
from quant.reference import dequantize
from runtime import LoadError, inspect, load_model
from tests.awq_writer import write_awq
from tests.complaints.test_silent import CHECKPOINTS, FP8, IDS, copy, logits
from tests.runtime.test_loader import AWQ, edit_quantization, edit_tensors
from tests.tiny_models import tiny_model


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_spelling_with_a_kernel_in_it_changes_no_layer() -> None:
    plans = [inspect(AWQ, quantization=spelling).plan for spelling in ("awq", "awq_marlin", None)]
    formats = [{module.name: (module.scheme, module.reason) for module in plan.modules.values()} for plan in plans]
    assert formats[0] == formats[1] == formats[2]
    assert formats[0]["lm_head"][0] is None


def test_an_ignore_list_of_a_wrapper(tmp_path: Path) -> None:
    source = CHECKPOINTS / "compressed-tensors--w3a16-g64-asym"
    folder, name = copy(source, tmp_path), "model.layers.0.self_attn.q_proj"
    original = load_model(source, kernel="reference")
    layer = original.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    assert layer.quant_weight is not None
    weight = dequantize(layer.quant_weight).bfloat16()

    def store_dense(tensors: dict[str, Tensor]) -> None:
        for local in [local for local in tensors if local.startswith(f"{name}.weight")]:
            del tensors[local]
        tensors[f"{name}.weight"] = weight

    edit_tensors(folder, store_dense)
    edit_quantization(folder, ignore=["lm_head", f"{name}.linear"])
    model = load_model(folder, kernel="reference")
    assert type(model.get_submodule(name)) is nn.Linear
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, original(IDS).logits)


def test_a_bitsandbytes_skip_entry_inside_another_name(tmp_path: Path) -> None:
    source = CHECKPOINTS / "bitsandbytes--fp4"
    folder = copy(source, tmp_path)
    edit_quantization(folder, llm_int8_skip_modules=["lm_head", "proj", "attn.k", "gate"])
    assert len(inspect(folder).plan.quantized) == 14
    assert torch.equal(logits(folder), logits(source))


def test_tied_embeddings_and_a_stored_head(tmp_path: Path) -> None:
    model = tiny_model("llama-tied-rope3")
    write_awq(model, tmp_path, group=16)
    expected = logits(tmp_path, dtype="float32")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(tmp_path, dtype="float32"), expected)
    with torch.inference_mode():
        torch.testing.assert_close(expected, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_quantized_embedding_means_what_its_codes_and_scales_say(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    scale = torch.arange(1.0, 9.0).view(4, 2) / 4
    codes = copy(FP8, tmp_path / "codes")
    edit_tensors(codes, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}))
    dense = copy(FP8, tmp_path / "dense")
    every = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    edit_tensors(dense, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn).float() * every}))
    torch.testing.assert_close(logits(codes, dtype="float32"), logits(dense, dtype="float32"), rtol=1e-5, atol=1e-5)


def test_awq_in_every_dtype(tmp_path: Path) -> None:
    """Also where the configuration says bfloat16 and the scales are float16, or bfloat16 as well."""
    reference = load_file(AWQ / "reference.safetensors")
    folder = copy(AWQ, tmp_path)
    edit_config(folder, torch_dtype="bfloat16")
    for dtype, scales, tolerance in (
        ("auto", torch.float16, 0.1),
        ("float16", torch.float16, 0.013),
        ("float32", torch.float16, 0.013),
        ("auto", torch.bfloat16, 0.1),
    ):
        edit_tensors(
            folder, lambda t, to=scales: t.update({k: v.to(to) for k, v in t.items() if k.endswith(".scales")})
        )
        model = load_model(folder, dtype=dtype)
        with torch.inference_mode():
            found = model(reference["input_ids"]).logits
        assert found.dtype == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
        assert (found.float() - reference["logits"].float()).abs().max() < tolerance


@pytest.mark.parametrize("name", ["fp4", "nf4-storage-bf16", "int8"])
def test_bitsandbytes_needs_no_flags(name: str) -> None:
    folder = CHECKPOINTS / f"bitsandbytes--{name}"
    assert torch.equal(logits(folder), logits(folder, quantization="bitsandbytes"))


def test_layers_for_multi_token_prediction_are_left_out_and_reported(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    expected, extra = logits(tmp_path), {"model.layers.61.eh_proj.weight": torch.zeros(4, 4)}
    edit_tensors(tmp_path, lambda t: t.update(extra))
    assert extra.keys() == inspect(tmp_path).plan.account.ignored.keys()
    assert torch.equal(logits(tmp_path), expected)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.7.eh_proj.weight": torch.zeros(4, 4)}))
    with pytest.raises(
        LoadError, match=r"1 stored tensors belong to no module of this model: model\.layers\.7\.eh_proj"
    ):
        load_model(tmp_path)
