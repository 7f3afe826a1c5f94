"""What clients may send of a conversation: messages, tools, and what the chat template of the model is to know besides."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from runtime.errors import InvalidRequest
from runtime.server.body import Body
from runtime.server.tools import MAX_TOOLS, Tool, ToolUse, with_parsed_arguments

MAX_MESSAGES = 4096


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: str = Field(max_length=64)
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """The message with its text parts joined. Raises :class:`InvalidRequest` for anything that is not text."""
        values = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise InvalidRequest(
                        f"messages: content of type {part.get('type')!r:.64} cannot be served: text only, no URL is fetched."
                    )
            values["content"] = "".join(part["text"] for part in self.content)
        return with_parsed_arguments(values)


class Conversation(Body):
    """Fields from which a chat template makes a prompt."""

    messages: list[Message] = Field([], max_length=MAX_MESSAGES)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(None, max_length=16)
    reasoning_effort: str | None = Field(None, max_length=64)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def tool_use(self) -> ToolUse:
        """Raises :class:`InvalidRequest`."""
        return ToolUse.of(self.tools, self.tool_choice, self.parallel_tool_calls is not False)

    def rendering(self) -> dict[str, Any]:
        """The messages and everything else that :func:`runtime.server.template.render` takes from a request. Raises
        :class:`InvalidRequest`."""
        continued, begins = bool(self.continue_final_message), self.add_generation_prompt
        return {
            "messages": [message.plain() for message in self.messages],
            "add_generation_prompt": not continued if begins is None else begins,
            "continue_final_message": continued,
            "tools": self.tool_use.tools,
            "reasoning_effort": self.reasoning_effort,
            "options": self.chat_template_kwargs,
        }
