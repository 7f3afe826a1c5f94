"""Which checkpoint formats are known, by name, imported only when asked for.

Strangers add a format without touching this file: :mod:`quant.plugins`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from quant.base import QuantMethod, TensorSpec, UnsupportedCheckpoint
from quant.methods.selection import method_of
from quant.plugins import METHODS, Plugin, installed
from quant.refused import refusal

BUILT_IN = {
    "auto-round": "quant.methods.auto_round:AutoRound",
    "awq": "quant.methods.awq:AWQ",
    "bitsandbytes": "quant.methods.bnb:BitsAndBytes",
    "compressed-tensors": "quant.methods.compressed:CompressedTensors",
    "fp8": "quant.methods.fp8:FP8",
    "gptq": "quant.methods.gptq:GPTQ",
    "modelopt": "quant.methods.modelopt:ModelOpt",
    "mxfp4": "quant.methods.mxfp4:MXFP4",
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
    return sorted({*BUILT_IN, *_plugins()})


def broken_plugins() -> list[str]:
    """What is wrong with the installed formats that cannot be used; imports all of them."""
    hidden = [f"{plugin}: a built-in format has that name" for name, plugin in _installed().items() if name in BUILT_IN]
    return hidden + [found for plugin in _plugins().values() if isinstance(found := plugin.found, str)]


def method_class(name: str) -> type[QuantMethod]:
    """The class behind a known name. Raises :class:`UnsupportedCheckpoint` if it is a plugin that cannot be imported."""
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        return getattr(import_module(module), attribute)
    found = _plugins()[name].found
    if isinstance(found, str):
        raise UnsupportedCheckpoint(f"{found}. Repair or uninstall that package.")
    return found


def resolve(config: Mapping[str, Any], headers: Mapping[str, TensorSpec], asked: str | None = None) -> QuantMethod:
    """The one method that reads a checkpoint with this ``quantization_config``.

    A plugin under the very name that is stored answers alone; otherwise the built-in ones are asked, and the other plugins
    where none of them answers: installing a package changes nothing for checkpoints that load without it. ``asked`` is what
    the user believes the format to be; it only confirms. Raises :class:`UnsupportedCheckpoint` if no method answers, if two
    do, or if the answer is not the one asked for.
    """
    stored, plugins = method_of(config), _plugins()
    rounds = [[stored]] if stored in plugins else [list(BUILT_IN), [n for n, p in plugins.items() if _works(p)]]
    answers: list[QuantMethod] = []
    for names in rounds:
        answers = answers or [m for name in names if (m := method_class(name).from_checkpoint(config, headers))]
    if not answers:
        broken = "".join(f" {error}." for error in broken_plugins())
        known = f"{', '.join(known_methods())}.{broken}"
        if not stored:
            raise UnsupportedCheckpoint(
                f"the quantization configuration has no quant_method. Add the format that the file is in: {known}"
            )
        if why := refusal(stored):
            raise UnsupportedCheckpoint(f"quant_method {stored!r} is not supported: {why} Known formats: {known}")
        raise UnsupportedCheckpoint(
            f"quant_method {stored!r} is not supported; known: {known} Use a copy of the model in one of these formats."
        )
    if len(answers) > 1:
        names_found = " and ".join(method.name for method in answers)
        raise UnsupportedCheckpoint(
            f"quant_method {stored!r} is claimed by {names_found}; uninstall one of the plugins."
        )
    confirm(answers[0].name, asked)
    return answers[0]


def confirm(found: str, asked: str | None) -> None:
    """Raise :class:`UnsupportedCheckpoint`, naming both, if the user asked for another format than was found."""
    if asked is None or ALIASES.get(asked, asked) == found:
        return
    if asked in _plugins():
        method_class(asked)
    if asked not in known_methods() and asked not in ALIASES:
        known = ", ".join(known_methods())
        raise UnsupportedCheckpoint(f"--quantization {asked}: no such format; known: {known}.")
    raise UnsupportedCheckpoint(
        f"--quantization {asked} was asked for, but the checkpoint says its quantization is {found!r}. For a quantized "
        "checkpoint the option only confirms the format; leave it out to load the checkpoint as it is."
    )


def _installed() -> Mapping[str, Plugin]:
    return installed(METHODS, QuantMethod)


def _plugins() -> Mapping[str, Plugin]:
    """Installed formats that no built-in one hides."""
    return {name: plugin for name, plugin in _installed().items() if name not in BUILT_IN}


def _works(plugin: Plugin) -> bool:
    return not isinstance(plugin.found, str)
