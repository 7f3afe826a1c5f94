"""``relinear chat``: a conversation in the terminal, in this process."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from runtime.errors import Error, InvalidRequest
from runtime.options import ENGINE, LOADING, pick


def chat(arguments: argparse.Namespace) -> int:
    """Read a line, answer it, remember both, until the end of input."""
    from runtime.llm import LLM
    from runtime.request import SamplingParams

    options = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens")}
    given = {name: value for name, value in options.items() if value is not None}
    llm = LLM(arguments.model_path, **pick(arguments, LOADING + ENGINE))
    params = SamplingParams(**{**llm.engine.sampling_defaults, "max_tokens": None, **given})
    if not arguments.quiet:
        print(llm.report + "\n\nEmpty line or Ctrl-D: end. /new: forget what was said.\n", file=sys.stderr)
    conversation = Conversation(llm, params, arguments.chat_template, arguments.system)
    while line := _ask():
        if line == "/new":
            conversation.clear()
            continue
        for piece in conversation.say(line):
            print(piece, end="", flush=True)
        print(flush=True)
    return 0


class Conversation:
    """What was said so far, and a model that goes on."""

    def __init__(self, llm: Any, params: Any, template: str | None, system: str | None):
        from runtime.server.template import load_template

        self._llm = llm
        self._params = params
        self._template = load_template(template)
        self._system = [{"role": "system", "content": system}] if system else []
        if not (self._template or getattr(llm.get_tokenizer(), "chat_template", None)):
            raise InvalidRequest("this model has no chat template: use generate, or give --chat-template.")
        self.clear()

    def clear(self) -> None:
        self.messages = list(self._system)

    def say(self, text: str) -> Any:
        """The pieces of the answer; it is remembered once all have been read."""
        self.messages.append({"role": "user", "content": text})
        options = {"chat_template": self._template} if self._template else {}
        ids = self._llm.get_tokenizer().apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=False, **options
        )
        answer = ""
        for _, delta in self._llm.stream([ids], self._params):
            if delta.error:
                raise Error(delta.error)
            answer += delta.text
            yield delta.text
        self.messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
