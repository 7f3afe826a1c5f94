"""What every body has in common: its types are taken strictly, and a field that nobody knows is no field."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict

from runtime.errors import InvalidRequest
from runtime.server.foreign_fields import HARMLESS, REFUSED, refusal


def _known_fields(schema: dict[str, Any]) -> None:
    """Tell the schema what :meth:`Body.refuse_unknown` accepts."""
    schema["additionalProperties"] = False
    schema["properties"] = {name: {} for name in sorted(HARMLESS)} | schema["properties"]


class Body(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_known_fields
    )

    def refuse_unknown(self) -> None:
        """Raise :class:`InvalidRequest` for a field that would be ignored although it asks for something."""
        for name, value in (self.model_extra or {}).items():
            if (why := refusal(name, value)) is not None:
                raise InvalidRequest(f"{name} cannot be served: {why}.")
            if name in HARMLESS or name in REFUSED:
                continue
            close = get_close_matches(name, type(self).model_fields, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise InvalidRequest(f"{name[:64]} is not a known field.{hint}")
