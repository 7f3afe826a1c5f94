"""Which kernel multiplies by a weight: asked in order of preference, every refusal kept.

Importing this package imports no kernel, compiles nothing and touches no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from quant import plugins
from quant.base import LinearKernel, LinearShape, NoKernel, Scheme, blank
from quant.plugins import installed

KERNELS = {
    "cpu": "quant.kernels.cpu:CpuKernel",
    "wna16": "quant.kernels.wna16:Wna16Kernel",
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
    """The kernel of that name, built-in or installed. Raises :class:`NoKernel` if there is none or it cannot be imported."""
    if name in KERNELS:
        module, _, attribute = KERNELS[name].partition(":")
        kernel: LinearKernel = getattr(import_module(module), attribute)()
        return kernel
    plugin = installed(plugins.KERNELS, LinearKernel).get(name)
    if plugin is None:
        raise NoKernel(f"unknown kernel {name}; known: {', '.join(known())}")
    if isinstance(plugin.found, str):
        raise NoKernel(plugin.found)
    return plugin.found()


def known() -> list[str]:
    """Names in the order in which they are asked. Installed ones come after every fast built-in one and before the
    reference: a package takes over what was slow, and replaces what was fast only if it is asked for by name."""
    strangers = [name for name in installed(plugins.KERNELS, LinearKernel) if name not in KERNELS]
    *fast, reference = KERNELS
    return [*fast, *strangers, reference]


def choose(scheme: Scheme, shape: LinearShape, device: torch.device, asked: str | None = None) -> Choice:
    """The kernel ``asked`` for, or the first that does not refuse. One asked for by name never falls back."""
    refusals: dict[str, str] = {}
    for name in known() if asked is None else (asked,):
        try:
            kernel = create(name)
        except NoKernel as error:
            if asked is not None:
                raise
            refusals[name] = str(error)
            continue
        refusal = kernel.refuses(scheme, shape, device)
        if refusal is None:
            return Choice(kernel, refusals)
        refusals[name] = refusal
    reasons = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
    raise NoKernel(f"no kernel for {scheme}, {shape}, on {device}. {reasons}")


@cache
def held_bytes(kernel: LinearKernel, scheme: Scheme, shape: LinearShape, scale_dtype: torch.dtype) -> int:
    """Bytes of a weight as the kernel holds it: codes that it widens, rows and groups that it fills up, counted in."""
    weight = blank(scheme, shape, scale_dtype)
    try:
        return kernel.prepare(weight).nbytes
    except (NotImplementedError, RuntimeError):  # needs values: a plugin that asks for them
        return weight.nbytes
