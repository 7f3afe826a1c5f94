"""``relinear verify``: right kernels pass for every kind of scheme, and each way to be wrong is found where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attention.base import AttentionBackend
from attention.hf import read_specs
from attention.registry import select
from quant.base import QuantMethod, QuantWeight
from quant.kernels.native import build
from quant.kernels.reference import ReferenceKernel
from quant.linear import QuantLinear
from quant.reference import dequantize
from runtime import inspect, load_model
from runtime.checkpoint import Checkpoint
from runtime.cli import main
from runtime.errors import InvalidRequest
from runtime.plan import make_plan
from runtime.verify import Verification, verify
from runtime.verify_model import LARGEST_KL
from runtime.weights import StoredWeights
from tests.formats import CHECKPOINTS
from tests.plugins import installed_package
from tests.tiny_models import tiny_model

AWQ = CHECKPOINTS / "autoawq--gemm-g128"
BAD = "model.layers.1.mlp.up_proj"
Report = Callable[[str], None]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("autoawq--gemm-g128", None),
        ("autoawq--gemm-g128", "reference"),
        ("auto-gptq--w4g32-desc", None),
        ("gptqmodel--gptq-w4-dynamic", None),
        ("bitsandbytes--int8", None),
        ("llmcompressor--w8a8-int8", None),
        ("compressed-tensors--fp8-block", None),
        ("compressed-tensors--mxfp4a16", None),
    ],
)
def test_what_is_right_passes(name: str, kernel: str | None, report: Report) -> None:
    found = verify(CHECKPOINTS / name, kernel=kernel, against_transformers=True, tokens=48)
    assert found.passed, str(found)
    assert len(found.kinds) >= 4, "q and k, gate and down differ in shape"
    assert {reach.dtype for reach in found.kinds[0].reaches} == {torch.float32, torch.bfloat16, torch.float16}
    whole = found.comparison
    assert whole is not None
    assert whole.kl < LARGEST_KL / 100, "the bound is a hundred times what rounding leaves"
    assert list(whole.hidden) == ["model.layers.0", "model.layers.1"]
    assert set(whole.linears) == {module.name for module in found.plan.quantized}
    largest = max(reach.share for kind in found.kinds for reach in kind.reaches)
    assert largest > 0.01, "the bounds are not far from what is reached"
    report(f"verify    {name:<32} {largest:.2f} of the bound at most, KL {whole.kl:.0e}")


def test_the_command_and_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    assert main(["verify", "demo", "--against-transformers", "--text", str(text), "--tokens", "40", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"]
    assert data["against_transformers"]["tokens"] == 40
    assert data["against_transformers"]["top1"] == 1
    assert data["against_transformers"]["text"] == "text.txt"
    assert "paged" in data["against_transformers"]["attention"]
    assert sum(kind["layers"] for kind in data["kinds"]) == 56
    assert len(data["sha256"]) == 64
    assert set(data["files"]) == {"config.json", "model.safetensors"}
    assert "torch" in dict(data["environment"])


def test_a_kernel_that_is_wrong_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with installed_package(tmp_path):
        command = ["verify", str(AWQ), "--against-transformers", "--tokens", "32"]
        assert main([*command, "--kernel", "toy"]) == 0
        assert capsys.readouterr().out.endswith("\n\nPASSED\n")
        assert main([*command, "--kernel", "toy-wrong"]) == 1
        shown = capsys.readouterr().out
    assert shown.endswith("\n\nFAILED\n")
    assert "\nFAIL       toy-wrong: 4 x 256→256 int4 g128" in shown
    assert "\nfirst bad  linear layer model.layers.0.self_attn.q_proj: " in shown
    assert "\nfirst bad  decoder layer model.layers.0: " in shown


def test_one_wrong_code_in_a_kernels_own_arrangement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: ReferenceKernel, weight: QuantWeight) -> QuantWeight:
        q = weight.q.clone()
        q[5, 7] ^= 2
        return replace(weight, q=q)

    monkeypatch.setattr(ReferenceKernel, "prepare", prepare)
    found = verify(AWQ, kernel="reference")
    assert not any(kind.passed for kind in found.kinds)


def test_a_layer_that_is_repacked_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = QuantLinear.finish

    def wrong(self: QuantLinear, method: QuantMethod) -> None:
        finish(self, method)
        if self.name == BAD:
            assert self.quant_weight is not None
            self.quant_weight = replace(self.quant_weight, scale=self.quant_weight.scale * 1.01)

    monkeypatch.setattr(QuantLinear, "finish", wrong)
    found = verify(AWQ, kernel="reference", against_transformers=True, tokens=32)
    assert all(kind.passed for kind in found.kinds), "each kind by itself is right"
    assert not found.passed
    assert found.comparison is not None
    assert found.comparison.first_bad_linear == BAD
    assert found.comparison.first_bad_layer == "model.layers.1"


@pytest.mark.parametrize("asked", [None, "reference"])
def test_wrong_attention_is_found_though_every_linear_is_right(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the backend that the engine would choose, or of the one that is asked for."""
    chosen = type(select(read_specs(inspect(AWQ).plan.config), torch.device("cpu"), asked, build).backend)
    attend = chosen.forward

    def wrong(self: AttentionBackend, layer: int, *rest: Any) -> Tensor:
        y: Tensor = attend(self, layer, *rest)  # type: ignore[arg-type]
        return y * 1.01 if layer == 1 else y

    monkeypatch.setattr(chosen, "forward", wrong)
    whole = verify(AWQ, against_transformers=True, tokens=32, device="cpu", attention_backend=asked).comparison
    assert whole is not None
    assert whole.attention.startswith(chosen.name)
    assert not whole.passed
    assert whole.first_bad_linear is None
    assert whole.first_bad_layer == "model.layers.1"


