"""Architectures on a GPU, where there is one: the scenario of the sweep, each sequence as Transformers computes it on the CPU.

Recurrent and hybrid models, latents, shared keys, experts, windows and chunks whose blocks are given back, rotary factors by
length; decoding by CUDA graphs wherever the model allows it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.architectures.sweep import examine
from tests.runtime import test_factors, test_windows

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

RECURRENT = (
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm3",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
    "zamba",
    "zamba2",
    "zaya",
)
OTHERS = (
    "cohere2",
    "deepseek_v3",
    "diffllama",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt_oss",
    "llama4_text",
    "mimo_v2_flash",
    "mistral",
    "mixtral",
    "phi3",
    "qwen3_moe",
)


@pytest.mark.parametrize("model_type", [*RECURRENT, *OTHERS])
def test_what_is_served_is_exact(model_type: str) -> None:
    finding = examine(model_type, device="cuda")
    if finding.verdict in ("not built", "refused") and finding == examine(model_type):
        pytest.skip(f"nor on the CPU with this version of Transformers: {finding.note}")
    assert finding.verdict == "exact", finding.note


@pytest.mark.parametrize("rope", test_factors.ROPES)
def test_rotary_factors_by_length(rope: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, answers = test_factors.answered(rope, tmp_path_factory)
    for options in ({}, {"max_num_batched_tokens": 7}):
        assert test_factors.tokens_of(test_factors.load(folder, device="cuda", **options)) == answers


@pytest.mark.parametrize("options", [{}, {"max_total_tokens": 32, "max_num_batched_tokens": 9}, {"block_size": 3}])
def test_windows_give_back_blocks_under_graphs(
    options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, answers = test_windows.answered(tmp_path_factory)
    llm = test_windows.load(folder, device="cuda", attention_backend="paged", **options)
    assert "captured in" in llm.report
    for _ in range(2):
        found = llm.generate(test_windows.PROMPTS, test_windows.GREEDY)
        assert [output.outputs[0].token_ids for output in found] == answers
