"""A third of the sweep: what is served is exact, and ARCHITECTURES.md says what is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from runtime import EngineConfig
from runtime.engine import Engine
from tests.architectures.sweep import BITE, ENGINE, PROMPTS, bite, compare, eager_model, examine, serve
from tests.architectures.table import TABLE, TYPES, render, versions, written

ALWAYS = (
    "deepseek_v3",
    "falcon_h1",
    "gemma2",
    "gpt_oss",
    "jamba",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "qwen3_next",
)
"""Kinds that the everyday test must not miss; the rest are every third type by name."""
EVERYDAY = sorted({*TYPES[::3], *ALWAYS})


def found_with_this_version() -> bool:
    return f"with {versions()}:" in TABLE.read_text()


@pytest.mark.parametrize("model_type", EVERYDAY)
def test_what_is_served_is_exact(model_type: str) -> None:
    finding = examine(model_type)
    assert finding.verdict != "wrong", finding.note
    if found_with_this_version():
        assert finding == written()[model_type]


@pytest.mark.parametrize("model_type", [t for t in EVERYDAY if written()[t].verdict == "exact"])
def test_forgetting_the_start_of_a_sequence_would_be_noticed(model_type: str) -> None:
    assert bite(eager_model(model_type)) > BITE


def test_the_page_has_every_type_and_is_as_it_would_be_written() -> None:
    findings = list(written().values())
    assert all(finding.verdict in ("exact", "refused", "not built") for finding in findings)
    if found_with_this_version():
        assert [finding.model_type for finding in findings] == TYPES
        assert render(findings) == TABLE.read_text()


def test_a_wrong_answer_would_be_noticed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The scenario preempts, and its comparison sees one weight that differs."""
    model = eager_model("llama")
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    engine = Engine(EngineConfig(model=str(folder), **ENGINE))
    answers = serve(engine)
    assert engine.stats().preemptions > 0
    assert all(compare(model, PROMPTS[place], answer) is None for place, answer in answers.items())
    other = [*answers[1].tokens[:-1], answers[1].tokens[-1] + 1]
    assert "differ" in (compare(model, PROMPTS[1], replace(answers[1], tokens=other)) or "")
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] += 0.5
    assert all(compare(model, PROMPTS[place], answer) for place, answer in answers.items() if len(PROMPTS[place]) > 1)
