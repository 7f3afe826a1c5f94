"""Rotary embeddings that depend on the length: each sequence gets what Transformers gives it alone, whatever runs beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime import LLM, LoadError, SamplingParams
from tests.tiny_models import VOCABULARY, tiny_model

LIMIT = 16
NEW = 12
PROMPTS = [[(7 * place + 3 * i * i) % VOCABULARY for i in range(n)] for place, n in enumerate((3, 11, 29, 16, 17, 1))]
PROMPTS.append([*PROMPTS[2][:8], 5, 6])  # shares a prefix with one that is long, and has other factors
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.4],
                "long_factor": [4.0, 3.0, 6.0, 9.0],
                "original_max_position_embeddings": LIMIT,
            },
            "original_max_position_embeddings": LIMIT,
            "max_position_embeddings": 64,
        },
    ),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": LIMIT,
        },
    ),
}


def answered(rope: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """A folder, and what a fresh model answers to each prompt alone: longrope as forwards over all tokens say (so does
    ``generate`` of Transformers 5.23, whose Phi-3 computes its cache anew), dynamic as ``generate`` with a cache does."""
    name, changes = ROPES[rope]
    folder = tmp_path_factory.mktemp(rope)
    tiny_model(name, **changes).save_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        model = tiny_model(name, **changes)
        model.generation_config.eos_token_id = None
        ids = torch.tensor([prompt])
        cached = rope == "dynamic"
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=cached
        )
        answers.append(out[0, len(prompt) :].tolist())
    return str(folder), answers


@pytest.fixture(scope="module", params=ROPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    return answered(request.param, tmp_path_factory)


def load(folder: str, **options: Any) -> LLM:
    return LLM(
        folder, dtype="float32", skip_tokenizer_init=True, **{"block_size": 4, "max_total_tokens": 512} | options
    )


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 7}, {"max_total_tokens": 64, "max_num_batched_tokens": 7}, {"max_num_seqs": 2}],
    ids=["together", "chunked", "preempted", "in turn"],
)
def test_short_and_long_sequences_together(checkpoint: tuple[str, list[list[int]]], options: dict[str, Any]) -> None:
    """Some stay short, some cross the limit while they are generated, some begin beyond it; twice, for cached prefixes."""
    folder, answers = checkpoint
    llm = load(folder, **options)
    assert llm.engine.max_model_len == 64
    for _ in range(2):
        assert tokens_of(llm) == answers
    stats = llm.engine.stats()
    assert stats.free_blocks == stats.blocks
    assert stats.prefix_hits > 0 or stats.preemptions
    assert (stats.preemptions > 0) == ("max_total_tokens" in options)


def test_the_factors_matter(checkpoint: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Served as if the longest sequence of a batch spoke for all, the answers are others."""
    folder, answers = checkpoint
    llm = load(folder, enable_prefix_caching=False)
    llm.engine.scheduler.factors = llm.engine.runner.factors = None
    assert tokens_of(llm) != answers


def test_scores_are_those_of_one_forward_over_all_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    """longrope: before the limit is passed with the short factors, from then on with the long ones."""
    name, changes = ROPES["longrope"]
    model = tiny_model(name, **changes)
    folder = tmp_path_factory.mktemp("scores")
    model.save_pretrained(folder)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1)
    for output, prompt in zip(load(str(folder)).generate(PROMPTS, params), PROMPTS, strict=True):
        ids = list(prompt)
        for token, scored in zip(output.outputs[0].token_ids, output.outputs[0].logprobs or [], strict=True):
            with torch.inference_mode():
                wanted = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            assert scored[token].logprob == pytest.approx(float(wanted[token]), abs=1e-4)
            ids.append(token)


def test_within_the_limit_nothing_is_decided_on_the_host(checkpoint: tuple[str, list[list[int]]]) -> None:
    engine = load(checkpoint[0], max_model_len=LIMIT).engine
    assert engine.runner.factors is None
    assert load(checkpoint[0]).engine.runner.factors is not None


def test_code_that_hides_how_it_takes_the_length_is_refused_beyond_the_limit(
    checkpoint: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.defaults.separate_lengths", lambda model: False)
    with pytest.raises(LoadError, match=r"max_model_len to at most 16"):
        load(checkpoint[0])
    load(checkpoint[0], max_model_len=LIMIT)
