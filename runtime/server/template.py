"""Messages to text, by the tokenizer's own sandboxed chat template, within a deadline.

A template comes with the model and may loop for ever. It is Python once compiled, so a trace function of its thread can
stop it; no request can bring a template of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from runtime.errors import InvalidRequest, LoadError

RENDER_SECONDS = 5.0
RESERVED = frozenset(
    {
        "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
"""Arguments of ``apply_chat_template`` that are not the template's."""


class TooSlow(Exception):
    """A template ran beyond its deadline."""


def load_template(given: str | None) -> str | None:
    """The text of ``--chat-template``: a file, or the template itself."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"--chat-template {given}: {error}") from error


def render(
    tokenizer: Any,
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str | None = None,
    options: Mapping[str, Any] | None = None,
    seconds: float = RENDER_SECONDS,
) -> str:
    """The prompt for a conversation. ``options`` are variables of the template, and so is ``reasoning_effort``, which they
    overrule. Raises :class:`InvalidRequest`. Call it on a thread of its own."""
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template."
        )
    written = str(template or tokenizer.chat_template)
    if tools and "tools" not in written:
        raise InvalidRequest("tools cannot be served: the chat template of this model has no place for them.")
    if reasoning_effort is not None and "reasoning_effort" not in written:
        raise InvalidRequest(
            "reasoning_effort cannot be served: the chat template of this model does not know it. Pass what it knows, as "
            "enable_thinking, in chat_template_kwargs."
        )
    effort = {} if reasoning_effort is None else {"reasoning_effort": reasoning_effort}
    for name in options or {}:
        if name in RESERVED or not name.isidentifier():
            raise InvalidRequest(f"chat_template_kwargs: {name[:64]!r} is not for templates.")
    with_deadline = _Deadline(seconds)
    try:
        with with_deadline:
            return str(
                tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=list(tools) or None,
                    tokenize=False,
                    **effort | dict(options or {}),
                )
            )
    except TooSlow as error:
        raise InvalidRequest(f"the chat template took longer than {seconds:g} s with these messages.") from error
    except Exception as error:  # whatever a template raises about these messages
        raise InvalidRequest(f"the chat template refused these messages: {type(error).__name__}: {error}") from error


class _Deadline:
    """Raises :class:`TooSlow` in Python code of this thread that runs for too long."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > self.end:
            raise TooSlow
        return self._trace
