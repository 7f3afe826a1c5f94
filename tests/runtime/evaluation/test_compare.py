"""The numbers are those of the definition, computed at once from all logits; what cannot be compared is refused."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from runtime import EngineConfig, Error, InvalidRequest, LoadError
from runtime.evaluation import compare as module
from runtime.evaluation.compare import Comparison, compare_scorers
from runtime.evaluation.scorer import Scorer
from runtime.evaluation.text import read_documents, windows

SIZES: dict[str, Any] = {"tokens": 500, "window": 128}
DOCUMENTS = read_documents("demo")


@pytest.fixture(scope="module")
def reference() -> Scorer:
    return Scorer(EngineConfig("demo-bf16", dtype="float32"))


@pytest.fixture(scope="module")
def candidate() -> Scorer:
    return Scorer(EngineConfig("demo", dtype="float32"))


@pytest.fixture(scope="module")
def comparison(reference: Scorer, candidate: Scorer) -> Comparison:
    return compare_scorers(reference, candidate, DOCUMENTS, **SIZES)


def test_every_number_is_that_of_its_definition(reference: Scorer, candidate: Scorer, comparison: Comparison) -> None:
    chosen = windows(reference.tokenizer, DOCUMENTS, SIZES["window"], SIZES["tokens"])
    target = torch.tensor([token for window in chosen for token in window.ids[1:]])[:, None]
    p, q = (
        torch.cat([side.logits(window.ids)[:-1] for window in chosen]).double().log_softmax(-1)
        for side in (reference, candidate)
    )
    kl = (p.exp() * (p - q)).sum(-1)
    shift = q.gather(1, target) - p.gather(1, target)
    size = sum(window.bytes for window in chosen)
    expected = {
        "mean_kl": kl.mean(),
        "median_kl": kl.quantile(0.5),
        "kl_99": kl.quantile(0.99),
        "kl_999": kl.quantile(0.999),
        "log_ppl_ratio": -shift.mean(),
        "reference_bits_per_byte": -p.gather(1, target).sum() / math.log(2) / size,
        "bits_per_byte": -q.gather(1, target).sum() / math.log(2) / size,
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
        "rms_delta_p": (q.gather(1, target).exp() - p.gather(1, target).exp()).square().mean().sqrt(),
    }
    found = {name: estimate.value for name, estimate in comparison.estimates.items()}
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-9)
    assert comparison.tokens == len(target) == 508
    assert 0.01 < comparison.mean_kl.value < 0.1
    assert comparison.bits_per_weight == pytest.approx(4 + (16 + 8) / 128, abs=0.01)


def test_slices_of_any_size_give_the_same(
    reference: Scorer, candidate: Scorer, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by a slice: one row at a time is enough."""
    monkeypatch.setattr(module, "ROW_ELEMENTS", 3 * reference.vocabulary)
    again = compare_scorers(reference, candidate, DOCUMENTS, **SIZES, layers=False)
    assert again.estimates == comparison.estimates
    assert again.kl_by_position == comparison.kl_by_position


def test_a_model_does_not_differ_from_itself(candidate: Scorer) -> None:
    found = compare_scorers(candidate, candidate, DOCUMENTS, **SIZES)
    assert found.mean_kl.value == found.kl_999.value == found.rms_delta_p.value == 0
    assert found.top1_agreement.value == 1
    assert all(layer.sqnr == math.inf for layer in found.layers)
    ElementTree.fromstring(found.plot())


