"""The options of quantizing while loading, spelled as in Transformers' and GPTQModel's configurations."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from quant.base import UnsupportedCheckpoint


@dataclass(frozen=True)
class Options:
    """``None``: not said. ``group_size`` -1 is one group a row. ``quantize_lm_head`` belongs to every way."""

    group_size: int | None = None
    symmetric: bool | None = None
    load_in_4bit: bool | None = None
    load_in_8bit: bool | None = None
    bnb_4bit_quant_type: str | None = None
    bnb_4bit_use_double_quant: bool | None = None
    llm_int8_threshold: float | None = None
    quantize_lm_head: bool | None = None

    BITSANDBYTES: ClassVar[tuple[str, ...]] = (
        "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_threshold",
    )  # fmt: skip

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Self:
        """Checked for names and types. Raises :class:`UnsupportedCheckpoint`."""
        config = config or {}
        types = {field.name: str(field.type).removesuffix(" | None") for field in fields(cls)}
        for name, value in config.items():
            if name not in types:
                close = difflib.get_close_matches(str(name), types, n=1)
                hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(types)}."
                raise UnsupportedCheckpoint(f"quantization_config: unknown option {name!r}. {hint}")
            fits: Any = {"bool": bool, "int": int, "float": (int, float), "str": str}[types[name]]
            if value is not None and (
                not isinstance(value, fits) or (types[name] != "bool") == isinstance(value, bool)
            ):
                raise UnsupportedCheckpoint(f"quantization_config: {name} must be {types[name]}, not {value!r}.")
        options = cls(**config)
        if options.group_size is not None and options.group_size < 1 and options.group_size != -1:
            raise UnsupportedCheckpoint(
                f"quantization_config: group_size must be a positive number of inputs, or -1 for one group a row, not "
                f"{options.group_size}."
            )
        return options

    def only(self, name: str, *allowed: str) -> None:
        """Raise :class:`UnsupportedCheckpoint` if an option is given that this way does not have."""
        for field in fields(self):
            given = getattr(self, field.name) is not None
            if given and field.name not in (*allowed, "quantize_lm_head"):
                has = ", ".join((*allowed, "quantize_lm_head"))
                raise UnsupportedCheckpoint(
                    f"{field.name} means nothing for --quantization {name}; its options are {has}."
                )
