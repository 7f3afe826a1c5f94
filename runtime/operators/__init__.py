"""Small operators of modelling code that a GPU spends more time launching than computing, each as one kernel.

RMS normalisation, gated activation and rotary embedding are a dozen launches a layer as they are written, and in a decoding
step as long as the products. Which code computes what is decided by running it (:mod:`runtime.operators.recognize`): a
module is replaced if its results are, bit for bit, those of a formula that a kernel has. Kernels round where the formulas
round, and differ from them only in the order of a sum and the last bits of ``exp`` and ``rsqrt``.
"""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import torch
from torch import nn

from runtime.operators.recognize import gate_of, norm_of, rotary_forward

HALF = (torch.bfloat16, torch.float16)


def replace_operators(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Let modules of ``model`` compute what they compute in fewer launches. What was replaced, for the report; empty where
    nothing is: on other devices, and in float32, in which results should not depend on it."""
    if device.type != "cuda" or dtype not in HALF or find_spec("triton") is None:
        return ""
    return replace_with_kernels(model)


def replace_with_kernels(model: nn.Module) -> str:
    """:func:`replace_operators`, where Triton runs."""
    from runtime.operators import modules

    counts: Counter[str] = Counter()
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's already
            continue
        if (norm := norm_of(module)) is not None:
            modules.use_norm(module, norm)
            counts["norms"] += 1
        elif (gate := gate_of(module)) is not None:
            modules.use_gate(module, gate)
            counts["gated activations"] += 1
        elif (forward := rotary_forward(module, modules.rotate)) is not None:
            module.forward = forward
            counts["rotary embeddings"] += 1
    return ", ".join(f"{count} {what}" for what, count in counts.items())