def test_the_first_bad_layer_is_found(reference: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = Scorer(EngineConfig("demo-bf16", dtype="float32"))
    weight = damaged.model.model.layers[5].mlp.up_proj.weight
    weight.data += 0.3 * weight.data.std() * torch.randn(weight.shape)
    found = compare_scorers(reference, damaged, DOCUMENTS, **SIZES)
    assert [layer.sqnr < 40 for layer in found.layers] == [place == 5 for place in range(8)]
    assert found.layers[5].name == "model.layers.5"
    assert all(layer.sqnr > 100 for layer in found.layers if layer.name != "model.layers.5")
    assert "worst layer  model.layers.5" in str(found)


def test_the_engine_and_its_quantized_caches_are_candidates(candidate: Scorer) -> None:
    found = {
        name: compare_scorers(
            candidate, Scorer(EngineConfig("demo", dtype="float32", kv_cache_dtype=name)), DOCUMENTS, **SIZES
        )
        for name in ("bf16", "int8", "fp8_e4m3")
    }
    kl = {name: one.mean_kl.value for name, one in found.items()}
    assert 1e-7 < kl["bf16"] < 1e-4 < kl["int8"] * 10
    assert kl["bf16"] < kl["int8"] < kl["fp8_e4m3"] < 0.01
    assert found["int8"].layers == ()
    assert found["int8"].attention in ("cpu over pages of int8", "paged over pages of int8")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_attention_backend_is_a_candidate(candidate: Scorer, backend: str) -> None:
    ids = list(range(100, 160))
    paged = Scorer(EngineConfig("demo", dtype="float32", attention_backend=backend))
    for length in (20, 60, 7):  # a window longer than the pages of the one before, and a shorter one
        torch.testing.assert_close(paged.logits(ids[:length]), candidate.logits(ids[:length]), rtol=0, atol=1e-3)
    found = compare_scorers(candidate, paged, DOCUMENTS, **SIZES)
    assert found.mean_kl.value < 1e-9
    assert found.attention == f"{backend} over pages of float32"
    assert f"attention {backend} over pages" in str(found)


def test_an_attention_backend_that_cannot_is_refused() -> None:
    with pytest.raises(LoadError, match="no attention backend can run this model on cpu"):
        Scorer(EngineConfig("demo", device="cpu", attention_backend="paged"))


def test_it_is_json_and_a_figure_for_light_and_dark(comparison: Comparison) -> None:
    data = json.loads(json.dumps(comparison.data(), allow_nan=False))
    assert data["mean_kl"]["value"] == comparison.mean_kl.value
    assert data["recipe"] == "kl/window=128/bos"
    assert len(data["layers"]) == 8
    figure = comparison.plot()
    ElementTree.fromstring(figure)
    assert "prefers-color-scheme: dark" in figure
    assert figure.count("model.layers.") == 8


def test_long_names_are_cut_in_the_title_alone(comparison: Comparison) -> None:
    name = f"/checkpoints/{'of/a/deep/tree/' * 9}model-awq dtype=float32"
    title, *_ = re.findall(r'class="title"[^>]*>([^<]*)<', (figure := replace(comparison, candidate=name).plot()))
    assert "/model-awq dtype=float32 against" in title
    assert len(title) < 90
    assert name in figure


def test_another_vocabulary_is_refused(reference: Scorer) -> None:
    other = Scorer(EngineConfig("demo", dtype="float32"))
    other.vocabulary = 5000
    with pytest.raises(InvalidRequest, match=r"4096 tokens and .* 5000"):
        compare_scorers(reference, other, DOCUMENTS, **SIZES)


def test_another_tokenizer_is_refused(reference: Scorer) -> None:
    other = Scorer(EngineConfig("demo", dtype="float32"))
    other.tokenizer.add_tokens(["import"])
    with pytest.raises(InvalidRequest, match=r"tokenizers .* differ: token"):
        compare_scorers(reference, other, DOCUMENTS, **SIZES)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(
    reference: Scorer, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Scorer(EngineConfig("demo-bf16", dtype="float32"))

    def spoil(_: nn.Module, __: Any, output: Any) -> None:
        output.logits[0, 7, 11] = value

    other.model.register_forward_hook(spoil)
    with pytest.raises(Error, match=r"token 7 of 128 are NaN or infinite.* begins behind them"):
        compare_scorers(reference, other, DOCUMENTS, **SIZES, layers=False)


def test_the_layer_where_values_stop_being_finite_is_named() -> None:
    broken = Scorer(EngineConfig("demo-bf16", dtype="float32"))
    broken.model.model.layers[3].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(Error, match=r"It begins in model\.layers\.3\."):
        broken.logits(list(range(100, 120)))


def test_a_layer_that_does_nothing_in_the_reference_has_no_ratio(candidate: Scorer) -> None:
    still = Scorer(EngineConfig("demo-bf16", dtype="float32"))
    for linear in (still.model.model.layers[2].mlp.down_proj, still.model.model.layers[2].self_attn.o_proj):
        linear.weight.data.zero_()
    found = compare_scorers(still, candidate, DOCUMENTS, **SIZES)
    assert found.layers[2].sqnr == -math.inf
    json.dumps(found.data(), allow_nan=False)
    ElementTree.fromstring(found.plot())


def test_windows_longer_than_the_model_was_made_for_are_refused(reference: Scorer, candidate: Scorer) -> None:
    with pytest.raises(InvalidRequest, match="windows of 1025 tokens, and the model was made for 1024"):
        compare_scorers(reference, candidate, DOCUMENTS, tokens=500, window=1025)
