"""Prefill and decode of the whole engine against Transformers' ``generate``, in one run.

    python -m benchmarks.engine [--models demo 1b 135m] [--rounds 5]

For each model the peers take turns: relinear with the AWQ checkpoint, as it is and with every layer by itself (--no-fuse
--no-native), relinear with the bf16 checkpoint, Transformers with the bf16 checkpoint (sdpa attention) and, where GPTQModel
is installed (pip install gptqmodel), Transformers with the AWQ checkpoint. Measured are a prompt of 512 tokens until its first
new token, and decoding 63 tokens after a prompt of 128, alone and in a batch of 8; medians over the rounds. Beside them stands
the bound: decoding cannot be faster than reading the weights once a step at the bandwidth that this run measured, prefill not
faster than its multiplications at the rate that this run measured for bf16.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks import random_llama
from benchmarks.timing import measure, print_json, reader
from runtime import LLM, SamplingParams
from runtime.checkpoint import locate

PREFILL, PROMPT, NEW, BATCH = 512, 128, 64, 8
METRICS = ("prefill", "decode 1", "decode 8")

Generate = Callable[[list[list[int]], int], object]
"""Answer prompts of equal length with a number of new tokens each, greedily, whatever the tokens."""


SHAPES = {"1b": random_llama.LLAMA_1B, "135m": random_llama.LLAMA_135M}


def relinear(path: str, **options: Any) -> tuple[Generate, LLM]:
    sizes = {"max_model_len": PREFILL + NEW, "max_total_tokens": 4096}
    llm = LLM(path, skip_tokenizer_init=True, startup_check=False, **sizes, **options)

    def generate(prompts: list[list[int]], new: int) -> object:
        return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))

    return generate, llm


def transformers(path: str) -> Generate:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], new: int) -> object:
        ids = torch.tensor(prompts)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    return generate


def tokens_per_second(generate: Generate, vocabulary: int) -> dict[str, float]:
    """One sample of every metric."""

    def seconds(batch: int, length: int, new: int) -> float:
        prompts = [torch.randint(3, vocabulary, (length,)).tolist() for _ in range(batch)]
        started = time.perf_counter()
        generate(prompts, new)
        return time.perf_counter() - started

    rates = {"prefill": PREFILL / seconds(1, PREFILL, 1)}
    for batch in (1, BATCH):
        first = seconds(batch, PROMPT, 1)
        rates[f"decode {batch}"] = batch * (NEW - 1) / (seconds(batch, PROMPT, NEW) - first)
    return rates


def ceilings() -> tuple[float, float]:
    """Bytes a second read from memory, and bf16 multiply-adds a second, measured now."""
    size, width = 64 << 20, 2048
    weight, x = (torch.randn(width, width, dtype=torch.bfloat16) for _ in range(2))
    timings = measure({"read": reader(size), "multiply": lambda: F.linear(x, weight)})
    return size / timings["read"].seconds, width**3 / timings["multiply"].seconds


def run(name: str, awq: str, bf16: str, rounds: int) -> dict[str, Any]:
    """Measure one model and print its table."""
    ours, llm = relinear(awq)
    dense, dense_llm = relinear(bf16)
    apart, _ = relinear(awq, fuse=False, native=False)
    peers = {"relinear awq": ours, "relinear awq, apart": apart, "relinear bf16": dense}
    peers["transformers bf16"] = transformers(bf16)
    if find_spec("gptqmodel"):
        peers["transformers awq"] = transformers(awq)
    plan = llm.engine.loaded.plan
    vocabulary = llm.engine.vocabulary
    samples: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for generate in peers.values():
        for batch, length in ((1, PREFILL), (BATCH, PROMPT)):
            generate(torch.randint(3, vocabulary, (batch, length)).tolist(), 4)
    bandwidth, multiply = ceilings()
    for _ in range(rounds):
        for peer, generate in peers.items():
            samples[peer].append(tokens_per_second(generate, vocabulary))
    rates = {
        peer: {metric: statistics.median(sample[metric] for sample in taken) for metric in METRICS}
        for peer, taken in samples.items()
    }
    linear = sum(module.shape.in_features * module.shape.out_features for module in plan.modules.values())
    weights = {"relinear awq": step_bytes(llm), "relinear bf16": step_bytes(dense_llm)}
    weights["transformers bf16"] = weights["relinear bf16"]
    weights["relinear awq, apart"] = weights["transformers awq"] = weights["relinear awq"]
    print(
        f"\n{name}: {linear / 1e6:.0f} M weights in linears; "
        f"read {bandwidth / 1e9:.1f} GB/s, bf16 {2 * multiply / 1e12:.2f} TFLOP/s"
    )
    print(f"{'tokens/s (x transformers, of bound)':<36}" + "".join(f"{metric:>26}" for metric in METRICS))
    result: dict[str, Any] = {"bandwidth": bandwidth, "multiply_adds": multiply, "peers": {}}
    for peer, found in rates.items():
        bound = {"prefill": multiply / linear, "decode 1": bandwidth / weights[peer]}
        bound["decode 8"] = BATCH * bound["decode 1"]
        ratio = {metric: found[metric] / rates["transformers bf16"][metric] for metric in METRICS}
        cells = (f"{found[m]:8.1f} ({ratio[m]:4.2f}x, {100 * found[m] / bound[m]:3.0f} %)" for m in METRICS)
        print(f"{peer:<36}" + "".join(f"{cell:>26}" for cell in cells))
        result["peers"][peer] = {"rates": found, "ratios": ratio, "bounds": bound, "step_bytes": weights[peer]}
    return result


def step_bytes(llm: LLM) -> int:
    """Bytes of weights that one decoding step reads: all linears, a tied head as the embedding it shares."""
    plan = llm.engine.loaded.plan
    dense = plan.dtype.itemsize
    return sum(m.nbytes or m.shape.in_features * m.shape.out_features * dense for m in plan.modules.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("demo", *SHAPES), default=["demo", *SHAPES])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models:
            if name == "demo":
                results[name] = run(name, "demo", str(locate("demo-bf16")), arguments.rounds)
            else:
                folders = [
                    str(random_llama.write(SHAPES[name], Path(scratch) / name / kind, quantized=kind == "awq"))
                    for kind in ("awq", "bf16")
                ]
                results[name] = run(name, *folders, arguments.rounds)
            gc.collect()
    print_json("engine", models=results)


if __name__ == "__main__":
    main()
