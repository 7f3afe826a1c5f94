"""Mixture-of-experts checkpoints in every format, written expert by expert, beside the dense model they stand for.

The dense twin holds the dequantized weights under the same names; Transformers' own merging of experts reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.families import Family, mxfp4
from tests.tiny_models import tiny_model

LINEAR = re.compile(r"\.(\w+_proj(_with_mqa)?|w[123])\.weight$")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
ROUTED = {"moe_intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": ROUTED | {"mlp_only_layers": [0]},
    "qwen2_moe": ROUTED | {"shared_expert_intermediate_size": 32, "layer_types": ["full_attention"] * 2},
    "deepseek_v3": ROUTED,
    "olmoe": {},
    "glm4_moe": ROUTED,
    "phimoe": {},
}
"""Tiny models whose experts are stored one by one, and how they differ from :mod:`tests.tiny_models`'."""


def moe_model(name: str, **changes: Any) -> PreTrainedModel:
    """One of :data:`MODELS`, in sizes that every format can hold."""
    return tiny_model(name, **SIZES | MODELS[name] | changes)


def write_moe(
    model: PreTrainedModel, folder: Path, family: Family, wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Save a model in ``folder``, its linear layers and experts quantized if ``wanted`` says so of a stored name, and the
    dense twin in ``folder / "dense"``."""
    for place in (folder, folder / "dense"):
        model.save_pretrained(place)
    stored = load_file(folder / "model.safetensors")
    dense = dict(stored)
    for name, weight in dense.items():
        if LINEAR.search(name) and weight.shape[0] % 8 == 0 == weight.shape[1] % 32 and wanted(name):
            tensors, dense[name] = family.quantize(weight)
            del stored[name]
            stored |= {name.removesuffix("weight") + local: tensor for local, tensor in tensors.items()}
    _save(folder, stored, family.config)
    _save(folder / "dense", dense)


def write_mxfp4(model: PreTrainedModel, folder: Path) -> None:
    """Save gpt-oss as its makers do: all experts of a projection in one tensor, outputs before inputs."""
    for place in (folder, folder / "dense"):
        model.save_pretrained(place)
    stored = load_file(folder / "model.safetensors")
    dense = dict(stored)
    for name, weight in dense.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors, values = mxfp4(weight.transpose(1, 2))
            dense[name] = values.transpose(1, 2).contiguous()
            del stored[name]
            stored[f"{name}_blocks"] = tensors["weight_packed"].unflatten(-1, (-1, 16))
            stored[f"{name}_scales"] = tensors["weight_scale"]
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _save(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    _save(folder / "dense", dense)


def dense_twin(folder: Path) -> PreTrainedModel:
    """The model that a checkpoint of these writers stands for, merged by Transformers."""
    return AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()


def _save(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None = None) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
