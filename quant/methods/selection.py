"""What a configuration says about single layers, shared by the formats with integer groups along the inputs.

Writers spell the same fields differently; the synonyms are GPTQModel 7.7's (``QUANT_CONFIG_ARG_SYNONYMS``), which reads
everybody's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant import matching
from quant.base import BadCheckpoint, TensorSpec, UnsupportedCheckpoint
from quant.matching import NO_RULES, Rules

METHOD = ("quant_method", "method")
BITS = ("bits", "w_bit", "wbits")
GROUP_SIZE = ("group_size", "q_group_size")
FORMAT = ("checkpoint_format", "format", "version")
SUPPORTED_BITS = range(2, 9)


def read(config: Mapping[str, Any], names: Iterable[str], default: Any = None) -> Any:
    """The first of several spellings that is there and not null."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def method_of(config: Mapping[str, Any]) -> str:
    """``quant_method``, or GPTQModel's ``method``, in small letters; empty if there is none."""
    return str(read(config, METHOD, "")).lower()


def names_in(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A list of module names, possibly nested, or one name; null is none."""
    value = config.get(field) or ()
    if not isinstance(value, str | list | tuple):
        raise BadCheckpoint(f"quantization_config: {field} must be a list of module names, not {value!r}.")
    flat: list[Any] = []
    for item in (value,) if isinstance(value, str) else value:
        flat += item if isinstance(item, list | tuple) else [item]
    if not all(isinstance(item, str) for item in flat):
        raise BadCheckpoint(f"quantization_config: {field} must be a list of module names, not {value!r}.")
    return tuple(flat)


@dataclass(frozen=True)
class Options:
    """How one layer is stored. ``group_size`` -1 is one group a row. ``None``: the configuration is silent."""

    bits: int
    group_size: int | None
    symmetric: bool | None
    act_order: bool | None = None

    def updated(self, config: Mapping[str, Any], where: str = "quantization_config") -> Options:
        """These options with what ``config`` says in their place."""
        bits = read(config, BITS, self.bits)
        if isinstance(bits, bool) or not isinstance(bits, int) or bits not in SUPPORTED_BITS:
            raise UnsupportedCheckpoint(
                f"{bits!r} bits ({where}: bits) are not supported, only {SUPPORTED_BITS[0]} to {SUPPORTED_BITS[-1]}. "
                "Use a copy of the model with one of these widths."
            )
        given = [config[name] for name in GROUP_SIZE if name in config]
        group = given[0] if given else self.group_size
        if given and (isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != -1)):
            raise BadCheckpoint(f"{where}: group_size must be a positive integer or -1, not {group!r}")
        symmetric, order = config.get("sym"), config.get("desc_act")
        if symmetric is None and config.get("zero_point") is not None:
            symmetric = not config["zero_point"]
        return Options(
            bits,
            group,
            self.symmetric if symmetric is None else bool(symmetric),
            self.act_order if order is None else bool(order),
        )

    def __str__(self) -> str:
        words = {True: "symmetric", False: "asymmetric", None: "symmetry not said"}
        group = "as the scales say" if self.group_size is None else self.group_size
        return f"{self.bits} bits, group {group}, {words[self.symmetric]}"


@dataclass(frozen=True)
class Selection:
    """Which layers a configuration wants quantized, and how.

    ``skipped`` is ``modules_to_not_convert``; ``only`` is ``modules_in_block_to_quantize``, endings of names.
    """

    options: Options
    rules: Rules = NO_RULES
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], defaults: Options, rules: Rules) -> Selection:
        """Read and check everything, including the settings of every rule."""
        options = defaults.updated(config)
        for entry, settings in rules.settings.items():
            options.updated(settings or {}, f"quantization_config: {rules.field} {entry!r}")
        skipped = names_in(config, "modules_to_not_convert")
        return cls(options, rules, skipped, names_in(config, "modules_in_block_to_quantize"))

    def __str__(self) -> str:
        count = len(self.rules.settings)
        return str(self.options) + (f", {count} rules in {self.rules.field}" if count else "")

    def options_for(self, layer: str) -> Options:
        """The options of one layer."""
        entry = self.rules.find(layer)
        settings = None if entry is None else self.rules.settings[entry]
        return self.options if settings is None else self.options.updated(settings)

    def is_stored(self, layer: str, headers: Mapping[str, TensorSpec], codes: str, beside: Iterable[str]) -> bool:
        """Whether the tensor ``codes`` of a layer is stored; those ``beside`` it mean nothing alone.

        Raises :class:`BadCheckpoint` if they are alone, if a dense weight is stored as well, or if the configuration
        leaves the layer dense.
        """
        if f"{layer}.{codes}" not in headers:
            for orphan in beside:
                if f"{layer}.{orphan}" in headers:
                    raise BadCheckpoint(f"{layer}: {orphan} is there but {codes} is missing. The file is damaged.")
            return False
        if f"{layer}.weight" in headers:
            raise BadCheckpoint(
                f"{layer}: both {codes} and a dense weight are stored. The file is damaged or merged by hand."
            )
        if entry := self.contradiction(layer):
            raise BadCheckpoint(
                f"{layer}: {codes} is stored, but {entry}. "
                "Remove the entry from quantization_config, or the file is not the one that the config describes."
            )
        return True

    def contradiction(self, layer: str) -> str | None:
        """The entry that surely says that a layer is dense: a rule, or a whole name in ``modules_to_not_convert``.

        Tools match that list by substrings of different names; a looser match is no contradiction, because the tensors
        decide.
        """
        entry = self.rules.find(layer)
        if entry is not None and self.rules.settings[entry] is None:
            return f"{self.rules.field} leaves it dense by {entry!r}"
        entry = matching.first(self.skipped, layer, matching.path_components)
        return None if entry is None else f"modules_to_not_convert lists {entry!r}"

    def dense_reason(self, layer: str) -> str:
        """Why the configuration may have left a layer dense."""
        entry = self.rules.find(layer)
        if entry is not None and self.rules.settings[entry] is None:
            return f"left dense by {self.rules.field} ({entry!r})"
        for dialect in (matching.path_components, matching.vllm_substring, matching.transformers):
            if entry := matching.first(self.skipped, layer, dialect):
                return f"named in modules_to_not_convert ({entry!r})"
        if self.only and not any(f".{layer}".endswith(f".{ending}") for ending in self.only):
            return "not named in modules_in_block_to_quantize"
        return "stored dense: the file has no qweight for it"

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """Entries that name none of the layers, with the field that holds them."""
        known = list(layers)
        missed = [
            (self.rules.field, matching.unmatched(self.rules.settings, known, self.rules.dialect)),
            ("modules_to_not_convert", matching.unmatched(self.skipped, known, _names_any)),
            ("modules_in_block_to_quantize", matching.unmatched(self.only, known, _ends)),
        ]
        return [f"{field}: {entry}" for field, entries in missed for entry in entries]


def _names_any(entry: str, name: str) -> bool:
    return matching.vllm_substring(entry, name) or matching.transformers(entry, name)


def _ends(entry: str, name: str) -> bool:
    return f".{name}".endswith(f".{entry}")
