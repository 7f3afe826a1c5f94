"""Look at a checkpoint without reading a weight: the plan of loading, and what attention would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attention.base import AttentionError, UnsupportedAttention
from attention.hf import read_layers
from attention.registry import select
from quant.kernels.native import build
from runtime.checkpoint import Checkpoint
from runtime.errors import LoadError
from runtime.plan import ABSORBED, LoadPlan, make_plan
from runtime.report import attention_lines, inspect_data, inspect_text


@dataclass(frozen=True)
class Inspection:
    """Prints as a table; ``data()`` is the same for programs."""

    plan: LoadPlan
    attention: list[tuple[str, str]]

    def data(self) -> dict[str, Any]:
        return inspect_data(self.plan, self.attention)

    def __str__(self) -> str:
        return inspect_text(self.plan, self.attention)


def inspect(
    model: str | Path,
    *,
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    kernel: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attention_backend: str | None = None,
    weight_only: bool | None = None,
    lm_head_quantization: str | None = None,
    activation_quantization: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Inspection:
    """What loading ``model`` would do: every module's format, kernel and bytes, what stays dense and why, tensors without
    an owner. Raises :class:`LoadError` if it cannot be loaded at all; an attention that the engine cannot serve is
    reported, not raised, because ``load_model`` does not need it. A Hub repository is downloaded first."""
    plan = make_plan(
        Checkpoint.open(model, revision, code=trust_remote_code),
        dtype=dtype,
        device=device,
        quantization=quantization,
        quantization_config=quantization_config,
        kernel=kernel,
        weight_only=weight_only,
        lm_head_quantization=lm_head_quantization,
        activation_quantization=activation_quantization,
        trust_remote_code=trust_remote_code,
    )
    try:
        layers = read_layers(plan.config, plan.trust_remote_code, plan.dtype)
        plan = plan.dequantizing(layers.absorbed, ABSORBED)
        lines = attention_lines(layers, select(layers.attention, plan.device, attention_backend, build))
    except UnsupportedAttention as error:
        lines = [("attention", f"the engine cannot serve this model: {error}")]
    except AttentionError as error:
        raise LoadError(str(error)) from error
    return Inspection(plan, lines)
