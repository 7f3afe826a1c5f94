"""The model without weights: its device, dtype, configuration and module tree, from the checkpoint's configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from runtime.checkpoint import Checkpoint, tensor_bytes
from runtime.errors import LoadError

DTYPE_NAMES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto``: CUDA if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise LoadError(f"device {device!r} is not known to torch; try 'cpu' or 'cuda'.") from error
    if place.type not in ("cpu", "cuda"):
        raise LoadError(f"device {device} is not supported; choose 'cpu' or 'cuda'.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(
            f"device {device} was asked for, but torch {torch.__version__} sees no CUDA device here. Try 'cpu'."
        )
    return place


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of activations and dense weights, and a remark if it is not the checkpoint's own.

    ``auto`` is what the configuration says, or what most dense tensors are stored in; but bfloat16 instead of float16 on
    a CPU, which has no fast float16 matrix multiply and no reason to risk its overflows.
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPE_NAMES.values():
            raise LoadError(f"{dtype} is no dtype to compute in; choose {', '.join(DTYPE_NAMES)}.")
        return dtype, ""
    if dtype != "auto":
        if dtype not in DTYPE_NAMES:
            raise LoadError(f"dtype {dtype!r} is not known; choose auto, {', '.join(DTYPE_NAMES)}.")
        return DTYPE_NAMES[dtype], ""
    text = checkpoint.config.get("text_config") or {}
    named = next((v for c in (checkpoint.config, text) for k in ("dtype", "torch_dtype") if (v := c.get(k))), None)
    stored = DTYPE_NAMES.get(str(named).removeprefix("torch."))
    if stored is None:
        sizes = dict.fromkeys(DTYPE_NAMES.values(), 0)
        for spec in checkpoint.tensors.values():
            if spec.dtype in sizes:
                sizes[spec.dtype] += tensor_bytes(spec)
        stored = max(sizes, key=lambda d: sizes[d])
    if stored == torch.float16 and device.type == "cpu":
        return torch.bfloat16, "float16 in the checkpoint; bfloat16 is the CPU's fast 16-bit type"
    return stored, ""


def read_model_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The Transformers configuration, without its quantization part. Imports code of the checkpoint only if trusted."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = str(checkpoint.config.get("model_type"))
    if not trust_remote_code and model_type not in CONFIG_MAPPING_NAMES:
        import transformers

        if checkpoint.remote_code():
            raise LoadError(
                f"{checkpoint.folder}: model type {model_type!r} needs Python code from the checkpoint "
                f"({', '.join(checkpoint.remote_code())}: auto_map). Read that code; if you trust it, "
                "pass --trust-remote-code (trust_remote_code=True) with a pinned --revision."
            )
        raise LoadError(
            f"{checkpoint.folder}: model type {model_type!r} (config.json) is not known to Transformers "
            f"{transformers.__version__}, and the checkpoint brings no code for it. A newer Transformers may know it."
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise LoadError(f"{checkpoint.folder / 'config.json'}: Transformers rejects it: {error}") from error
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def build_meta_model(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The model's tree without memory behind it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise LoadError(
            f"{type(config).__name__} cannot be built as a causal language model: {error}. "
            "Only decoder models that Transformers' AutoModelForCausalLM knows are supported."
        ) from error