def damaged(folder: Path, tensor: str, value: float) -> Verification:
    shutil.copytree(AWQ, folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return verify(folder, against_transformers=True)


@pytest.mark.parametrize("tensor", [f"{BAD}.scales", "model.norm.weight"])
def test_values_that_are_no_numbers_are_damage(tensor: str, tmp_path: Path) -> None:
    found = damaged(tmp_path / "damaged", tensor, torch.nan)
    assert not found.passed
    assert [entry.partition(":")[0] for entry in found.damage] == [tensor]
    assert "1 of" in found.damage[0]
    assert found.data()["damage"] == list(found.damage)
    assert found.comparison is None


def test_an_unquantized_model_is_compared_as_a_whole() -> None:
    found = verify("demo-bf16", against_transformers=True, tokens=32)
    assert found.passed
    assert found.kinds == ()


def test_options_that_cannot_be() -> None:
    with pytest.raises(InvalidRequest, match="at least 2"):
        verify(AWQ, against_transformers=True, tokens=1)


def test_an_attention_that_cannot_run_is_refused_and_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(AWQ), "--against-transformers", "--tokens", "32", "--device", "cpu"]
    assert main([*command, "--attention-backend", "paged"]) != 0
    assert "paged: its kernels need a CUDA device" in capsys.readouterr().err
    assert main([*command, "--attention-backend", "reference"]) == 0
    assert "attention reference, paged" in capsys.readouterr().out


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in float32: ``Conv1D`` and a head that shares the embedding's weight."""
    folder = tmp_path_factory.mktemp("dense")
    for name in ("gpt2", "llama-tied-rope3"):
        tiny_model(name).save_pretrained(folder / name)
    return folder


ON_LOAD = [
    ("gpt2", "int4", {"group_size": 16}),
    ("gpt2", "bitsandbytes", {"load_in_8bit": True}),
    ("llama-tied-rope3", "fp8", {}),
    ("llama-tied-rope3", "int4", {"quantize_lm_head": True}),
]


@pytest.mark.parametrize(("name", "quantization", "options"), ON_LOAD)
def test_what_is_quantized_while_loading_is_verified_as_it_is_loaded(
    name: str, quantization: str, options: dict[str, Any], dense: Path
) -> None:
    """In bfloat16, to which the file's numbers are rounded first."""
    asked = {"quantization": quantization, "quantization_config": options, "dtype": "bfloat16", "kernel": "reference"}
    plan = make_plan(Checkpoint.open(dense / name), **asked)  # type: ignore[arg-type]
    weights, loaded = StoredWeights.of(plan), load_model(dense / name, **asked)  # type: ignore[arg-type]
    assert plan.quantized
    for module in plan.quantized:
        layer = loaded.get_submodule(module.name)
        assert isinstance(layer, QuantLinear)
        assert layer.quant_weight is not None
        assert torch.equal(dequantize(weights.quantized(module)), dequantize(layer.quant_weight))
        bias = weights.bias(module)
        assert bias is None or layer.bias is None or torch.equal(bias, layer.bias)
    found = verify(dense / name, against_transformers=True, tokens=24, **asked)
    assert found.passed, str(found)
    assert found.comparison is not None
    assert len(found.comparison.linears) == len(plan.quantized)


def test_a_dense_conv1d_model_is_compared_as_a_whole(dense: Path) -> None:
    assert verify(dense / "gpt2", against_transformers=True, tokens=24).passed
