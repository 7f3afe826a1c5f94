"""Which checkpoint formats are proved to load, by which committed checkpoint: the data behind ``test_formats`` and behind
the table in README.

    python -m tests.formats --write      writes the table into README.md
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from quant.kernels import cpu
from quant.kernels.wna16 import Wna16Kernel
from quant.refused import REFUSED
from runtime.checkpoint import Checkpoint
from runtime.plan import make_plan
from tests.families import FAMILIES
from tests.moe_writer import MODELS
from tests.refusals import REFUSALS

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "tests" / "checkpoints"
BEGIN, END = "<!-- formats: written by python -m tests.formats --write -->", "<!-- /formats -->"


@dataclass(frozen=True)
class Case:
    """One committed checkpoint, and how far logits may be from the writer's own.

    ``tolerance`` is the largest difference, with any kernel; writers compute in float16 or bfloat16. ``None``: the writer's
    logits are not those of the file, or there are none, and weights alone are compared. ``mean``: the mean difference
    when we compute in the writer's ``dtype`` and arithmetic, which is the reference's. ``inputs`` are quantized too:
    rounding moves their codes, so only the writer's dtype can reproduce it. ``bites``: logits alone would give a wrong
    weight away; 8 bits move them too little. ``logits``: the folder with those
    of a gemm file of the same weights, where the writer could not run its own file.
    """

    family: str
    variant: str
    writer: str
    checkpoint: str
    tolerance: float | None
    mean: float | None = None
    dtype: str = "float32"
    inputs: bool = False
    bites: bool = True
    logits: str | None = None

    @property
    def folder(self) -> Path:
        return CHECKPOINTS / self.checkpoint

    @property
    def reference(self) -> Path:
        """The file with the logits to reproduce."""
        return CHECKPOINTS / (self.logits or self.checkpoint) / "reference.safetensors"


FP16: dict[str, Any] = {"tolerance": 0.013}
"""Writers that compute in float16."""
FP32: dict[str, Any] = {"tolerance": 0.005, "mean": 0.0005}
"""auto-gptq, which computes in float32, but with rotary frequencies that had been rounded to float16: 5e-6 is left when we do
so too (``test_writers``)."""
BF16: dict[str, Any] = {"tolerance": 0.1, "mean": 0.01, "dtype": "bfloat16"}
"""Writers that compute in bfloat16: the noise of their arithmetic, with quantized inputs or without."""
EIGHT: dict[str, Any] = {"bites": False}
"""Weights of 8 bits."""
WIDE = BF16 | EIGHT
W8A8 = WIDE | {"inputs": True}
LLM_INT8 = W8A8 | {"tolerance": 0.25, "mean": 0.025}
"""bitsandbytes leaves whole columns of a batch unrounded where one token has an outlier, here each token is computed as it
would be alone: 13 columns of its inputs in all. Nothing is left when we do so too (``test_writers``)."""
WEIGHTS: dict[str, Any] = {"tolerance": None}
"""The logits are those of a quantized KV cache, and modelopt's also of other codes than it exported: ``test_writers`` and
``test_quantized_inputs`` reproduce them, ``test_kv_scales`` through the engine."""
BNB4: dict[str, Any] = {"tolerance": 0.1, "mean": 0.015}
"""bitsandbytes rounds absmax and the table to bfloat16 on a CPU, and the sum before it adds the bias: 0.003 is left in the mean
when we do so too (``test_writers``)."""

AUTOAWQ, GPTQMODEL, AUTOGPTQ, AUTOROUND = "AutoAWQ 0.2.9", "GPTQModel 7.7.0", "auto-gptq 0.7.1", "auto-round 0.15.1"
BNB, TRANSFORMERS, MODELOPT = "bitsandbytes 0.50.2", "Transformers 5.23", "modelopt 0.47.0"
CT, CT_OLD, LLMC = "compressed-tensors 0.20.0", "compressed-tensors 0.12.2", "llmcompressor 0.14.0"
COMPRESSED = "compressed-tensors"

INTEGER_CASES = [
    Case("AWQ", "gemm, 4 bit, group 128, zero points", AUTOAWQ, "autoawq--gemm-g128", **FP16),
    Case("AWQ", "gemm, 8 bit, zero points", GPTQMODEL, "gptqmodel--awq-gemm-w8", **FP16, **EIGHT),
    Case("AWQ", "gemv, 4 bit, group 128", AUTOAWQ, "autoawq--gemv-g128", **FP16, logits="autoawq--gemm-g128"),
    Case(
        "AWQ", "gemv_fast, 4 bit, group 64", AUTOAWQ, "autoawq--gemv_fast-g64", **FP16, logits="autoawq--gemv_fast-g64"
    ),
    Case("AWQ", "marlin, 4 bit, symmetric", AUTOAWQ, "autoawq--marlin-g128", tolerance=None),
    Case("GPTQ", "3 bit, zero points", AUTOGPTQ, "auto-gptq--w3g32-asym", **FP32 | {"tolerance": 0.0065}),
    Case("GPTQ", "4 bit, act-order", AUTOGPTQ, "auto-gptq--w4g32-desc", **FP32),
    Case("GPTQ", "4 bit, act-order, static groups", AUTOGPTQ, "auto-gptq--w4g32-desc-static", **FP32),
    Case("GPTQ", "2 bit, symmetric", GPTQMODEL, "gptqmodel--gptq-w2-sym", **FP16),
    Case("GPTQ", "gptq_p (planar), 3 bit", GPTQMODEL, "gptqmodel--gptq-w3-planar", **FP16),
    Case("GPTQ", "gptq_v2, 4 bit, zero points", GPTQMODEL, "gptqmodel--gptq-w4-asym-v2", **FP16),
    Case("GPTQ", "dynamic: 4 and 8 bit, dense, groups", GPTQMODEL, "gptqmodel--gptq-w4-dynamic", **FP16),
    Case("GPTQ", "4 bit in int8 words", GPTQMODEL, "gptqmodel--gptq-w4-int8", **FP16),
    Case("GPTQ", "4 bit, lm_head in 8 bit", GPTQMODEL, "gptqmodel--gptq-w4-lm-head", **FP16),
    Case("AutoRound", "as AWQ gemm, zero points", AUTOROUND, "auto-round--auto_awq", tolerance=None),
    Case("AutoRound", "auto_round:auto_gptq, symmetric", AUTOROUND, "auto-round--auto_round-sym", tolerance=None),
]
"""Formats of integers that leave inputs alone."""

FLOAT_CASES = [
    Case("bitsandbytes", "NF4, double quantization, stored as bfloat16", BNB, "bitsandbytes--nf4-storage-bf16", **BNB4),
    Case("bitsandbytes", "FP4", BNB, "bitsandbytes--fp4", **BNB4),
    Case("bitsandbytes", "LLM.int8, inputs int8 except outliers", BNB, "bitsandbytes--int8", **LLM_INT8),
    Case("FP8", "blocks of 128x128", TRANSFORMERS, "transformers-fp8--block128", **WIDE),
    Case("FP8", "one scale, static inputs", TRANSFORMERS, "transformers-fp8--tensor-static", **WIDE),
    Case("modelopt", "FP8, static inputs, FP8 KV cache", MODELOPT, "modelopt--fp8-kv", **WEIGHTS),
    Case("modelopt", "FP8_PB_WO", MODELOPT, "modelopt--fp8-pb-wo", **WIDE),
    Case(COMPRESSED, "pack, 3 bit, group 64, zero points", CT, "compressed-tensors--w3a16-g64-asym", **BF16),
    Case(COMPRESSED, "pack, quantized lm_head", CT, "compressed-tensors--lm-head-too", **BF16),
    Case(COMPRESSED, "FP8, static inputs", CT, "compressed-tensors--fp8-static", **W8A8),
    Case(COMPRESSED, "FP8, blocks, inputs per 128", CT, "compressed-tensors--fp8-block", **W8A8),
    Case(COMPRESSED, "NVFP4 weights", CT, "compressed-tensors--nvfp4a16", **BF16),
    Case(COMPRESSED, "MXFP4 weights", CT, "compressed-tensors--mxfp4a16", **BF16),
    Case(
        COMPRESSED,
        "4-bit pack and FP8 by regular expression",
        CT,
        "compressed-tensors--mixed-regex",
        **BF16,
        inputs=True,
    ),
    Case(COMPRESSED, "3 bit in padded words", CT_OLD, "compressed-tensors-0.12--w3-padded", **FP16),
    Case(COMPRESSED, "4 bit, act-order by group", CT_OLD, "compressed-tensors-0.12--w4-actorder-group", **FP16),
    Case(COMPRESSED, "GPTQ, 4 bit, group 128", LLMC, "llmcompressor--gptq-w4a16", **BF16),
    Case(COMPRESSED, "AWQ, 4 bit, group 64, zero points", LLMC, "llmcompressor--awq-w4-asym", **BF16),
    Case(COMPRESSED, "int8, inputs per token", LLMC, "llmcompressor--w8a8-int8", **W8A8),
    Case(COMPRESSED, "FP8, static inputs, FP8 KV cache", LLMC, "llmcompressor--fp8-static-kv", **WEIGHTS),
]
"""Formats with floats or with quantized inputs, and compressed-tensors."""

CASES = INTEGER_CASES + FLOAT_CASES

EXECUTES, DEQUANTIZES, REFUSES = "executes", "dequantizes", "refused"


def states(folder: Path) -> list[str]:
    """What is done with the layers of a checkpoint on a CPU where C can be compiled, on an NVIDIA GPU, and elsewhere."""
    plan = make_plan(Checkpoint.open(folder), device="cpu", weight_only=False)
    assert plan.method is not None
    layers, here = [(layer.scheme, layer.shape) for layer in plan.quantized if layer.scheme], torch.device("cpu")
    rounded = any(scheme.activation for scheme, _ in layers)
    compiled = (None, cpu.SOURCE.refusal)
    in_c = [cpu.CpuKernel().refuses(*layer, here) in compiled for layer in layers]
    with patch.dict(os.environ, TRITON_INTERPRET="1"):  # or the kernel would ask for a GPU
        in_triton = [Wna16Kernel().refuses(*layer, here) is None for layer in layers]
    found = []
    for device, taken in (("cpu", in_c), ("cuda", in_triton), ("others", [False])):
        state = EXECUTES if all(taken) else f"{EXECUTES} some layers" if any(taken) else DEQUANTIZES
        found.append(f"{state}, inputs too" if rounded and plan.method.executes_inputs(device) else state)
    return found


def refusals() -> dict[str, list[str]]:
    """What is refused, by family; last the formats of which nothing is read."""
    found: dict[str, list[str]] = {}
    for refusal in REFUSALS:
        found.setdefault(refusal.family, []).append(refusal.what)
    return found | {"others": [f"`{name}`" for name in REFUSED]}


def table() -> str:
    """The table as Markdown: a row a case, then a row for what each family refuses."""
    rows = ["| format | variant | verified against | CPU | NVIDIA GPU | elsewhere |", "|---|---|---|---|---|---|"]
    for case in CASES:
        writer = f"{case.writer}, weights" if case.tolerance is None or case.logits else case.writer
        rows.append(f"| {case.family} | {case.variant} | {writer} | {' | '.join(states(case.folder))} |")
    families = ", ".join(family.title for family in FAMILIES.values())
    models = ", ".join(MODELS)
    for name, variant in ((f"experts, each by itself ({models})", families), ("experts, stacked (gpt_oss)", "mxfp4")):
        rows.append(
            f"| {name} | {variant} | Transformers, dequantized weights | {EXECUTES} | {EXECUTES}; not tested | {DEQUANTIZES} |"
        )
    rows.append("| none | float32, bfloat16, float16 | Transformers | torch | torch | torch |")
    for family, refused in refusals().items():
        rows.append(f"| {family} | {', '.join(refused)} | by name | {' | '.join([REFUSES] * 3)} |")
    return "\n".join(rows)


def readme_with_table(text: str) -> str:
    """README with the present table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    readme = ROOT / "README.md"
    readme.write_text(readme_with_table(readme.read_text()))
