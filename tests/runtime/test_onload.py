"""A dense checkpoint, quantized while it loads: in the model, in memory, on the command line and in the engine."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quant import onload
from quant.base import LinearShape
from quant.linear import QuantLinear
from quant.reference import dequantize
from runtime import LLM, SamplingParams, inspect, load_model
from runtime.checkpoint import Checkpoint
from runtime.cli import build_parser
from runtime.errors import LoadError
from runtime.loader import load
from runtime.plan import WORKING_BYTES, make_plan
from runtime.report import load_report
from runtime.verify import verify
from tests.planned import assert_bytes_as_planned
from tests.tiny_models import tiny_model

WAYS: list[tuple[str, dict[str, Any]]] = [
    ("int4", {}),
    ("int3", {"group_size": 16, "symmetric": True}),
    ("int8", {"group_size": -1}),
    ("fp8", {}),
    ("mxfp4", {}),
    ("w8a8_int8", {}),
    ("bitsandbytes", {}),
    ("bitsandbytes", {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
    ("bitsandbytes", {"load_in_8bit": True}),
]
IDS = torch.tensor([[5, 17, 40, 3, 88, 21, 9, 60]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense checkpoints: untied, tied, ``Conv1D``, and with experts stored one by one and in stacks."""
    found = {}
    for name in ("llama", "llama-tied-rope3", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"):
        found[name] = tmp_path_factory.mktemp("dense") / name
        tiny_model(name).save_pretrained(found[name], max_shard_size="40KB")
    return found


def by_hand(folder: Path, name: str, options: dict[str, Any], *, head: bool = False) -> nn.Module:
    """The dense model of plain Transformers with every weight quantized and dequantized, input quantization left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    method = onload.create(name, options, {}, torch.float32)
    assert method is not None

    def rounded(weight: Tensor) -> Tensor:
        shape = LinearShape(weight.shape[1], weight.shape[0])
        return dequantize(method.quantize(weight, method.scheme(shape), shape))

    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            module.weight = nn.Parameter(rounded(module.weight.detach().t()).t())
        elif isinstance(module, nn.Linear) and (path != "lm_head" or head):
            module.weight = nn.Parameter(rounded(module.weight.detach()))
        elif path.endswith(".experts"):
            # Matrices of their own in the file, gate and up too, but gpt-oss'.
            for parameter, matrices in (("gate_up_proj", 1 if module.is_transposed else 2), ("down_proj", 1)):
                stack = getattr(module, parameter).detach()
                stack = stack.transpose(1, 2) if module.is_transposed else stack
                exact = torch.stack([torch.cat([rounded(part) for part in expert.chunk(matrices)]) for expert in stack])
                setattr(module, parameter, nn.Parameter(exact.transpose(1, 2) if module.is_transposed else exact))
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


LAYERS = {
    "llama": 21,
    "gpt2": 12,
    "mixtral": 3 * (4 + 4 * 3),
    "qwen3_moe": 3 * 4 + 3 + 2 * 4 * 3,
    "gpt_oss": 3 * (4 + 4 * 2),
}
"""Quantized ones. Experts by their matrices: ``w1``, ``w2`` and ``w3``; of gpt-oss gate and up are one."""


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize(("name", "options"), WAYS)
def test_the_model_is_the_dense_one_with_its_weights_rounded(
    folders: dict[str, Path], model: str, name: str, options: dict[str, Any]
) -> None:
    found = load_model(
        folders[model], dtype="float32", quantization=name, quantization_config=options, weight_only=True
    )
    layers = [module for module in found.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == LAYERS[model]
    assert all(layer.quant_weight is not None for layer in layers)
    torch.testing.assert_close(logits(found), logits(by_hand(folders[model], name, options)), rtol=1e-4, atol=1e-4)


def test_the_test_model_feels_quantization(folders: dict[str, Path]) -> None:
    for model in ("llama", "gpt2"):
        dense = logits(AutoModelForCausalLM.from_pretrained(folders[model], dtype=torch.float32))
        assert (logits(by_hand(folders[model], "int8", {"group_size": -1})) - dense).abs().max() > 3e-3


def test_inputs_are_quantized_unless_weight_only(folders: dict[str, Path]) -> None:
    for name in ("fp8", "w8a8_int8"):
        plans = [inspect(folders["llama"], quantization=name, weight_only=only) for only in (None, True)]
        inputs = [{module["inputs"] for module in plan.data()["modules"]} for plan in plans]
        assert inputs[0] == {None, f"{name.removeprefix('w8a8_')} per token"}
        assert inputs[1] == {None}


# what is left alone


@pytest.mark.parametrize("model", ["llama", "llama-tied-rope3"])
def test_the_head_is_dense_unless_asked_for(folders: dict[str, Path], model: str) -> None:
    head = {"quantize_lm_head": True}
    for options in ({}, head):
        found = load_model(folders[model], dtype="float32", quantization="int4", quantization_config=options)
        assert isinstance(found.lm_head, QuantLinear) == bool(options)
        assert isinstance(found.model.embed_tokens, nn.Embedding)
        expected = by_hand(folders[model], "int4", {}, head=bool(options))
        torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"])
def test_verify_finds_the_same_weights_of_experts(folders: dict[str, Path], model: str) -> None:
    found = verify(folders[model], quantization="int4", against_transformers=True, tokens=24)
    assert found.passed, str(found)
    assert found.comparison
    assert any(".experts.3." in name for name in found.comparison.linears)


def test_experts_in_another_layout_are_refused_by_name(tmp_path: Path) -> None:
    """Llama 4 weights the tokens first and multiplies all experts at once."""
    tiny_model("llama4").save_pretrained(tmp_path)
    for name in ("int4", "bitsandbytes"):
        with pytest.raises(
            LoadError, match=r"feed_forward\.experts \(Llama4TextExperts\) .* without --quantization, or"
        ):
            inspect(tmp_path, quantization=name)
    assert inspect(tmp_path).plan.method is None


# memory


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive; ``peak`` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel() > 1:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
                self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return result


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    tiny_model("llama", dtype=torch.bfloat16, **sizes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["int4", "fp8", "bitsandbytes"])
def test_the_peak_is_the_final_model_and_one_layer(
    many_layers: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (onload.rounding, onload.bnb):
        monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", 64 * 256)
    plan = make_plan(Checkpoint.open(many_layers), quantization=name)
    layer = max(module.bf16_bytes for module in plan.quantized)
    with LiveBytes() as memory:
        load(plan)
    assert memory.peak > plan.weight_bytes / 2, "nothing was measured"
    # A part of the layer takes float32 copies; in the end a kernel may pad what it rearranges.
    allowed = plan.weight_bytes * 1.1 + layer + 64 * 256 * 64
    assert allowed < plan.bf16_bytes * 0.75, "a dense model would pass"
    assert memory.peak < allowed


def test_the_report_tells_what_was_measured(many_layers: Path) -> None:
    loaded = load(make_plan(Checkpoint.open(many_layers), quantization="int8"))
    report = load_report(loaded)
    assert "int8 weights, group 128, symmetric, rounded to nearest while loading (the checkpoint is dense)" in report
    if sys.platform == "linux":
        assert "without pages of files" in report
        assert loaded.peak_growth is not None


@pytest.mark.parametrize(("kind", "count"), [("mixtral", 3), ("gpt_oss", 6)])
def test_the_peak_of_experts(kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix of one expert at a time, or one tensor of all of a layer where the file has them so."""
    monkeypatch.setattr(onload.rounding, "WEIGHTS_AT_ONCE", 64 * 256)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": count, "num_local_experts": 8}
    layers = {"layer_types": ["full_attention"] * count} if kind == "gpt_oss" else {}
    tiny_model(kind, dtype=torch.bfloat16, **sizes, **layers).save_pretrained(tmp_path)
    plan = make_plan(Checkpoint.open(tmp_path), quantization="int4")
    largest = 2 * 128 * 128 * (2 * 8 if kind == "gpt_oss" else 1)
    assert plan.peak_bytes == plan.weight_bytes + largest + WORKING_BYTES
    with LiveBytes() as memory:
        load(plan)
    allowed = plan.weight_bytes * 1.1 + largest + 64 * 256 * 64
    assert allowed < plan.bf16_bytes * 0.75, "a dense model would pass"
    assert plan.weight_bytes / 2 < memory.peak < allowed


# what cannot be


def test_nan_names_the_layer_and_the_count(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of 1536 values are NaN"):
        load_model(tmp_path, quantization="int4")


def test_a_damaged_dense_checkpoint_is_refused_as_ever(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for change, message in (
        ({name: tensors[name][:-1].clone()}, r"up_proj.weight is float32 \[47, 32\], but this layer needs"),
        ({name: tensors[name].to(torch.int8)}, "quantized values"),
        ({}, "1 parameters of the model are stored nowhere"),
    ):
        kept = {key: value for key, value in tensors.items() if key != name}
        save_file(kept | change, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(LoadError, match=message):
            load_model(tmp_path, quantization="int4")


def test_options_for_dense_checkpoints_are_refused_for_quantized_ones() -> None:
    for options in ({"quantization": "int4"}, {"quantization_config": {"group_size": 64}}):
        with pytest.raises(
            LoadError, match=r"(--quantization int4|group_size) is for quantizing a dense.*already: awq"
        ):
            inspect("demo", **options)
    with pytest.raises(LoadError, match=r"--quantization fp8 was asked for.*'awq'"):
        inspect("demo", quantization="fp8")


# the faces


def test_flags_become_options() -> None:
    words = ["serve", "--model-path", "M", "--load-in-4bit", "--bnb-4bit-quant-type", "fp4"]
    words += ["--bnb-4bit-use-double-quant"]
    assert build_parser().parse_args(words).quantization_config == {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    words = ["inspect", "M", "-q", "int8", "--group-size", "64", "--asymmetric", "--quantize-lm-head"]
    options = build_parser().parse_args(words).quantization_config
    assert options == {"group_size": 64, "symmetric": False, "quantize_lm_head": True}
    assert build_parser().parse_args(["inspect", "M"]).quantization_config is None


def test_inspect_shows_the_plan_of_flags(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "runtime", "inspect", str(folders["gpt2"]), "-q", "int4", "--group-size", "48"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "transformer.h.{0-2}.attn.c_attn 32→96" in shown
    assert "group 32, because 48 does not divide 32 inputs" in shown
    data = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    quantized = [module for module in data["modules"] if module["format"] != "dense"]
    assert len(quantized) == 12
    assert {module["bits"] for module in quantized} == {4}


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_the_engine_generates_what_the_model_says(folders: dict[str, Path], name: str, options: dict[str, Any]) -> None:
    llm = LLM(
        folders["llama"], quantization=name, quantization_config=options, dtype="float32", skip_tokenizer_init=True,
        max_total_tokens=256, max_model_len=64, startup_check=False,
    )  # fmt: skip
    assert_bytes_as_planned(llm.engine.loaded)
    prompt = IDS[0].tolist()
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    found = llm.generate([prompt], params)[0].outputs[0].token_ids
    model = copy.deepcopy(load_model(folders["llama"], dtype="float32", quantization=name, quantization_config=options))
    with torch.inference_mode():
        for token in found:
            best = model(torch.tensor([prompt])).logits[0, -1]
            assert best[token] > best.max() - 1e-3
            prompt.append(token)
