"""Tools of a chat request: what may be called, what must be, and the grammar that makes sure of it.

A call that the client demands (``tool_choice`` ``"required"`` or a named function) is written under a grammar, as JSON, so it
needs nothing of the model. One that the model decides on (``"auto"``) comes in the model's own words, which
:mod:`runtime.server.reply` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.errors import InvalidRequest

MAX_TOOLS = 128
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
COMPACT: Mapping[str, Any] = {"x-guidance": {"whitespace_flexible": False}}
"""llguidance's own option: a weak model could otherwise write spaces between two tokens of JSON for ever."""
ANY_PARAMETERS: Mapping[str, Any] = {"type": "object"}


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class ToolUse:
    """``tools``: as the chat template gets them; empty: none may be called. ``forced``: ``None`` leaves it to the model, ``""``
    demands calls of any of them, a name demands one call of that function."""

    tools: tuple[dict[str, Any], ...] = ()
    forced: str | None = None
    parallel: bool = True

    @classmethod
    def of(cls, tools: Sequence[Tool] | None, choice: str | Mapping[str, Any] | None, parallel: bool) -> ToolUse:
        """What a request's ``tools`` and ``tool_choice`` ask for. Raises :class:`InvalidRequest`."""
        names = [tool.function.name for tool in tools or ()]
        if len(set(names)) < len(names):
            raise InvalidRequest(f"tools: a name is given twice among {', '.join(sorted(names))}.")
        if not tools:
            if choice not in (None, "none", "auto"):
                raise InvalidRequest(f"tool_choice: {str(choice)[:64]!r} needs tools, and none are given.")
            return cls()
        given = tuple(tool.model_dump(exclude_none=True) for tool in tools)
        if choice in (None, "auto", "required"):
            return cls(given, "" if choice == "required" else None, parallel)
        if choice == "none":
            return cls()
        name = _named(choice)
        if name not in names:
            raise InvalidRequest(f"tool_choice: {str(name)[:64]!r} is not among tools, which are {', '.join(names)}.")
        return cls(given, name, parallel)

    def form(self) -> dict[str, Any] | None:
        """What a demanded call has to conform to: the arguments of a named function, or a list of calls. Raises
        :class:`InvalidRequest`."""
        if self.forced is None:
            return None
        if self.forced:
            return {
                "json": {**next(self._parameters(tool) for tool in self.tools if _name(tool) == self.forced), **COMPACT}
            }
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": _name(tool)},
                    "arguments": _moved(self._parameters(tool), f"/items/anyOf/{place}/properties/arguments"),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for place, tool in enumerate(self.tools)
        ]
        most = {} if self.parallel else {"maxItems": 1}
        return {"json": {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, **COMPACT}}

    @staticmethod
    def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
        return tool["function"].get("parameters", NO_PARAMETERS) or ANY_PARAMETERS


def _moved(schema: Any, place: str) -> Any:
    """A schema as a part of another: its references to ``#/$defs/...`` lead to where it is now. Raises
    :class:`InvalidRequest`."""

    def moved(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: refer(value) if key == "$ref" else moved(value) for key, value in part.items()}
        return [moved(item) for item in part] if isinstance(part, list) else part

    def refer(target: Any) -> Any:
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            return f"#{place}{target[1:]}"
        return moved(target)  # the schema of a property of that name

    try:
        return moved(schema)
    except RecursionError:
        raise InvalidRequest("tools: parameters are nested too deeply.") from None


def with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates want it: arguments of past calls as objects, which clients send back as JSON text.
    Raises :class:`InvalidRequest`."""
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidRequest("messages: tool_calls is a list of objects.")
    return {**message, "tool_calls": [_parsed(call) for call in calls]}


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest("messages: every entry of tool_calls has a function with a name.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise InvalidRequest(
                f"messages: the arguments of {function['name'][:64]!r} are not JSON: {error}"
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}


def _named(choice: str | Mapping[str, Any] | None) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function" and isinstance(choice.get("function"), Mapping):
        return choice["function"].get("name")
    raise InvalidRequest(
        "tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}, "
        f"not {str(choice)[:64]!r}."
    )


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])
