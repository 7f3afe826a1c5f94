"""Which checkpoint formats are known, by name, imported only when asked for.

Strangers add a format without touching this file: a package with an entry point in the group ``relinear.quant_methods``
whose value is a :class:`quant.base.QuantMethod` subclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from quant.base import QuantMethod, TensorSpec, UnsupportedCheckpoint
from quant.methods.selection import method_of
from quant.refused import refusal

ENTRY_POINTS = "relinear.quant_methods"
BUILT_IN = {
    "auto-round": "quant.methods.auto_round:AutoRound",
    "awq": "quant.methods.awq:AWQ",
    "bitsandbytes": "quant.methods.bnb:BitsAndBytes",
    "compressed-tensors": "quant.methods.compressed:CompressedTensors",
    "fp8": "quant.methods.fp8:FP8",
    "gptq": "quant.methods.gptq:GPTQ",
    "modelopt": "quant.methods.modelopt:ModelOpt",
}
ALIASES = {
    "auto_round": "auto-round",
    "autoround": "auto-round",
    "awq_marlin": "awq",
    "bnb": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "fbgemm_fp8": "fp8",
    "gptq_marlin": "gptq",
    "marlin": "gptq",
    "modelopt_fp8": "modelopt",
    "mxfp8": "fp8",
}
"""Other spellings: of other runtimes, some of which name a format together with a kernel, and of a format's dialects."""


def known_methods() -> list[str]:
    """Names of every format that can be loaded, built-in and installed, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def method_class(name: str) -> type[QuantMethod]:
    """The class behind a known name."""
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        return getattr(import_module(module), attribute)
    return next(iter(entry_points(group=ENTRY_POINTS, name=name))).load()


def resolve(config: Mapping[str, Any], headers: Mapping[str, TensorSpec], asked: str | None = None) -> QuantMethod:
    """The one method that reads a checkpoint with this ``quantization_config``.

    ``asked`` is what the user believes the format to be; it only confirms. Raises :class:`UnsupportedCheckpoint` if no
    method answers, if two do, or if the answer is not the one asked for.
    """
    stored = method_of(config)
    answers = [method for name in known_methods() if (method := method_class(name).from_checkpoint(config, headers))]
    known = ", ".join(known_methods())
    if not answers and (why := refusal(stored)):
        raise UnsupportedCheckpoint(f"quant_method {stored!r} is not supported: {why} Known formats: {known}.")
    if not answers:
        raise UnsupportedCheckpoint(
            f"quant_method {stored!r} is not supported; known: {known}. Use a copy of the model in one of these formats."
        )
    if len(answers) > 1:
        names = " and ".join(method.name for method in answers)
        raise UnsupportedCheckpoint(f"quant_method {stored!r} is claimed by {names}; uninstall one of the plugins.")
    confirm(answers[0].name, asked)
    return answers[0]


def confirm(found: str | None, asked: str | None) -> None:
    """Raise :class:`UnsupportedCheckpoint`, naming both, if the user asked for another format than was found."""
    if asked is None or ALIASES.get(asked, asked) == found:
        return
    if asked not in known_methods() and asked not in ALIASES:
        known = ", ".join(known_methods())
        raise UnsupportedCheckpoint(f"--quantization {asked}: no such format; known: {known}.")
    stored = f"its quantization is {found!r}" if found else "it is not quantized"
    raise UnsupportedCheckpoint(
        f"--quantization {asked} was asked for, but the checkpoint says {stored}. "
        "The option only confirms the format; leave it out to load the checkpoint as it is."
    )
