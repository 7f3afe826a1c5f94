"""Routers that are stored quantized, as bitsandbytes and some GPTQ files have them: dense in the model, and right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import LoadError, inspect, load_model
from runtime.checkpoint import Checkpoint
from runtime.loader import load
from runtime.plan import make_plan
from tests.families import FAMILIES
from tests.moe_writer import dense_twin, moe_model, write_moe
from tests.planned import assert_bytes_as_planned

ROUTER = "model.layers.1.mlp.gate"
MODELS = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts", "deepseek_v3": "n_routed_experts"}
FORMATS = ["gptq-act-order", "fp8-block", "fp8-static", "bnb-nf4", "bnb-int8", "ct-int4"]


def written(folder: Path, name: str, family: str) -> Path:
    """A checkpoint and its dense twin whose experts and routers are quantized, and no list says otherwise."""
    quantize = FAMILIES[family].quantize
    write_moe(moe_model(name, **{MODELS[name]: 8}), folder, FAMILIES[family])
    stored, dense = load_file(folder / "model.safetensors"), load_file(folder / "dense" / "model.safetensors")
    for router in [tensor for tensor in stored if tensor.endswith(".gate.weight")]:
        tensors, dense[router] = quantize(stored.pop(router))
        stored |= {router.removesuffix("weight") + local: tensor.contiguous() for local, tensor in tensors.items()}
    for place, content in ((folder, stored), (folder / "dense", dense)):
        save_file(content, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for field in ("ignore", "modules_to_not_convert"):
        if field in config["quantization_config"]:
            config["quantization_config"][field] = ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CASES = [*(("qwen3_moe", family) for family in FORMATS), ("mixtral", "gptq-act-order"), ("deepseek_v3", "fp8-block")]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_quantized_router_is_dequantized_and_said_so(tmp_path: Path, name: str, family: str) -> None:
    folder = written(tmp_path, name, family)
    checkpoint = Checkpoint.open(folder)
    loaded = load(make_plan(checkpoint, dtype="float32", device="cpu", weight_only=True, kernel="reference"))
    expected, ids = dense_twin(folder), torch.arange(3, 16)[None]
    ours, theirs = loaded.model.get_submodule(ROUTER), expected.get_submodule(ROUTER)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=0)
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys(), "packed tensors are freed"
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert_bytes_as_planned(loaded)
    why = {module["name"]: module["why"] for module in inspect(folder).data()["modules"]}[ROUTER]
    assert "dequantized while loading" in why
    assert "Router is no linear layer" in why


def test_a_damaged_router_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, "qwen3_moe", "gptq-act-order")
    tensors = load_file(folder / "model.safetensors")
    for change, message in (
        (
            {f"{ROUTER}.scales": tensors[f"{ROUTER}.scales"] * torch.nan},
            rf"{ROUTER}\.scales: \d+ of \d+ values are NaN",
        ),
        ({f"{ROUTER}.qweight": tensors[f"{ROUTER}.qweight"][:-1].contiguous()}, rf"{ROUTER}\.qweight is int32"),
    ):
        save_file(tensors | change, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(LoadError, match=message):
            load_model(folder)
