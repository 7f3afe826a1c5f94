"""Answers that conform to a JSON schema, a regular expression, a choice or a grammar, by ``llguidance``.

Compiling may take long, so whoever serves others compiles on a thread of its own and hands the engine the result. All sizes
are limited, and whatever is wrong with a grammar, before or during generation, is the fault of its own request.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import InvalidRequest

FIELD = "structured_outputs"
"""What a request is told to look at; begins the message of an answer that its grammar ended."""
MAX_CHARACTERS = 65_536
MAX_GRAMMAR_SYMBOLS = 100_000
MAX_LEXER_STATES = 50_000
GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
"""As llama.cpp, SGLang and vLLM write rules; Lark has a colon there."""
KINDS = ("json", "json_object", "regex", "choice", "grammar")


class GrammarError(Exception):
    """A grammar that stopped working in the middle of an answer."""


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy())

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may come next, ``bool [vocabulary]``. Raises :class:`GrammarError`."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(f"{FIELD}: the grammar failed: {_cause(self._matcher)}")
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[:vocabulary]
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits).bool()
        if not allowed.any():
            raise GrammarError(f"{FIELD}: the grammar allows no token of this model here")
        return allowed

    def accept(self, token: int) -> bool:
        """Go on by a token; whether the answer is complete."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Makes matchers for one tokenizer; may be used from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: frozenset[int]):
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = sorted(end_tokens)
        self._lock = threading.Lock()
        self._prepared: Any = None

    def compile(self, wanted: Mapping[str, Any]) -> Matcher:
        """The matcher for ``SamplingParams.structured_outputs``. Raises :class:`InvalidRequest`."""
        kinds = [kind for kind in KINDS if wanted.get(kind) is not None]
        if len(kinds) != 1 or set(wanted) - set(KINDS):
            raise InvalidRequest(f"structured_outputs needs exactly one of {', '.join(KINDS)}, not {sorted(wanted)}.")
        kind = kinds[0]
        try:
            from llguidance import LLMatcher, LLParserLimits

            grammar = _grammar(LLMatcher, kind, wanted[kind])
            limits = LLParserLimits(max_grammar_size=MAX_GRAMMAR_SYMBOLS, max_lexer_states=MAX_LEXER_STATES)
            matcher = LLMatcher(self._prepare(), grammar, log_level=0, limits=limits)
        except ImportError as error:
            raise InvalidRequest(
                f"structured outputs need llguidance ({error}): pip install 'relinear[serve]'."
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"structured_outputs: {kind}: {error}") from error
        if matcher.is_error():
            raise InvalidRequest(f"structured_outputs: {kind} does not compile: {_cause(matcher)}")
        compiled = Matcher(matcher)
        try:
            compiled.copy().allowed(self._vocabulary)
        except GrammarError as error:
            raise InvalidRequest(f"structured_outputs: no answer conforms to this {kind}: {error}") from error
        return compiled

    def _prepare(self) -> Any:
        with self._lock:
            if self._prepared is None:
                from llguidance.hf import from_tokenizer

                self._prepared = from_tokenizer(self._tokenizer, self._vocabulary, self._end_tokens)
            return self._prepared


def _cause(matcher: Any) -> str:
    """The error without the parser's state, which is long."""
    return str(matcher.get_error()).partition("\n<state>")[0]


def _grammar(compiler: Any, kind: str, value: Any) -> str:
    """llguidance's own form of a grammar. Raises :class:`ValueError` or :class:`TypeError`."""
    if kind == "json_object":
        kind, value = "json", {"type": "object"}
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, at most {MAX_CHARACTERS} are compiled.")
    if kind == "json":
        if not isinstance(value, str | dict | bool):
            raise TypeError("a schema is a JSON object.")
        return str(compiler.grammar_from_json_schema(text))
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise TypeError("a list of non-empty strings is needed.")
        return str(compiler.grammar_from_lark("start: " + " | ".join(json.dumps(item) for item in value)))
    if not isinstance(value, str):
        raise TypeError("a string is needed.")
    if kind == "regex":
        return str(compiler.grammar_from_regex(text))
    return str(compiler.grammar_from_lark(_lark(text) if GBNF_RULE.search(text) else text))


def _lark(text: str) -> str:
    """A GBNF grammar as a Lark one. Raises :class:`ValueError`."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        # Without its empty lines: the converter takes time with the square of their number.
        return str(any_to_lark("\n".join(line for line in text.split("\n") if line.strip())))
    except Exception as error:  # a plain one, for some mistakes
        raise ValueError(str(error)) from error
