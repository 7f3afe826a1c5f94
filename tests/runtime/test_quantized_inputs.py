"""Checkpoints that want inputs, keys or values quantized: what is executed, what is left out, what the report says.

Rounded inputs answer to the last bit of the layer before, so a writer's logits are reproduced with its arithmetic only,
which is the reference's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from quant.linear import QuantLinear
from runtime import LLM, LoadError, assembly, inspect, load_model
from runtime.cli import build_parser

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
INT8 = CHECKPOINTS / "llmcompressor--w8a8-int8"
STATIC = CHECKPOINTS / "compressed-tensors--fp8-static"
BLOCKS = CHECKPOINTS / "transformers-fp8--block128"


def distance(model: nn.Module, folder: Path, **arguments: Any) -> Tensor:
    reference = load_file(folder / "reference.safetensors")
    with torch.inference_mode():
        logits = model(reference["input_ids"], **arguments).logits.float()
    return (logits - reference["logits"].float()).abs()


@pytest.mark.parametrize("folder", [INT8, STATIC], ids=lambda folder: folder.name)
def test_weight_only_drops_what_the_writer_does_to_inputs(folder: Path) -> None:
    model = load_model(folder, weight_only=True)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert all(layer.scheme.activation is None for layer in layers)
    assert all(layer.quant_weight is not None and layer.quant_weight.input_scale is None for layer in layers)
    assert distance(load_model(folder, kernel="reference"), folder).mean() < 0.01 < distance(model, folder).mean() / 2


def test_the_report_says_what_happens_to_inputs() -> None:
    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_total_tokens": 64, "startup_check": False}
    executed = LLM(str(INT8), **options).report
    assert "of 14 linear layers quantized, as the checkpoint says: int8 per token" in executed
    dropped = LLM(str(INT8), weight_only=True, **options).report
    assert "of 14 linear layers left alone (weight only); the checkpoint says: int8 per token" in dropped
    for text in (str(inspect(INT8)), str(inspect(INT8, weight_only=True))):
        assert "int8 per token" in text
    modules = inspect(INT8, weight_only=True).data()["modules"]
    assert {(module["inputs"], module["inputs_dropped"]) for module in modules if module["bits"] == 8} == {
        (None, "int8 per token")
    }


def test_no_graph_with_rows_left_over_where_all_tokens_share_a_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def choose(*arguments: Any) -> str:
        asked.append(arguments[-1])
        return "not here"

    monkeypatch.setattr(assembly, "choose_capture", choose)
    shared = tmp_path / "shared"
    shutil.copytree(INT8, shared)
    config = json.loads((shared / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"]["strategy"] = "tensor"
    (shared / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_total_tokens": 64, "startup_check": False}
    reports = [LLM(str(shared), **options).report, LLM(str(shared), weight_only=True, **options).report]
    LLM(str(INT8), **options)
    assert asked == [True, False, False]
    assert ["one scale for all tokens" in report for report in reports] == [True, False]


def test_fp8_does_on_a_cpu_what_transformers_does_there_unless_told_otherwise() -> None:
    assert distance(load_model(BLOCKS, device="cpu", kernel="reference"), BLOCKS).mean() < 0.01
    executed = load_model(BLOCKS, device="cpu", weight_only=False)
    assert distance(executed, BLOCKS).mean() > 0.02
    layer = executed.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, QuantLinear)
    assert str(layer.scheme.activation) == "fp8 per 128 inputs"


def test_quantized_inputs_and_floats_have_a_fast_kernel_on_a_cpu() -> None:
    for name in (INT8, BLOCKS, CHECKPOINTS / "bitsandbytes--fp4"):
        modules = inspect(name, device="cpu").data()["modules"]
        assert {module["kernel"] for module in modules if module["bits"] <= 8} == {"cpu"}
    with pytest.raises(LoadError, match="wna16"):
        load_model(INT8, kernel="wna16", device="cpu")


def test_the_command_line_knows_both_ways() -> None:
    parse = build_parser().parse_args
    found = [parse(["inspect", "demo", *flag]).weight_only for flag in ([], ["--weight-only"], ["--no-weight-only"])]
    assert found == [None, True, False]


class QuantizedCache(DynamicCache):
    """Keys and values in FP8, as the writer caches them, with the scales that are stored."""

    def __init__(self, scales: dict[str, Tensor], names: tuple[str, str], config: Any) -> None:
        super().__init__(config=config)
        self.scales, self.names = scales, names

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        rounded = []
        for tensor, name in zip((key, value), self.names, strict=True):
            scale = self.scales[f"model.layers.{layer}.self_attn.{name}"]
            rounded.append(
                ((tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(tensor.dtype) * scale).to(tensor.dtype)
            )
        return super().update(*rounded, layer, *args, **options)


def test_scales_of_the_kv_cache_are_no_weights_and_all_that_is_left_out() -> None:
    folder = CHECKPOINTS / "llmcompressor--fp8-static-kv"
    plan = inspect(folder).plan
    assert set(plan.account.ignored) == {f"model.layers.{n}.self_attn.{x}_scale" for n in (0, 1) for x in "kv"}
    model = load_model(folder, kernel="reference")
    cache = QuantizedCache(load_file(folder / "model.safetensors"), ("k_scale", "v_scale"), model.config)
    with_cache = distance(model, folder, past_key_values=cache)
    assert with_cache.max() < 0.1
    assert with_cache.mean() < 0.01 < distance(model, folder).mean() / 2


def test_modelopt_keeps_them_elsewhere() -> None:
    ignored = inspect(CHECKPOINTS / "modelopt--fp8-kv").plan.account.ignored
    assert set(ignored) == {f"model.layers.{n}.self_attn.{x}_proj.{x}_scale" for n in (0, 1) for x in "kv"}
    assert all("KV cache" in reason for reason in ignored.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "compressed-tensors-0.12--w4-marlin24",
            r"format 'marlin-24' \(quantization_config: format\) is not supported",
        ),
        ("llmcompressor--quip-w4a16", r"transform_config: u \(hadamard\) transforms activations.*location: output"),
    ],
)
def test_checkpoints_that_would_compute_garbage_are_refused_before_weights_are_read(
    name: str, message: str, tmp_path: Path
) -> None:
    shutil.copy(CHECKPOINTS / name / "config.json", tmp_path)
    save_file({"model.norm.weight": torch.ones(256)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=message):
        inspect(tmp_path)


def test_a_scale_of_zero_would_make_every_answer_nan(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STATIC, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.input_scale"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        LoadError, match=r"layers\.0\.mlp\.up_proj: the scale of all its inputs comes to 0\..*--weight-only"
    ):
        load_model(folder)
    assert load_model(folder, weight_only=True) is not None


def test_modelopt_with_nothing_but_its_side_file(tmp_path: Path) -> None:
    source = CHECKPOINTS / "modelopt--fp8-pb-wo"
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    plan = inspect(folder, quantization="modelopt").plan
    assert plan.checkpoint.quantization_source == "hf_quant_config.json"
    assert len(plan.quantized) == 14
    assert torch.equal(distance(load_model(folder), folder), distance(load_model(source), source))


def test_a_missing_companion_is_named(tmp_path: Path) -> None:

    folder = Path(shutil.copytree(CHECKPOINTS / "bitsandbytes--fp4", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight.quant_map")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"model\.layers\.0\.mlp\.up_proj\.weight\.quant_map is missing"):
        load_model(folder)


@pytest.mark.parametrize("stored", ["packed", "fp8"])
def test_a_quantized_output_layer_is_no_longer_tied_to_the_embedding(tmp_path: Path, stored: str) -> None:
    name = {"packed": "compressed-tensors--lm-head-too", "fp8": "transformers-fp8--tensor-static"}[stored]
    folder = Path(shutil.copytree(CHECKPOINTS / name, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    if stored == "fp8":
        config["quantization_config"]["modules_to_not_convert"] = []
        tensors = load_file(folder / "model.safetensors")
        weight = tensors["lm_head.weight"].float()
        scale = weight.abs().max() / 448
        tensors |= {"lm_head.weight": (weight / scale).to(torch.float8_e4m3fn), "lm_head.weight_scale_inv": scale}
        tensors["lm_head.activation_scale"] = torch.ones_like(scale)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    logits = []
    for tied in (False, True):
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        model = load_model(folder)
        assert isinstance(model.get_submodule("lm_head"), QuantLinear)
        with torch.inference_mode():
            logits.append(model(torch.arange(5)[None]).logits)
    assert torch.equal(*logits)
