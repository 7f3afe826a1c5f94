"""The text that quantizers of the demonstration model are calibrated on: the same windows for all of them."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

WINDOW = 512


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
