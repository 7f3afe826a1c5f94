"""Lists of modules that a configuration leaves dense, as the formats without integer groups have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from quant import matching
from quant.base import BadCheckpoint
from quant.matching import Dialect
from quant.methods.selection import names_in


@dataclass(frozen=True)
class SkipList:
    """``entries``: each entry and the field that holds it. ``dialect`` is how the format's tools match them; one that names
    a layer which is stored quantized contradicts the file."""

    entries: tuple[tuple[str, str], ...]
    dialect: Dialect

    @classmethod
    def of(cls, config: Mapping[str, Any], fields: Iterable[str], dialect: Dialect) -> Self:
        """The lists under these fields of a configuration."""
        return cls(tuple((entry, field) for field in fields for entry in names_in(config, field)), dialect)

    def naming(self, layer: str) -> str | None:
        """The first entry that names a layer, with its field."""
        found = ((entry, field) for entry, field in self.entries if self.dialect(entry, layer))
        return next((f"{field} lists {entry!r}" for entry, field in found), None)

    def require_absent(self, layer: str) -> None:
        """Raise :class:`BadCheckpoint` if a layer whose tensors are quantized is listed as dense."""
        if found := self.naming(layer):
            raise BadCheckpoint(
                f"{layer}: a quantized weight is stored, but {found}. "
                "Remove the entry from quantization_config, or the file is not the one that the config describes."
            )

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """Entries that name none of the layers, with their field."""
        missed = matching.unmatched((entry for entry, _ in self.entries), layers, self.dialect)
        return [f"{field}: {entry}" for entry, field in self.entries if entry in missed]
