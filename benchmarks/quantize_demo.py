"""Quantize the bundled demonstration model with AutoAWQ itself: 4 bit, groups of 128, zero points, GEMM packing.

The AWQ checkpoint is there to show that the runtime reads what the wild holds, so the original writer makes it. AutoAWQ
0.2.9 is its last release and was last tested with Transformers 4.51.3, hence an environment of its own:

    python3 -m venv build/awq
    build/awq/bin/pip install torch==2.13.0 transformers==4.51.3 autoawq==0.2.9 accelerate
    build/awq/bin/python -m benchmarks.quantize_demo --model runtime/bundled/bf16 \\
        --calibration build/texts/calibration.jsonl --out runtime/bundled/awq

No GPU is needed; two CPU cores take a few minutes. AutoAWQ converts the model to float16 before it searches, and writes
scales, norms and the embedding in float16; that changes nothing of note here, since every bf16 weight of this model
either is exact in float16 or lies below its smallest normal number (the script checks the larger end). The embedding is
not quantized and, being tied to the output head, is stored once. The tokenizer files are copied unchanged: Transformers
4 could read them, but would write them in its own form.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from transformers import PreTrainedTokenizerFast

CONFIG = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}
WINDOW = 512
COPIED = ("tokenizer.json", "tokenizer_config.json")


def calibration_windows(path: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> list[list[int]]:
    """``count`` windows spread evenly over the calibration files, each behind a boundary token as in training.

    AutoAWQ is given token ids, not texts: it drops every text longer than a window, which here is nearly every file.
    """
    windows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) - WINDOW + 2, WINDOW - 1):
            windows.append([tokenizer.bos_token_id, *ids[start : start + WINDOW - 1]])
    return [windows[index * len(windows) // count] for index in range(min(count, len(windows)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the bf16 checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration.jsonl that train_demo wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the AWQ checkpoint")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of 512 tokens")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    # Named outright: Transformers 4 does not know the class that Transformers 5 writes into tokenizer_config.json.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    windows = calibration_windows(arguments.calibration, tokenizer, arguments.windows)
    model = AutoAWQForCausalLM.from_pretrained(str(arguments.model), device_map="cpu", torch_dtype=torch.float16)
    largest = max(parameter.abs().max().item() for parameter in model.model.parameters())
    assert largest < torch.finfo(torch.float16).max, f"a weight of magnitude {largest} overflows float16"
    print(f"{len(windows)} calibration windows of {WINDOW} tokens, largest weight {largest:.3f}")

    model.quantize(
        tokenizer,
        quant_config=CONFIG,
        calib_data=windows,
        max_calib_samples=len(windows),
        max_calib_seq_len=WINDOW,
    )
    model.save_quantized(str(arguments.out))
    for name in COPIED:
        shutil.copyfile(arguments.model / name, arguments.out / name)


if __name__ == "__main__":
    main()
