"""What all quantizers of the demonstration model have in common: their arguments, the text they calibrate on, the tokenizer."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerFast

WINDOW = 512
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def parse_arguments(description: str | None) -> argparse.Namespace:
    """``model``, ``calibration`` and ``out`` (paths) and ``windows``, of the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the bf16 checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration.jsonl that train_demo wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the quantized checkpoint")
    parser.add_argument("--windows", type=int, default=128, help=f"calibration windows of {WINDOW} tokens")
    return parser.parse_args()


def calibration_windows(path: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> list[list[int]]:
    """``count`` windows of :data:`WINDOW` tokens spread evenly over the files of ``calibration.jsonl``, each behind a boundary
    token as in training.

    Quantizers are given token ids, not texts: AutoAWQ drops every text longer than a window, which here is nearly every file.
    """
    windows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) - WINDOW + 2, WINDOW - 1):
            windows.append([tokenizer.bos_token_id, *ids[start : start + WINDOW - 1]])
    return [windows[index * len(windows) // count] for index in range(min(count, len(windows)))]


def copy_tokenizer(model: Path, out: Path) -> None:
    """The tokenizer's files as the original has them; what a quantizer saves depends on its Transformers."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(model / name, out / name)
