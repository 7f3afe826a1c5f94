"""Quantizing a dense checkpoint while it loads: which ways there are, by name, and their options.

A way is a :class:`quant.onload.base.OnLoad`. It is asked layer by layer, as the weights come; it knows no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quant.base import Activation, UnsupportedCheckpoint, WeightKind
from quant.onload import bnb
from quant.onload.base import OnLoad
from quant.onload.options import Options
from quant.onload.rounding import Rounding
from quant.registry import ALIASES, known_methods, method_class

GROUP = 128
"""Inputs that share a scale of an integer weight, if nothing is said."""

FIXED = {
    "fp8": (WeightKind.FP8, -1, Activation(WeightKind.FP8)),
    "mxfp4": (WeightKind.E2M1, 32, None),
    "w8a8_int8": (WeightKind.INT8, -1, Activation(WeightKind.INT8)),
}
"""Ways without options: kind, group (-1: one an output), and what happens to inputs."""

INTEGERS = {kind.value: kind for kind in WeightKind if kind.is_integer}
NAMES = (*INTEGERS, "bitsandbytes", *FIXED)
"""What ``--quantization`` may ask for where the checkpoint is dense."""

WRITERS = {
    "auto-round": "auto-round",
    "awq": "llm-compressor (AWQModifier) or GPTQModel",
    "compressed-tensors": "llm-compressor",
    "gptq": "GPTQModel or llm-compressor (GPTQModifier)",
    "modelopt": "NVIDIA's Model Optimizer",
}
"""Formats whose values are found by calibration, and who finds them."""


def create(
    asked: str | None, config: Mapping[str, Any] | None, dense: Mapping[str, str], dtype: torch.dtype
) -> OnLoad | None:
    """The way that is asked for by name, or implied by an option; ``None`` if nothing is.

    ``dense`` maps the layers that are left alone to the reason; ``dtype`` is that of the weights that will come. Raises
    :class:`UnsupportedCheckpoint` for names and options that mean nothing here.
    """
    options = Options.of(config)
    if asked is None and not config:
        return None
    if asked is None and (options.load_in_4bit or options.load_in_8bit):
        asked = "bitsandbytes"
    if asked is None:
        raise UnsupportedCheckpoint(
            f"{', '.join(config or ())} say how to quantize while loading, but not to what: add --quantization with one of "
            f"{', '.join(NAMES)}."
        )
    name = "bitsandbytes" if asked == "bnb" else asked
    if name == "bitsandbytes":
        options.only(name, *Options.BITSANDBYTES)
        return bnb.create(options, dense, dtype)
    if name in INTEGERS:
        options.only(name, "group_size", "symmetric")
        kind = INTEGERS[name]
        # 8 bits have range to spare; fewer need all of it.
        symmetric = kind is WeightKind.INT8 if options.symmetric is None else options.symmetric
        return Rounding(dense, dtype, kind, options.group_size or GROUP, symmetric)
    if name in FIXED:
        options.only(name)
        kind, group, activation = FIXED[name]
        return Rounding(dense, dtype, kind, group, activation=activation)
    raise UnsupportedCheckpoint(_cannot(asked))


def _cannot(asked: str) -> str:
    """Why a dense checkpoint cannot be loaded as what was asked for, and what to do."""
    offered = ", ".join(NAMES)
    name = ALIASES.get(asked, asked)
    if name not in known_methods():
        known = ", ".join(sorted({*known_methods(), *NAMES}))
        return f"--quantization {asked}: no such format; known: {known}."
    method_class(name)  # a plugin that is broken says so itself
    writer = WRITERS.get(name)
    needs = f"Such checkpoints need calibration and are written by {writer}. " if writer else ""
    return (
        f"--quantization {asked} was asked for, but the checkpoint says it is not quantized. {needs}To quantize this one "
        f"while it loads, choose one of {offered}; to load it as it is, leave the option out."
    )
