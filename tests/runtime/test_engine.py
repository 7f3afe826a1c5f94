"""The engine says what the plain model says: greedy tokens equal to recomputing every sequence alone, whatever the load.

The models are tiny and random, quantized by a writer of our own, and bite: windows shorter than the prompts, softcaps that
bend every score, sinks. The reference is Transformers' eager forward on dequantized weights, without any cache.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import AutoTokenizer

from runtime import LLM, SamplingParams, load_model
from runtime.checkpoint import locate
from tests.awq_writer import write_awq
from tests.greedy import greedy_alone
from tests.tiny_models import VOCABULARY, tiny_model

NEW_TOKENS = 16
PROMPTS = [
    [(7 * place + 3 * i * i) % VOCABULARY for i in range(length)] for place, length in enumerate((11, 13, 5, 19, 1, 9))
]
LOADS: dict[str, dict[str, Any]] = {
    "ample": {},
    "budget-7": {"max_num_batched_tokens": 7},
    "few-blocks": {"max_total_tokens": 48, "block_size": 4},
    "few-blocks-budget-7": {"max_total_tokens": 40, "block_size": 2, "max_num_batched_tokens": 7},
}
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt_oss", "phi3", "gpt2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """A folder, and what the model in it answers."""
    name = request.param
    widths = {"n_embd": 64} if name == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    model = tiny_model(name, **widths)
    folder = tmp_path_factory.mktemp(name)
    if name == "gpt2":
        model.save_pretrained(folder)  # its linears are Conv1D, which AWQ does not quantize
    else:
        write_awq(model, folder, group=32)
    return str(folder), [greedy_alone(model, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("load", LOADS)
def test_greedy_tokens_are_those_of_each_sequence_alone(checkpoint: tuple[str, list[list[int]]], load: str) -> None:
    folder, expected = checkpoint
    llm = LLM(folder, dtype="float32", skip_tokenizer_init=True, **LOADS[load])
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)] == expected
    stats = llm.engine.stats()
    assert stats.free_blocks == stats.blocks
    # Windows give back blocks that others need: those models preempt less.
    assert (stats.preemptions >= (2 if "free the blocks" in llm.report else 5)) == load.startswith("few-blocks"), stats


@pytest.mark.parametrize("budget", [2048, 7])
def test_greedy_tokens_are_the_same_from_cached_prefixes(checkpoint: tuple[str, list[list[int]]], budget: int) -> None:
    """Every prompt twice at once, with itself continued, and once more when all of it has been cached."""
    folder, expected = checkpoint
    llm = LLM(folder, dtype="float32", skip_tokenizer_init=True, block_size=4, max_num_batched_tokens=budget)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, n=2)
    for _ in range(2):
        for output, tokens in zip(llm.generate(PROMPTS, params), expected, strict=True):
            assert [sample.token_ids for sample in output.outputs] == [tokens, tokens]
    continued = [prompt + tokens[:9] for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    rest = SamplingParams(temperature=0, max_tokens=NEW_TOKENS - 9, ignore_eos=True)
    outputs = llm.generate(continued, rest)
    assert [output.outputs[0].token_ids for output in outputs] == [tokens[9:] for tokens in expected]
    assert [output.cached_tokens for output in outputs] == [(len(prompt) - 1) // 4 * 4 for prompt in continued]
    stats = llm.engine.stats()
    assert stats.prefix_hits >= stats.prefix_queries / 2
    assert stats.free_blocks == stats.blocks


BUNDLED_LOADS: dict[str, dict[str, Any]] = {
    "ample": {},
    "budget-7": {"max_num_batched_tokens": 7},
    "few-blocks": {"max_total_tokens": 96, "block_size": 4},
}
BUNDLED_PROMPTS = [
    "def main():",
    "class Stack:",
    "import os\n\ndef walk(path):",
    "try:",
    "def read(path):\n    with open(",
]


@pytest.fixture(scope="module")
def bundled() -> list[list[int]]:
    """What Transformers' own ``generate`` answers with the dequantized weights of the bundled AWQ model."""
    plain: Any = dequantized(load_model("demo", dtype="float32", kernel="reference"))
    tokenizer = AutoTokenizer.from_pretrained(locate("demo"))
    answers = []
    for prompt in BUNDLED_PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answers.append(plain.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize("load", BUNDLED_LOADS)
def test_the_bundled_model_says_what_transformers_says(bundled: list[list[int]], load: str) -> None:
    llm = LLM("demo", dtype="float32", **BUNDLED_LOADS[load])
    outputs = llm.generate(BUNDLED_PROMPTS, SamplingParams(temperature=0, max_tokens=32))
    assert [output.outputs[0].token_ids for output in outputs] == bundled
    stats = llm.engine.stats()
    assert stats.free_blocks == stats.blocks
    assert (stats.preemptions > 0) == (load == "few-blocks")


def test_preempted_scores_samples_and_seeds_are_those_of_ample_memory() -> None:
    scored = SamplingParams(n=3, temperature=0.9, seed=4, max_tokens=20, prompt_logprobs=2, ignore_eos=True)
    prompts = ["def main():\n    return", "class Stack:", "import os"]
    ample, short = (
        LLM("demo", dtype="float32", **options).generate(prompts, scored)
        for options in ({}, {"max_total_tokens": 40, "block_size": 1, "max_num_batched_tokens": 9})
    )
    for left, right in zip(ample, short, strict=True):
        assert [s.token_ids for s in left.outputs] == [s.token_ids for s in right.outputs]
        assert left.prompt_logprobs is not None
        assert right.prompt_logprobs is not None
        assert [row and sorted(row) for row in left.prompt_logprobs] == [
            row and sorted(row) for row in right.prompt_logprobs
        ]


def dequantized(model: nn.Module) -> nn.Module:
    """The model with every quantized linear replaced by a plain one of the dequantized weight."""
    from quant.linear import QuantLinear, set_module
    from quant.reference import dequantize

    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            assert module.quant_weight is not None
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(dequantize(module.quant_weight), requires_grad=False)
            if module.bias is not None:
                plain.bias = module.bias
            set_module(model, name, plain.to(next(model.parameters()).dtype))
    return model
