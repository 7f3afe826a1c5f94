"""What an assistant's text consists of: an answer, the reasoning before it, and calls of tools; whole or piece by piece.

Models mark these in ways of their own. Transformers describes them as a *response template*, which comes with the tokenizer
or, for some families, with Transformers; an operator can name one of :data:`TOOL_PARSERS` and :data:`REASONING_PARSERS`
for a model without. The parser is Transformers'; what it cannot parse is passed on as text, so nothing is lost.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from runtime.errors import LoadError
from runtime.server.tools import ToolUse

TOOL_PARSERS: Mapping[str, Mapping[str, Any]] = {
    "hermes": {
        "open_pattern": r"\s*<tool_call>",
        "close": "</tool_call>",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    },
    "qwen3_coder": {
        "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    },
}
"""Response template fields of how calls look, by the names that other servers have for them."""

TOOL_ALIASES = {"qwen": "hermes", "qwen25": "hermes"}

REASONING_PARSERS = {"qwen3": False, "deepseek-r1": True}
"""Reasoning stands between ``<think>`` and ``</think>``; whether it begins without the first mark."""

THINK, END_OF_THINKING = "<think>", "</think>"
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass
class Call:
    """One call of a function, or a piece of one: only the first piece of ``index`` has the ``name``."""

    index: int
    arguments: str
    name: str | None = None

    def delta(self) -> dict[str, Any]:
        """As a piece of a stream."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        return {"index": self.index, **self.whole()}

    def whole(self) -> dict[str, Any]:
        head = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        return {**head, "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Piece:
    """What became certain."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def merge(self, later: Piece) -> None:
        """Append a later piece."""
        self.content += later.content
        self.reasoning += later.reasoning
        for call in later.calls:
            if call.name is None:
                self.calls[-1].arguments += call.arguments
            else:
                self.calls.append(call)


class ReplyParser:
    """One assistant's text; this one knows no marks, all of it is content."""

    def feed(self, text: str, *, last: bool) -> Piece:
        """The next text; ``last``: the end of it."""
        return Piece(content=text)


class NamedCallParser(ReplyParser):
    """The text is the arguments of one function."""

    def __init__(self, name: str):
        self._name: str | None = name

    def feed(self, text: str, *, last: bool) -> Piece:
        name, self._name = self._name, None
        return Piece(calls=[Call(0, text, name)] if text or name else [])


class CallListParser(ReplyParser):
    """The text is a JSON list of calls."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, text: str, *, last: bool) -> Piece:
        self._text += text
        if not last:
            return Piece()
        try:
            calls = json.loads(self._text)
        except ValueError:  # cut off by max_tokens
            return Piece(content=self._text)
        return Piece(
            calls=[Call(place, json.dumps(call["arguments"]), call["name"]) for place, call in enumerate(calls)]
        )


class TemplateParser(ReplyParser):
    """The text as a response template describes it."""

    def __init__(self, parser: Any, use: ToolUse):
        self._parser: Any = parser
        self._most = (None if use.parallel else 1) if use.tools else 0
        self._calls = 0
        self._unseen = ""

    def feed(self, text: str, *, last: bool) -> Piece:
        if self._parser is None:
            return Piece(content=text)
        self._unseen += text
        piece = Piece()
        try:
            events = self._parser.feed(text)
            if last:
                events += self._parser.finalize()[1]
            for event in events:
                piece.merge(self._read(event))
        except (ValueError, TypeError, KeyError):
            # Not what the template promises, e.g. a call that is no JSON: the client sees what the model wrote.
            self._parser = None
            piece.content += self._unseen
        return piece

    def _read(self, event: Mapping[str, Any]) -> Piece:
        name = event.get("field")
        if event["type"] == "region_chunk" and not event.get("dirty"):
            text = event["text"]
            self._unseen = self._unseen.partition(text)[2]
            if name in REASONING_FIELDS:
                return Piece(reasoning=text)
            return Piece(content=text) if name == "content" else Piece()
        if event["type"] == "region_close" and name == "tool_calls":
            function = event["value"]["function"]
            arguments = function["arguments"]
            written = arguments if isinstance(arguments, str) else json.dumps(arguments)
            self._unseen = ""
            self._calls += 1
            if self._most is not None and self._calls > self._most:
                return Piece()
            return Piece(calls=[Call(self._calls - 1, written, str(function["name"]))])
        return Piece()


@dataclass(frozen=True)
class ReplyFormat:
    """How the served model marks its replies. ``template`` ``None``: not at all, as far as is known."""

    template: Mapping[str, Any] | None = None
    begins_thinking: bool = False
    named: bool = False

    @classmethod
    def of_model(cls, tokenizer: Any, model_type: str) -> ReplyFormat:
        """The tokenizer's, else Transformers' for this type of model. Takes seconds the first time."""
        return cls(_known_template(tokenizer, model_type))

    @classmethod
    def of_names(cls, tool_parser: str | None, reasoning_parser: str | None) -> ReplyFormat | None:
        """The one that the operator names, if any. Raises :class:`LoadError` for a name that is not known."""
        if tool_parser is None and reasoning_parser is None:
            return None
        fields: dict[str, Any] = {"content": {"content": "text"}}
        if reasoning_parser is not None:
            _require(reasoning_parser, REASONING_PARSERS, "--reasoning-parser")
            # Spaces and line ends around an answer belong to the marks.
            marks = {"open_pattern": rf"\s*{THINK}\s*", "close_pattern": rf"\s*{END_OF_THINKING}\s*"}
            fields["reasoning_content"] = {**marks, "content": "text"}
        if tool_parser is not None:
            name = TOOL_ALIASES.get(tool_parser, tool_parser)
            _require(name, TOOL_PARSERS, "--tool-call-parser")
            fields["tool_calls"] = dict(TOOL_PARSERS[name])
        begins = REASONING_PARSERS.get(reasoning_parser or "", False)
        return cls({"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\A", "fields": fields}, begins, True)

    @property
    def reads_calls(self) -> bool:
        return self.template is not None and "tool_calls" in self.template["fields"]

    @property
    def separates_reasoning(self) -> bool:
        return self.template is not None and any(name in self.template["fields"] for name in REASONING_FIELDS)

    def parser(self, use: ToolUse, prompt: str, *, separate_reasoning: bool) -> ReplyParser:
        """A parser for one reply to ``prompt``."""
        if use.forced:
            return NamedCallParser(use.forced)
        if use.forced is not None:
            return CallListParser()
        if not self.marked(use, separate_reasoning=separate_reasoning):
            return ReplyParser()
        from transformers.utils.chat_parsing import ResponseParser

        prefix = prompt
        if self.named:  # no anchor is known; only an opened thought matters
            prefix = THINK if self.begins_thinking or prompt.rstrip().endswith(THINK) else ""
        template = dict(self.template or {})
        dropped = () if separate_reasoning else REASONING_FIELDS
        template["fields"] = {name: value for name, value in template["fields"].items() if name not in dropped}
        return TemplateParser(ResponseParser(template, prefix=prefix, tools=list(use.tools) or None), use)

    def marked(self, use: ToolUse, *, separate_reasoning: bool) -> bool:
        """The reply is read by a template; its marks may be special tokens, which the text then must keep."""
        reads = (bool(use.tools) and self.reads_calls) or (separate_reasoning and self.separates_reasoning)
        return use.forced is None and reads


def _known_template(tokenizer: Any, model_type: str) -> Mapping[str, Any] | None:
    """The tokenizer's own template, or the one that Transformers has for tokenizers without."""
    if (template := getattr(tokenizer, "response_template", None)) is not None:
        return dict(template)
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:  # not in every version, nor without the packages of its server
        return None
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    return get_response_template(tokenizer, model)


def _require(name: str, known: Mapping[str, Any], flag: str) -> None:
    if name not in known:
        raise LoadError(f"{flag} {name}: no such parser; known: {', '.join(known)}.")
