"""Small operators of modelling code that take longer to launch, or to call from Python, than to compute, each as one kernel.

RMS normalisation, gated activation and rotary embedding are a dozen operators a layer as they are written, and in a decoding
step as long as the products. Which code computes what is decided by running it (:mod:`runtime.operators.recognize`): a
module is replaced if its results are, bit for bit, those of a formula that a kernel has. Kernels round where the formulas
round, and differ from them only in the order of a sum and the last bits of ``exp`` and ``rsqrt``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.operators.recognize import gate_of, norm_of, rotary_forward

if TYPE_CHECKING:
    from runtime.operators.modules import Kernels


def replace_operators(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Let modules of ``model`` compute what they compute in fewer calls. What was replaced, for the report; empty where
    nothing is: on devices without kernels, and in types that they do not take."""
    kernels = kernels_of(device)
    return "" if kernels is None or dtype not in kernels.DTYPES else replace_with(kernels, model)


@cache
def kernels_of(device: torch.device) -> Kernels | None:
    """What there is for a device."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from runtime.operators import kernels

        return kernels
    if device.type == "cpu":
        from runtime.operators import cpu

        return cpu if cpu.SOURCE.refusal is None else None
    return None


def replace_with(kernels: Kernels, model: nn.Module) -> str:
    """:func:`replace_operators`, by ``kernels`` of whatever device."""
    from runtime.operators import modules

    counts: Counter[str] = Counter()
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's already
            continue
        if (norm := norm_of(module)) is not None:
            modules.use_norm(module, norm, kernels)
            counts["norms"] += 1
        elif (gate := gate_of(module)) is not None:
            modules.use_gate(module, gate, kernels)
            counts["gated activations"] += 1
        elif (forward := rotary_forward(module, _rotate(kernels))) is not None:
            module.forward = forward
            counts["rotary embeddings"] += 1
    return ", ".join(f"{count} {what}" for what, count in counts.items())


@cache
def _rotate(kernels: Kernels) -> Callable[..., Any]:
    """One object for all modules, by which :func:`rotary_forward` knows what it has made before."""
    from runtime.operators import modules

    return partial(modules.rotate, kernels)
