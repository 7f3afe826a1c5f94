"""Quantize the bundled demonstration model with GPTQModel itself: GPTQ, 4 bit, groups of 128, zero points.

For the accuracy matrix, which compares what real quantizers lose; the runtime does not ship the result.

    python3 -m venv build/gptq
    build/gptq/bin/pip install torch==2.13.0 transformers==5.23.0 gptqmodel==7.7.0
    build/gptq/bin/python -m benchmarks.quantize_demo_gptq --model runtime/bundled/bf16 \\
        --calibration build/texts/calibration.jsonl --out tests/accuracy/gptq

The windows are those that AutoAWQ searched on (``benchmarks/quantize_demo.py``), in the settings the library chooses by
itself. ``calibration.jsonl`` is what ``benchmarks/train_demo.py`` writes before it trains. No GPU is needed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from transformers import PreTrainedTokenizerFast

from benchmarks.calibration import calibration_windows, copy_tokenizer, parse_arguments

KEPT = ("config.json", "model.safetensors")
"""Of what the library writes; its quantize_config.json says the same again, and the tokenizer is the original's."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.manual_seed(0)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    windows = calibration_windows(arguments.calibration, tokenizer, arguments.windows)
    config = QuantizeConfig(bits=4, group_size=128, sym=False, offload_to_disk=False)
    model = GPTQModel.load(str(arguments.model), config, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows], batch_size=1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save(scratch)
        for name in KEPT:
            shutil.copyfile(Path(scratch) / name, arguments.out / name)
    copy_tokenizer(arguments.model, arguments.out)


if __name__ == "__main__":
    main()
