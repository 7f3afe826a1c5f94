"""Models with latent attention through the engine: quantized projections and caches, graphs, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attention.hf import read_layers
from attention.kv_cache import StaticScales
from quant.linear import QuantLinear
from runtime import LLM, SamplingParams, assembly, inspect, load_model, verify_model
from runtime.checkpoint import Checkpoint
from runtime.config import EngineConfig
from runtime.evaluation.scorer import Scorer
from runtime.kv_storage import plan_storage
from runtime.plan import make_plan
from runtime.weights import StoredWeights
from tests.greedy import greedy_alone
from tests.tiny_models import VOCABULARY, tiny_model

LAYERS, HEADS, RANK, ROTATED = 3, 4, 16, 4
ROWS = HEADS * (8 + 10)
PROMPTS = [[(7 * i * i + 5 * place) % VOCABULARY for i in range(n)] for place, n in enumerate((9, 3, 14))]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
OPTIONS: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "max_total_tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("latent")
    tiny_model("deepseek_v3").save_pretrained(path)
    return str(path)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_prompt_that_starts_in_the_same_step_finds_the_latents_of_the_other(folder: str, backend: str) -> None:
    """The first is expanded; what is left of the second is absorbed, and sees blocks that the first has just been given."""
    model = load_model(folder, dtype="float32")
    prompts = [PROMPTS[2], PROMPTS[2], [*PROMPTS[2][:9], 5]]
    llm = LLM(folder, block_size=4, attention_backend=backend, **OPTIONS)
    answers = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    assert llm.engine.stats().prefix_hits == 12 + 8
    assert answers == [greedy_alone(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("quantization", ["int4", "w8a8_int8"])
def test_a_quantized_projection_is_dense_in_the_engine_and_nowhere_else(folder: str, quantization: str) -> None:
    model = load_model(folder, quantization=quantization, dtype="float32", weight_only=True)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.kv_b_proj"), QuantLinear)
    expected = [greedy_alone(model, prompt, 6) for prompt in PROMPTS]
    llm = LLM(folder, quantization=quantization, weight_only=True, max_num_batched_tokens=7, **OPTIONS)
    assert tokens_of(llm) == expected

    loaded = llm.engine.loaded
    for layer in range(LAYERS):
        projection = loaded.model.get_submodule(f"model.layers.{layer}.self_attn.kv_b_proj")
        assert isinstance(projection, nn.Linear)
        planned = loaded.plan.modules[f"model.layers.{layer}.self_attn.kv_b_proj"]
        assert planned.nbytes == projection.weight.nbytes == ROWS * RANK * 4
    assert f"torch for {LAYERS} linear layers (dequantized: latents are kept" in llm.report
    shown = {m["name"]: m for m in inspect(folder, quantization=quantization, dtype="float32").data()["modules"]}
    assert shown["model.layers.1.self_attn.kv_b_proj"]["kernel"] == "torch"


def test_the_report_prints_what_a_token_takes(folder: str) -> None:
    llm = LLM(folder, **OPTIONS)
    assert f", {LAYERS * (RANK + ROTATED) * 4} B a token" in llm.report
    assert f"{LAYERS} x 4 heads, 1 kv heads, dim 20/16, scale {12**-0.5:.6g}, latent" in llm.report


def test_verify_compares_the_projection_with_the_file(folder: str) -> None:
    plan = make_plan(Checkpoint.open(folder), dtype="float32", device="cpu", quantization="int4")
    found = verify_model.compare(StoredWeights.of(plan), PROMPTS[2])
    assert found.passed
    assert "model.layers.2.self_attn.kv_b_proj" in found.linears


def test_graphs_of_decoding_steps(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens_of(LLM(folder, **OPTIONS))
    monkeypatch.setattr(assembly, "choose_capture", lambda *_: lambda step: step)
    llm = LLM(folder, **OPTIONS)
    assert llm.engine.runner.graphs is not None
    assert tokens_of(llm) == expected


@pytest.mark.parametrize("stored", ["int8", "fp8_e4m3"])
def test_latents_of_8_bits_lose_what_keys_of_8_bits_lose(
    folder: str, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss() -> float:
        """Root mean square of what rounding changes in the logits, as a share of theirs."""
        configs = [EngineConfig(folder, dtype="float32", tokenizer="demo", kv_cache_dtype=n) for n in ("fp32", stored)]
        exact, rounded = (torch.cat([scorer.logits(p) for p in PROMPTS]) for scorer in map(Scorer, configs))
        return float((rounded - exact).norm() / exact.norm())

    latent = loss()
    monkeypatch.setattr("attention.latent.may_expand", lambda module: False)
    expanded = loss()
    assert 0 < latent < 3 * expanded, "a row of both parts has one scale"


@pytest.mark.parametrize("stored", ["int8", "fp8_e4m3"])
def test_what_was_stored_is_expanded_not_what_came(folder: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(EngineConfig(folder, dtype="float32", tokenizer="demo", kv_cache_dtype=stored))
    results = []
    for expanding in (True, False):
        monkeypatch.setattr("attention.expansion.worth_expanding", lambda *_, expanding=expanding: expanding)
        results.append(scorer.logits(PROMPTS[2]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_static_scales_of_keys_are_left_out_and_said_to_be(folder: str, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(LAYERS) for part in "kv"]
    save_file({name: torch.tensor(1e-4) for name in names}, tmp_path / "scales.safetensors")
    plan = make_plan(Checkpoint.open(folder), dtype="float32", device="cpu")
    files = (*plan.checkpoint.files, tmp_path / "scales.safetensors")
    plan = replace(plan, kv_scales={name: name for name in names}, checkpoint=replace(plan.checkpoint, files=files))
    found = plan_storage(plan, read_layers(plan.config), "fp8_e4m3")
    assert found.static == [StaticScales()] * LAYERS
    assert "scales per token and head: 6 are stored; 6 are left out" in str(found)
