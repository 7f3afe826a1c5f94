"""Which kernel multiplies by a weight: asked in order of preference, every refusal kept.

Importing this package imports no kernel, compiles nothing and touches no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from quant.base import LinearKernel, LinearShape, NoKernel, Scheme

KERNELS = {
    "cpu": "quant.kernels.cpu:CpuKernel",
    "reference": "quant.kernels.reference:ReferenceKernel",
}
"""Where each kernel lives, in order of preference."""


@dataclass(frozen=True)
class Choice:
    """The kernel chosen, and why those before it were not, by name."""

    kernel: LinearKernel
    refusals: Mapping[str, str]


@cache
def create(name: str) -> LinearKernel:
    """The kernel of that name."""
    if name not in KERNELS:
        raise NoKernel(f"unknown kernel {name}; known: {', '.join(KERNELS)}")
    module, _, attribute = KERNELS[name].partition(":")
    kernel: LinearKernel = getattr(import_module(module), attribute)()
    return kernel


def choose(scheme: Scheme, shape: LinearShape, device: torch.device, asked: str | None = None) -> Choice:
    """The kernel ``asked`` for, or the first that does not refuse. One asked for by name never falls back."""
    refusals: dict[str, str] = {}
    for name in KERNELS if asked is None else (asked,):
        kernel = create(name)
        refusal = kernel.refuses(scheme, shape, device)
        if refusal is None:
            return Choice(kernel, refusals)
        refusals[name] = refusal
    reasons = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
    raise NoKernel(f"no kernel for {scheme}, {shape}, on {device}. {reasons}")
