"""``--lm-head-quantization``: the head of any checkpoint in int8, and nothing but the head."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM

from quant.linear import QuantLinear
from runtime import LLM, SamplingParams, inspect, load_model
from runtime.cli import main
from runtime.errors import LoadError
from runtime.head import plan_head
from runtime.verify import verify
from tests.formats import CHECKPOINTS
from tests.tiny_models import tiny_model

AWQ = CHECKPOINTS / "autoawq--gemm-g128"
QUANTIZED_HEAD = CHECKPOINTS / "gptqmodel--gptq-w4-lm-head"
IDS = torch.tensor([[5, 17, 40, 3, 88, 21, 9, 60]])
HEAD: dict[str, Any] = {"lm_head_quantization": "int8"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense ones: with a head of its own, with one that is the embedding, and with one that has a bias."""
    found = {"awq": AWQ}
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    phi = PhiForCausalLM(PhiConfig(**sizes))
    nn.init.normal_(phi.lm_head.bias)
    for name in ("llama", "llama-tied-rope3", "phi"):
        found[name] = tmp_path_factory.mktemp("head") / name
        (phi if name == "phi" else tiny_model(name)).save_pretrained(found[name])
    return found


def rounded(weight: Tensor) -> Tensor:
    """int8 with one scale an output: the largest magnitude is 127.5."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("name", ["llama", "llama-tied-rope3", "phi", "awq"])
def test_the_head_is_rounded_and_nothing_else(folders: dict[str, Path], name: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "kernel": "reference" if name == "awq" else None}
    dense = load_model(folders[name], **options)
    embedding = dense.get_input_embeddings().weight.clone()
    found = load_model(folders[name], **options, **HEAD)
    assert isinstance(found.lm_head, QuantLinear)
    assert torch.equal(found.get_input_embeddings().weight, embedding)
    with torch.inference_mode():
        plain = dense(IDS).logits
        dense.lm_head.weight = nn.Parameter(rounded(dense.lm_head.weight.detach()))
        torch.testing.assert_close(found(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (found(IDS).logits - plain).abs().max() > 1e-3, "the test would not notice a dense head"


def test_with_a_checkpoint_that_is_quantized_while_it_loads(folders: dict[str, Path]) -> None:
    for name in ("llama", "llama-tied-rope3"):
        found = load_model(folders[name], dtype="float32", quantization="int4", **HEAD)
        assert found.lm_head.scheme.kind.bits == 8
        assert found.model.layers[0].mlp.up_proj.scheme.kind.bits == 4
        exact = load_model(folders[name], dtype="float32", quantization="int4")
        exact.lm_head.weight = nn.Parameter(rounded(exact.lm_head.weight.detach()))
        with torch.inference_mode():
            torch.testing.assert_close(found(IDS).logits, exact(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_report_the_sizes_and_the_inspection_say_so() -> None:
    plain, found = inspect("demo"), inspect("demo", **HEAD)
    (head,) = (module for module in found.data()["modules"] if module["name"] == "lm_head")
    assert (head["format"], head["bits"], head["kernel"]) == ("rounded", 8, found.data()["modules"][0]["kernel"])
    assert "rounded to int8 (--lm-head-quantization)" in str(found)
    tied = 4096 * (256 + 2)  # codes, and scales in bfloat16; the embedding stays
    assert found.plan.weight_bytes - plain.plan.weight_bytes == tied
    llm = LLM("demo", max_total_tokens=64, **HEAD)
    assert "for 1 linear layers" in llm.report
    assert "the output head, rounded to int8 (--lm-head-quantization)" in llm.report
    (output,) = llm.generate(["import "], SamplingParams(temperature=0, max_tokens=4))
    assert len(output.outputs[0].token_ids) == 4


def test_it_is_verified_like_any_other_layer() -> None:
    found = verify("demo", **HEAD)
    assert found.passed
    assert "lm_head" in {kind.module.name for kind in found.kinds}


def test_what_it_costs_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "diff", "demo", "--text", "demo", "--tokens", "512", "--dtype", "float32", "--no-layers"]
    assert main([*words, "--lm-head-quantization", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidate"] == "demo lm_head_quantization=int8 dtype=float32"
    assert 1e-6 < found["mean_kl"]["value"] < 1e-3


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (QUANTIZED_HEAD, HEAD, r"lm_head is quantized already \(int8 .*Leave the option out"),
        (AWQ, {"lm_head_quantization": "int3"}, "int3: unknown; choose one of int8"),
        (AWQ, HEAD | {"kernel": "wna16"}, "lm_head: no kernel for int8|runs on a CUDA device"),
    ],
)
def test_what_cannot_be_is_refused(model: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        inspect(model, **options)


def test_a_model_without_a_head_is_refused() -> None:
    model = SimpleNamespace(get_output_embeddings=lambda: None, named_modules=lambda: [("", None)])
    with pytest.raises(LoadError, match="no output head that is a linear layer"):
        plan_head(model, {}, torch.float32, torch.device("cpu"), "int8", None)
