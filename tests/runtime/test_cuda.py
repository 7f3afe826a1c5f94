"""The engine on a GPU, where there is one, against the engine on the CPU."""

from __future__ import annotations

import pytest
import torch

from runtime import LLM, SamplingParams

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PROMPTS = ["def fibonacci(n):", "import os\n", "class Stack:\n    def __init__(self", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


def answers(model: str, **options: object) -> list[list[int]]:
    llm = LLM(model, max_num_batched_tokens=16, max_total_tokens=4096, **options)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("model", ["demo", "demo-bf16"])
def test_greedy_answers_in_float32_are_those_of_the_cpu(model: str) -> None:
    """Prompts in chunks of 16 tokens beside sequences that decode, so that every kernel runs."""
    wanted = answers(model, device="cpu", dtype="float32")
    assert answers(model, device="cuda", dtype="float32", attention_backend="paged") == wanted
    assert answers(model, device="cuda", dtype="float32", attention_backend="reference") == wanted


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bf16", "fp8_e4m3", "int8"])
def test_scores_stay_near_those_of_the_reference(kv_cache_dtype: str) -> None:
    tokens = list(range(500, 900, 7))
    options = {"device": "cuda", "dtype": "bfloat16", "kv_cache_dtype": kv_cache_dtype, "max_total_tokens": 4096}
    scores = []
    for backend in ("paged", "reference"):
        found = LLM("demo-bf16", attention_backend=backend, **options).score(tokens).logprobs[1:]
        scores.append(torch.tensor(found, dtype=torch.float64))
    assert (scores[0] - scores[1]).abs().mean() < 0.05
