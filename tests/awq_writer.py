"""An AWQ ``gemm`` writer of our own, for models and shapes that the committed checkpoints do not have.

Independent of :mod:`quant`: plain NumPy loops over the layout as the format's documentation gives it, no search (scales are
the ranges of each group). ``tests/quant/test_awq.py`` checks it against files that AutoAWQ wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(codes: np.ndarray) -> np.ndarray:
    """``[rows, columns]`` codes of 4 bits to ``int32 [rows, columns / 8]``."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for nibble, column in enumerate(COLUMN_OF_NIBBLE):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def quantize(weight: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one layer, by local name, and the weight that they stand for, both from ``W [out, in]``."""
    grouped = weight.double().reshape(weight.shape[0], -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half()
    zero = (-low / scale.double()).round().clamp(0, 15)
    codes = (grouped / scale.double()[..., None] + zero[..., None]).round().clamp(0, 15)
    values = ((codes - zero[..., None]) * scale.double()[..., None]).reshape(weight.shape)
    tensors = {
        "qweight": torch.from_numpy(pack_words(codes.reshape(weight.shape).T.numpy().astype(np.uint8))),
        "qzeros": torch.from_numpy(pack_words(zero.T.numpy().astype(np.uint8))),
        "scales": scale.T.contiguous(),
    }
    return tensors, values.to(weight.dtype)


def write_awq(model: nn.Module, folder: Path, group: int = 32, dense: tuple[str, ...] = ("lm_head",)) -> None:
    """Save a Transformers model as an AWQ checkpoint; the model itself is changed to the dequantized weights, so that it
    is its own reference. Layers named in ``dense`` and layers that AWQ cannot hold stay as they are."""
    model.save_pretrained(folder)  # renames parameters to their names on disk
    stored = _load(folder)
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D) or name in dense or f"{name}.weight" not in stored:
            continue
        turned = type(module) is Conv1D
        weight = module.weight.data.t() if turned else module.weight.data
        if weight.shape[1] % group or weight.shape[0] % 8:
            continue
        tensors, values = quantize(weight, group)
        module.weight.data = values.t() if turned else values
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{local}": tensor for local, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": list(dense),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _load(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
