"""Decoding on the GPU at hand: CUDA graphs against none, int4 against bfloat16, and both against Transformers.

    python -m benchmarks.gpu_engine [--seconds 450] [--skip-correctness] [--skip-peers] [--kinds int4 bf16] [--graphs-only]

First correctness: on the bundled models, greedy tokens with graphs, by the same steps without capturing (must be equal), by
ordinary steps, and of the CPU in float32 (must be equal in float32; in 16 bits a padded batch may round a logit otherwise).
Then a random model of the shape of Llama 8B, int4 by AWQ in groups of 128 and bfloat16, written to a temporary folder: time
of a decoding step of 1, 8 and 32 sequences with prompts of 128 tokens, and tokens a second. ``device`` is the time of the
graph alone; what ``step`` takes beyond it is the host's. Below a step of one sequence are its kernels. The bound is reading
all weights once at the rate of copying. The peers are Transformers' ``generate`` and ``generate_batch`` (continuous
batching) with the same bfloat16 weights.

A part that fails is printed and left out, and the exit status is 1; what would begin after ``--seconds`` is left out. All of it
in JSON on the last line, and after every part in ``$OUT/gpu_engine.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks import random_llama
from benchmarks.engine_peers import step_bytes
from benchmarks.gpu_linear import guarded
from benchmarks.gpu_timing import copy_rate
from benchmarks.timing import print_json
from runtime import LLM, SamplingParams, assembly
from runtime.graphs import choose_capture

BATCHES = (1, 8, 32)
PROMPT, STEPS, WARM = 128, 64, 8
PROMPTS = ["def fibonacci(n):", "import os\n", "class Stack:\n    def __init__(self", "x", "try:\n    "]
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


def answers(model: str, **options: Any) -> list[list[int]]:
    llm = LLM(model, max_num_seqs=8, max_total_tokens=4096, **options)
    if line := graphs_line(llm):
        print(f"    {line}", flush=True)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def graphs_line(llm: LLM) -> str:
    return next((line for line in llm.engine.report.splitlines() if line.startswith("graphs")), "")


def uncaptured(model: str, **options: Any) -> list[list[int]]:
    """The steps that graphs would run, launched one by one."""
    assembly.choose_capture = lambda *_: lambda step: step  # type: ignore[attr-defined]
    try:
        return answers(model, **options)
    finally:
        assembly.choose_capture = choose_capture  # type: ignore[attr-defined]


def check(model: str, dtype: str) -> dict[str, Any]:
    """How many answers agree; raises where they must and do not."""
    print(f"{model} in {dtype}", flush=True)
    options = {"device": "cuda", "dtype": dtype}
    captured = answers(model, **options)
    found = {
        "uncaptured": uncaptured(model, **options),
        "eager": answers(model, disable_cuda_graph=True, **options),
        "again": answers(model, **options),
        "cpu float32": answers(model, device="cpu", dtype="float32"),
    }
    agree = {name: sum(a == b for a, b in zip(captured, other, strict=True)) for name, other in found.items()}
    print(f"    of {len(captured)} answers with graphs, equal to {agree}", flush=True)
    required = ["uncaptured", "again"] + (["eager", "cpu float32"] if dtype == "float32" else [])
    if wrong := [name for name in required if agree[name] < len(captured)]:
        raise AssertionError(f"{model} in {dtype}: answers with graphs differ from {', '.join(wrong)}: {agree}")
    return {"model": model, "dtype": dtype, "of": len(captured), **agree}


def prompts_of(batch: int, length: int = PROMPT) -> list[list[int]]:
    return torch.randint(3, 100_000, (batch, length)).tolist()


def ours(name: str, folder: Path, graphs: bool, rate: float) -> list[dict[str, Any]]:
    llm = LLM(
        str(folder), skip_tokenizer_init=True, startup_check=False, device="cuda", disable_cuda_graph=not graphs,
        max_num_seqs=max(BATCHES), max_model_len=1024, max_total_tokens=32 * 1024, enable_prefix_caching=False,
        max_num_batched_tokens=max(BATCHES) * PROMPT,
    )  # fmt: skip
    print(llm.engine.report, flush=True)
    rows = []
    for batch in BATCHES:
        for prompt in prompts_of(batch):
            llm.engine.add(prompt, SamplingParams(temperature=0, max_tokens=2 * STEPS, ignore_eos=True))
        seconds = []
        for _ in range(WARM + STEPS):
            started = time.perf_counter()
            llm.engine.step()
            seconds.append(time.perf_counter() - started)
        on_device = device_seconds(llm, batch)
        while llm.engine.has_work:
            llm.engine.step()
        step = statistics.median(seconds[WARM:])
        rows.append(row(name + (", graphs" if graphs else ""), batch, step, step_bytes(llm) / rate, on_device))
        if graphs and batch == 1:
            rows[-1]["kernels"] = kernels_of(captured_step(llm, batch))
    return rows


def captured_step(llm: LLM, batch: int) -> Callable[[], object]:
    """The graph that decodes ``batch`` sequences; it writes again what it wrote last."""
    graphs = llm.engine.runner.graphs
    assert graphs is not None
    return graphs._steps[next(size for size in graphs.sizes if batch <= size)]


def kernels_of(step: Callable[[], object], repeats: int = 5) -> list[dict[str, Any]]:
    """Launches and microseconds of each kernel of a step."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    found = [
        {"kernel": event.key, "launches": event.count / repeats, "microseconds": event.device_time_total / repeats}
        for event in profile.key_averages()
        if event.device_time_total
    ]
    found.sort(key=lambda each: -each["microseconds"])
    for each in found[:16]:
        print(
            f"    {each['launches']:6.0f} launches {each['microseconds']:8.0f} us  {each['kernel'][:110]}", flush=True
        )
    return found


