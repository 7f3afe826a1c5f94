"""Quantized experts that cannot be right are refused before weights are read, with the name of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

from runtime import LoadError, inspect, load_model
from tests.families import FAMILIES
from tests.moe_writer import SIZES, dense_twin, moe_model, write_moe, write_mxfp4
from tests.tiny_models import tiny_model

EXPERT = "model.layers.1.mlp.experts.2."


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    write_moe(moe_model("qwen3_moe"), tmp_path, FAMILIES["awq"])
    return tmp_path


@pytest.fixture
def stacked(tmp_path: Path) -> Path:
    layers = ["sliding_attention", "full_attention"]
    write_mxfp4(tiny_model("gpt_oss", **SIZES, layer_types=layers), tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], **quantization: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unchanged(tensors: dict[str, Tensor]) -> None:
    """For changes of the configuration alone."""


def without(beginning: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(beginning)]


def move(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [
        tensors.update({name.replace(old, new): tensors.pop(name)}) for name in list(tensors) if old in name
    ]


def cut(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})


def spoil(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(EXPERT), rf"3 parameters .* stored nowhere: {EXPERT}down_proj.weight, {EXPERT}gate_proj.weight"),
        (without(f"{EXPERT}up_proj."), rf"1 parameters .* stored nowhere: {EXPERT}up_proj.weight"),
        (without(f"{EXPERT}up_proj.qweight"), rf"{EXPERT}up_proj: \w+ is there but qweight is missing"),
        (without(f"{EXPERT}up_proj.scales"), rf"{EXPERT}up_proj.scales is missing"),
        (cut(f"{EXPERT}down_proj.scales"), rf"{EXPERT}down_proj.scales is float16 \[0, 64\], but this layer needs"),
        (cut(f"{EXPERT}down_proj.qweight"), rf"{EXPERT}down_proj.qweight is int32 \[31, 8\], but this layer needs"),
        (spoil(f"{EXPERT}down_proj.scales", float("nan")), rf"{EXPERT}down_proj.scales: 1 of 64 values are NaN"),
        (move(".experts.2.", ".experts.4."), r"belong to no module of this model: .*experts\.4\."),
        (
            lambda t: t.update({f"{EXPERT}up_proj.weight": torch.zeros(32, 64)}),
            rf"{EXPERT}up_proj: both qweight and a dense weight are stored",
        ),
        (
            move("experts.2.gate_proj", "experts.2.gate_up_proj"),
            r"experts\.2\.gate_up_proj\.\w+ is int32 .*mlp\.experts, Qwen3MoeExperts\) are stored quantized in a layout .*"
            r"What is read: model\.layers\.1\.mlp\.experts\.N\.gate_proj, .*experts are dense, or quantized each by itself",
        ),
    ],
    ids=[
        "expert", "projection", "codes", "scales", "cut scales", "cut codes", "NaN", "one too many", "both", "fused",
    ],
)  # fmt: skip
def test_a_damaged_expert(awq: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_model(edit(awq, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            cut("model.layers.0.mlp.experts.down_proj_blocks"),
            r"down_proj_blocks is uint8 \[3, .* the model has 4 experts",
        ),
        (
            without("model.layers.0.mlp.experts.down_proj_scales"),
            r"experts\.0\.down_proj: blocks is there but scales is",
        ),
        (
            without("model.layers.0.mlp.experts.down_proj_"),
            r"5 parameters .* stored nowhere: .*experts\.0\.down_proj\.weight",
        ),
        (
            spoil("model.layers.0.mlp.experts.down_proj_scales", 255),
            r"experts\.0\.down_proj: 1 of 192 scales are the byte",
        ),
        (
            move("down_proj_blocks", "down_proj_codes"),
            r"down_proj_codes is uint8 .*GptOssExperts\).*What is read: .*experts\.gate_up_proj_blocks and _scales",
        ),
    ],
    ids=["count", "scales", "both", "NaN", "name"],
)
def test_a_damaged_stack(stacked: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_model(edit(stacked, change))


def test_a_skip_list_against_the_file(awq: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    entry = "model.layers.1.mlp.experts.2"
    with pytest.raises(
        LoadError, match=rf"{EXPERT}gate_proj: qweight is stored, but modules_to_not_convert lists '{entry}'"
    ):
        inspect(edit(awq, unchanged, modules_to_not_convert=[entry]))
    mixtral = tmp_path_factory.mktemp("mixtral")
    write_moe(moe_model("mixtral"), mixtral, FAMILIES["fp8-block"])
    entry = "model.layers.0.block_sparse_moe.experts.3.w2"
    with pytest.raises(LoadError, match=rf"{entry}: a quantized weight is stored, but .* lists '{entry}'"):
        inspect(edit(mixtral, unchanged, modules_to_not_convert=[entry]))


def test_a_skip_list_against_a_stack(stacked: Path) -> None:
    """In the words of Transformers, whose format it is: ``*`` and all."""
    assert inspect(edit(stacked, unchanged)).data()["unmatched"] == []
    entries = ["model.layers.*.mlp.experts", "model.layers.*.mlp.routers"]
    assert inspect(edit(stacked, unchanged, modules_to_not_convert=entries[1:])).data()["unmatched"] == [
        f"modules_to_not_convert: {entries[1]}"
    ]
    with pytest.raises(LoadError, match=r"experts\.0\.gate_up_proj: a quantized weight is stored, but .*mlp\.experts'"):
        inspect(edit(stacked, unchanged, modules_to_not_convert=entries))


def test_layouts_of_experts_that_are_not_read(tmp_path: Path) -> None:
    """Llama 4 multiplies all experts at once, by tokens that it weighted before."""
    model = tiny_model("llama4", hidden_size=64, intermediate_size=96)
    write_moe(model, tmp_path, FAMILIES["awq"])
    codes = {"model.layers.1.feed_forward.experts.0.gate_proj.qweight": torch.zeros(64, 12, dtype=torch.int32)}
    with pytest.raises(
        LoadError, match=r"Llama4TextExperts\) are stored quantized .* No layout of these experts is read"
    ):
        inspect(edit(tmp_path, lambda tensors: tensors.update(codes)))


def test_all_experts_of_a_layer_in_one_fp8_tensor(tmp_path: Path) -> None:
    write_moe(moe_model("mixtral"), tmp_path, FAMILIES["fp8-block"], wanted=lambda name: "experts" not in name)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    fused = {name: torch.zeros(4, 192, 64).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(4, 6, 2)}
    drop = without("model.layers.0.block_sparse_moe.experts")
    with pytest.raises(LoadError, match=r"gate_up_proj is float8_e4m3fn \[4, 192, 64\]: experts .* MixtralExperts"):
        inspect(edit(tmp_path, lambda tensors: (drop(tensors), tensors.update(fused))))


@pytest.mark.parametrize("experts", ["quantized", "dense"])
def test_layers_beyond_the_last_are_left_out_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: str
) -> None:
    """DeepSeek-V3 ships a layer that predicts a second token; which one it is, Transformers' class says."""
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    write_moe(
        moe_model("deepseek_v3"), tmp_path, FAMILIES["fp8-block"],
        wanted=lambda name: experts == "quantized" or ".experts." not in name,
    )  # fmt: skip

    def add(tensors: dict[str, Tensor]) -> None:
        last = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
        tensors.update({name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in last.items()})

    model = load_model(edit(tmp_path, add), dtype="float32", kernel="reference")
    ids = torch.arange(3, 13)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, dense_twin(tmp_path)(ids).logits)
    ignored = inspect(tmp_path).data()["ignored"]
    assert set(ignored.values()) == {"not used by this model, says Transformers"}
    assert any("layers.2.mlp.experts" in name for name in ignored)


def test_a_kernel_that_cannot_multiply_experts_names_one(stacked: Path) -> None:
    with pytest.raises(LoadError, match=r"experts\.0\.gate_up_proj: no kernel for e2m1 g32"):
        load_model(stacked, kernel="wna16")


def test_a_lost_configuration(awq: Path) -> None:
    config = json.loads((awq / "config.json").read_text())
    del config["quantization_config"]
    (awq / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="belong to no module"):
        load_model(awq)
