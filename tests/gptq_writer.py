"""A GPTQ writer of our own, for models and shapes that the committed checkpoints do not have: rounding to nearest, packed by
:mod:`tests.packers`. ``tests/quant/test_gptq.py`` checks the same packers layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.packers import pack_rows


def quantize(weight: Tensor, bits: int, group: int, act_order: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one layer in format ``gptq_v2``, and the weight that they stand for, both from ``W [out, in]``."""
    outputs, inputs = weight.shape
    g_idx = np.arange(inputs) // group
    if act_order:
        g_idx = np.random.default_rng(inputs).permutation(g_idx)
    w, top = weight.double().numpy(), 2**bits - 1
    scales, zeros = np.zeros((g_idx.max() + 1, outputs), np.float16), np.zeros((g_idx.max() + 1, outputs), np.int64)
    for g in range(len(scales)):
        columns = w[:, g_idx == g]
        low, high = columns.min(1).clip(max=0), columns.max(1).clip(min=0)
        scales[g] = ((high - low) / top).clip(1e-5)
        zeros[g] = (-low / scales[g]).round().clip(0, top)
    wide = scales.astype(np.float64)[g_idx].T
    codes = (w / wide + zeros[g_idx].T).round().clip(0, top).astype(np.int64)
    values = torch.from_numpy((codes - zeros[g_idx].T) * wide).to(weight.dtype)
    tensors = {
        "qweight": pack_rows(codes, bits).T,
        "qzeros": pack_rows(zeros, bits),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}, values


def write_gptq(
    model: nn.Module, folder: Path, bits: int, group: int, act_order: bool, dense: tuple[str, ...] = ("lm_head",)
) -> None:
    """Save a Transformers model as a GPTQ checkpoint; the model itself is changed to the dequantized weights, so that it is
    its own reference."""
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D) or name in dense or f"{name}.weight" not in stored:
            continue
        turned = type(module) is Conv1D  # GPTQModel turns its weight to [out, in] first
        tensors, values = quantize(module.weight.data.t() if turned else module.weight.data, bits, group, act_order)
        module.weight.data = values.t() if turned else values
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{local}": tensor for local, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