def device_seconds(llm: LLM, batch: int) -> float | None:
    """Of the graph alone."""
    if llm.engine.runner.graphs is None:
        return None
    step = captured_step(llm, batch)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(20):
        step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 20e3


def row(peer: str, batch: int, step: float, bound: float, device: float | None = None) -> dict[str, Any]:
    shown = "-" if device is None else f"{device * 1e3:.2f}"
    print(
        f"{peer:34} batch {batch:3} {batch / step:9.1f} tok/s  step {step * 1e3:7.2f} ms  device {shown:>6} ms  "
        f"{bound / step:5.0%} of the bound",
        flush=True,
    )
    return {
        "peer": peer, "batch": batch, "tokens_per_second": batch / step, "step": step, "device": device,
        "bound": bound, "of_bound": bound / step,
    }  # fmt: skip


def peer_generate(folder: Path, bound: float) -> list[dict[str, Any]]:
    """Batches of equal length; the time of the prompts, measured by itself, is taken off."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    rows = []
    for batch in BATCHES:

        def timed(new: int, batch: int = batch) -> float:
            ids = torch.tensor(prompts_of(batch), device="cuda")
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, max_new_tokens=new,
                min_new_tokens=new,
            )  # fmt: skip
            torch.cuda.synchronize()
            return time.perf_counter() - started

        timed(4)
        first = statistics.median(timed(1) for _ in range(3))
        rows.append(row("transformers generate bf16", batch, (timed(STEPS + 1) - first) / STEPS, bound))
    return rows


def peer_batching(folder: Path, bound: float) -> list[dict[str, Any]]:
    """Requests of equal length; the time of the prompts and of starting, measured by itself, is taken off."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cuda", attn_implementation="sdpa"
    ).eval()
    rows = []
    for batch in BATCHES:

        def timed(new: int, batch: int = batch) -> float:
            config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new)
            started = time.perf_counter()
            outputs = model.generate_batch(prompts_of(batch), generation_config=config)
            seconds = time.perf_counter() - started
            lengths = [len(output.generated_tokens) for output in outputs.values()]
            if len(lengths) != batch or min(lengths) < new:
                raise AssertionError(f"{batch} requests of {new} tokens gave {lengths}")
            return seconds

        timed(4)
        # Every call starts a manager anew, for seconds that vary: only many steps stand out from that.
        short, long = (min(timed(new) for _ in range(2)) for new in (4, 4 + 4 * STEPS))
        if long <= short:
            raise AssertionError(f"{long:.2f} s for {4 + 4 * STEPS} tokens, {short:.2f} s for 4: too noisy")
        rows.append(row("transformers generate_batch bf16", batch, (long - short) / (4 * STEPS), bound))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=450, help="no part begins later")
    parser.add_argument("--skip-correctness", action="store_true")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=["int4", "bf16"], choices=["int4", "bf16"])
    parser.add_argument("--graphs-only", action="store_true")
    arguments = parser.parse_args()
    begin, failures = time.monotonic(), list[str]()
    torch.manual_seed(0)
    result: dict[str, Any] = {"correctness": [], "decode": [], "failures": failures}

    def part(what: str, key: str, call: Callable[[], Any]) -> Any:
        if time.monotonic() - begin > arguments.seconds:
            print(f"{what}: left out, no time left", flush=True)
            return None
        found = guarded(what, failures, call)
        if found is not None and key:
            result[key] += found if isinstance(found, list) else [found]
        gc.collect()
        torch.cuda.empty_cache()
        if out := os.environ.get("OUT"):
            Path(out, "gpu_engine.json").write_text(json.dumps(result))
        print(f"    {what}: done after {time.monotonic() - begin:.0f} s", flush=True)
        return found

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    rate = copy_rate()
    result["bytes_per_second"] = rate
    if not arguments.skip_correctness:
        for model, dtype in (("demo", "float32"), ("demo", "bfloat16"), ("demo", "float16"), ("demo-bf16", "bfloat16")):
            part(f"check {model} {dtype}", "correctness", partial(check, model, dtype))
    shape = random_llama.LLAMA_8B
    with tempfile.TemporaryDirectory() as scratch:
        written: dict[str, Path] = {}
        for kind in arguments.kinds:
            write = partial(random_llama.write, shape, Path(scratch) / kind, quantized=kind == "int4", device="cuda")
            if folder := part(f"write {kind}", "", write):
                written[kind] = folder
                for graphs in (True,) if arguments.graphs_only else (True, False):
                    part(f"{kind}, graphs {graphs}", "decode", partial(ours, f"relinear {kind}", folder, graphs, rate))
        if (folder := written.get("bf16")) and not arguments.skip_peers:
            bound = 2 * shape.linear_parameters / rate
            part("transformers generate", "decode", partial(peer_generate, folder, bound))
            part("transformers generate_batch", "decode", partial(peer_batching, folder, bound))
    print("\n" + "\n".join(
        f"{r['peer']:34} {r['batch']:3} {r['tokens_per_second']:9.1f} tok/s {r['of_bound']:5.0%}" for r in result["decode"]
    ))  # fmt: skip
    for failure in failures:
        print(f"FAILED: {failure}")
    print_json("gpu_engine", **result)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
