"""The output head in fewer bits, of whatever checkpoint: what reads most of a small model's bytes for every token.

It is loaded dense, shared with the embedding or not, and rounded to int8 with one scale an output; an embedding that shared its
weight keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quant import kernels
from quant.base import NoKernel, WeightKind, blank
from quant.linear import quantize_linear, set_module
from quant.onload.rounding import Rounding
from runtime.errors import LoadError
from runtime.linear_plan import ModulePlan, explained

if TYPE_CHECKING:
    from runtime.plan import LoadPlan

WAYS = ("int8",)
"""What ``--lm-head-quantization`` may ask for."""


def plan_head(
    model: Any, modules: Mapping[str, ModulePlan], dtype: torch.dtype, device: torch.device, way: str, asked: str | None
) -> ModulePlan:
    """The plan of the output head of ``model`` (on the meta device), which ``modules`` leave dense; ``asked`` is the kernel's
    name. Raises :class:`LoadError` or :class:`NoKernel` if it cannot be quantized."""
    if way not in WAYS:
        raise LoadError(f"--lm-head-quantization {way}: unknown; choose one of {', '.join(WAYS)}.")
    head = model.get_output_embeddings()
    planned = next((modules.get(name) for name, module in model.named_modules() if module is head), None)
    if planned is None:
        raise LoadError(f"--lm-head-quantization: {type(model).__name__} has no output head that is a linear layer.")
    if planned.scheme is not None:
        raise LoadError(
            f"--lm-head-quantization: {planned.name} is quantized already ({planned.scheme}). Leave the option out."
        )
    rounding = Rounding({}, dtype, WeightKind.INT8, -1)
    scheme = rounding.scheme(planned.shape)
    try:
        choice = kernels.choose(scheme, planned.shape, device, asked)
    except NoKernel as error:
        raise NoKernel(f"{planned.name}: {error}") from error
    return replace(
        planned,
        scheme=scheme,
        choice=choice,
        reason=explained(choice, "the output head, rounded to int8 (--lm-head-quantization)"),
        nbytes=kernels.held_bytes(choice.kernel, scheme, planned.shape, rounding.scale_dtype),
        packed_bytes=blank(scheme, planned.shape, rounding.scale_dtype).nbytes,
        rounding=rounding,
    )


def quantize_rounded(model: nn.Module, plan: LoadPlan) -> None:
    """Quantize what the plan reads dense, now that it is loaded."""
    ties: Any = getattr(model, "all_tied_weights_keys", {})
    for planned in plan.quantized:
        if planned.rounding is None:
            continue
        dense = model.get_submodule(planned.name)
        assert isinstance(dense, nn.Linear)
        assert planned.choice is not None
        set_module(model, planned.name, quantize_linear(planned.name, dense, planned.rounding, planned.choice.kernel))
        ties.pop(f"{planned.name}.weight", None)  # there is no weight any more that could be shared
