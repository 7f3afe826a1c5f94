"""Whether an entry of a configuration names a module, in every dialect that checkpoints are written in.

Lists of modules look alike and mean different things: ``gate`` names ``mlp.gate_proj`` for one tool and not for the next.
Each dialect is one function of an entry and a module's full name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from quant.base import BadCheckpoint

Dialect = Callable[[str, str], bool]
"""``(entry, module name) -> does the entry name the module?``"""

LINEAR_CLASSES = ("Linear", "Module")
EMBEDDING_CLASSES = ("Embedding",)
"""The classes of a linear layer, as compressed-tensors looks for them by name."""

REGEX_CHARACTERS = frozenset("*+?^$()[]{}|\\")


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BadCheckpoint(f"quantization_config: {pattern!r} is not a valid regular expression: {error}.") from error


def autoawq(entry: str, name: str) -> bool:
    """AutoAWQ ``modules_to_not_convert``: a substring of the name *within* a decoder layer; nothing else is ever converted.

    Source: AutoAWQ 0.2.9 ``exclude_layers_to_not_quantize``.
    """
    inside = re.match(r".*?\.\d+\.(.+)", name)
    return inside is not None and entry in inside[1]


def vllm_substring(entry: str, name: str) -> bool:
    """vLLM's AWQ and GPTQ readers: a substring of the full name."""
    return entry in name


def vllm_exact(entry: str, name: str) -> bool:
    """vLLM's FP8 and FBGEMM readers (``ignored_layers``): the full name."""
    return entry == name


def transformers(entry: str, name: str) -> bool:
    """Transformers: a regular expression from the start to a component's end, or any ending of the name.

    Source: Transformers 5.23 ``quantizers_utils.should_convert_module``.
    """
    try:
        pattern = re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
    except re.error:  # a wildcard of another dialect, say; lists of this dialect only explain, they decide nothing
        return name.endswith(entry)
    return pattern.match(name) is not None or name.endswith(entry)


def components(entry: str, name: str) -> bool:
    """Whole components of the dotted path, anywhere: what every looser reader of FP8 and bitsandbytes lists agrees on, so
    that a tensor against it is a contradiction."""
    return f".{entry.strip('.')}." in f".{name}."


def path_components(entry: str, name: str) -> bool:
    """SGLang's FP8 reader: whole components of the dotted path, anywhere, with or without a leading ``model.``."""
    return any(components(form, name) for form in (entry, entry.removeprefix("model.")))


def compressed_rank(entry: str, name: str, classes: Iterable[str] = LINEAR_CLASSES) -> int | None:
    """compressed-tensors ``ignore`` and ``targets``: how closely an entry means a module; ``None``: not at all.

    0 its full name, 1 a regular expression after ``re:`` that matches from the start and need not reach the end, 2 a class
    of the module; 3 its name behind a prefix that the model's tree does not have. The order is that of ``match_targets`` in
    ``compressed_tensors/utils/match.py`` 0.20.0.
    """
    if entry == name:
        return 0
    if entry.startswith("re:"):
        return 1 if _regex(entry.removeprefix("re:")).match(name) else None
    if entry in classes:
        return 2
    return 3 if entry.endswith(f".{name}") else None


def compressed_tensors(entry: str, name: str, classes: Iterable[str] = LINEAR_CLASSES) -> bool:
    """compressed-tensors ``ignore`` and ``targets``, however closely."""
    return compressed_rank(entry, name, classes) is not None


def modelopt(entry: str, name: str) -> bool:
    """ModelOpt ``ignore`` and ``exclude_modules``: shell wildcards over the full name, or whole components of it. Readers of
    old exports take an entry for any substring; one that ends within a component proves nothing.

    Source: modelopt 0.47 ``torch/export/quant_utils.py``.
    """
    return fnmatchcase(name, entry) or components(entry, name)


def gptqmodel(entry: str, name: str) -> bool:
    """GPTQModel ``dynamic``: a regular expression from the start of the name, after ``+:`` or ``-:``."""
    pattern = entry[2:] if entry.startswith(("+:", "-:")) else entry
    return pattern == name or _regex(pattern).match(name) is not None


def auto_round(entry: str, name: str) -> bool:
    """auto-round ``extra_config``: the full name; an entry with a regular expression's characters is searched for."""
    return entry == name or (not REGEX_CHARACTERS.isdisjoint(entry) and _regex(entry).search(name) is not None)


def first(entries: Iterable[str], name: str, dialect: Dialect) -> str | None:
    """The first entry that names the module."""
    return next((entry for entry in entries if dialect(entry, name)), None)


def unmatched(entries: Iterable[str], names: Iterable[str], dialect: Dialect) -> list[str]:
    """The entries that name none of the modules: a typing error, or a module that this model does not have."""
    known = list(names)
    return [entry for entry in entries if not any(dialect(entry, name) for name in known)]


@dataclass(frozen=True)
class Rules:
    """Per-module settings of the configuration field ``field``: entry -> settings that replace the general ones, or
    ``None`` for modules left dense. The first entry that names a module holds."""

    field: str
    dialect: Dialect
    settings: Mapping[str, Mapping[str, Any] | None]

    def find(self, name: str) -> str | None:
        """The entry that holds for a module."""
        return first(self.settings, name, self.dialect)


NO_RULES = Rules("", vllm_exact, {})


def gptqmodel_rules(config: Mapping[str, Any]) -> Rules:
    """``dynamic`` of a GPTQModel configuration; entries that leave modules dense come first, wherever they stand.

    Source: GPTQModel 7.7 ``QuantizeConfig.__post_init__`` and ``_resolve_dynamic_override``.
    """
    dynamic = _mapping(config, "dynamic")
    skips: dict[str, Mapping[str, Any] | None] = {entry: None for entry in dynamic if entry.startswith("-")}
    return Rules("dynamic", gptqmodel, skips | {e: value for e, value in dynamic.items() if e not in skips})


def auto_round_rules(config: Mapping[str, Any]) -> Rules:
    """``extra_config`` of an auto-round configuration; 16 bits and more mean dense. A full name outranks a pattern."""
    extra = _mapping(config, "extra_config")
    ranked = sorted(extra, key=lambda entry: not REGEX_CHARACTERS.isdisjoint(entry))
    return Rules("extra_config", auto_round, {e: None if _dense(extra[e]) else extra[e] for e in ranked})


def _dense(settings: Mapping[str, Any]) -> bool:
    bits = settings.get("bits")
    return isinstance(bits, int) and bits >= 16


def _mapping(config: Mapping[str, Any], field: str) -> Mapping[str, Mapping[str, Any]]:
    value = config.get(field) or {}
    if not isinstance(value, Mapping) or not all(isinstance(settings, Mapping) for settings in value.values()):
        raise BadCheckpoint(f"quantization_config: {field} must map module patterns to settings, not {value!r}.")
    return value
