"""Runtime fidelity of every format with every kernel that takes it, and of a stream over HTTP: one reference for all, plain
Transformers with dequantized weights in float32. What quantizes inputs is left to ``test_quantized_inputs``: another dtype
moves its codes."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from quant.linear import QuantLinear
from runtime import LLM, SamplingParams, load_model
from runtime.checkpoint import locate
from tests.formats import CASES, Case
from tests.planned import assert_bytes_as_planned
from tests.runtime.served import Served
from tests.runtime.test_engine import dequantized
from tests.runtime.test_fidelity import divergence, plain_logprobs, recorded

Report = Callable[[str], None]

LARGEST = 1e-10
"""Mean KL in nats: the order of additions in float32 gives 1e-12, a single weight that is one step off 2e-7 and more."""

PROMPTS = [[(5 * place + 11 * i * i + i) % 512 for i in range(40)] for place in range(3)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.checkpoint)
def test_formats_and_kernels(case: Case, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    """The engine in chunks of 32 tokens, with the preferred kernels and with the reference."""
    options = {"dtype": "float32", "weight_only": True}
    truth_model = dequantized(load_model(case.folder, kernel="reference", **options))
    truth = torch.cat([plain_logprobs(truth_model, prompt)[:-1] for prompt in PROMPTS])
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    found: dict[str, float] = {}
    for kernel in (None, "reference"):
        llm = LLM(
            case.folder,
            kernel=kernel,
            skip_tokenizer_init=True,
            max_num_batched_tokens=32,
            kv_cache_dtype="fp32",  # two checkpoints ask for FP8: test_kv_scales
            startup_check=False,
            **options,
        )
        assert_bytes_as_planned(llm.engine.loaded)
        layers = (layer for layer in llm.engine.loaded.model.modules() if isinstance(layer, QuantLinear))
        used = "+".join(sorted({layer.kernel.name for layer in layers}))
        with recorded(monkeypatch) as logprobs:
            outputs = llm.generate(PROMPTS, params)
            ours = torch.cat([logprobs(int(output.request_id)) for output in outputs])
        found[used] = divergence(truth, ours)
        assert (truth.argmax(-1) == ours.argmax(-1)).all()
    shown = ", ".join(f"{name} KL {value:.1e}" for name, value in found.items())
    report(f"fidelity  float32   {case.checkpoint:<40} {shown}")
    assert all(value < LARGEST for value in found.values()), found


def test_streamed_over_http(report: Report) -> None:
    """Tokens and log-probabilities of a stream, three at once, against the plain model afterwards."""
    tokenizer = AutoTokenizer.from_pretrained(locate("demo"))
    truth = dequantized(load_model("demo", dtype="float32", kernel="reference"))
    ids = tokenizer((locate("demo").parent / "heldout.txt").read_text(), add_special_tokens=False)["input_ids"]
    prompt, body = ids[:70], {"temperature": 0, "max_new_tokens": 50, "ignore_eos": True}
    largest = 0.0
    with Served() as server:
        request = {"input_ids": prompt, "sampling_params": body, "stream": True, "return_logprob": True}
        with httpx.stream("POST", server.url + "/generate", json=request, timeout=60) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert len(events) > 10
    rows = events[-1]["meta_info"]["output_token_logprobs"]
    tokens = [row[1] for row in rows]
    exact = plain_logprobs(truth, prompt + tokens)[len(prompt) - 1 : -1]
    assert tokens == exact.argmax(-1).tolist()
    largest = max(abs(row[0] - exact[place, row[1]].item()) for place, row in enumerate(rows))
    report(
        f"fidelity  float32   streamed over HTTP: log-probabilities differ by at most {largest:.1e}; {len(rows)} tokens"
    )
    assert largest < 1e-4
