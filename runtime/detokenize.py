"""Text from token ids, one at a time: never half a character, never a part of a stop string.

Works with any tokenizer that can decode. A window of the last tokens is decoded twice, with and without the new ones,
and the difference is the new text; that keeps spaces and byte-level characters right where decoding single tokens does
not. (Technique of text-generation-inference's and vLLM's incremental decoders.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6
"""Prompt tokens in the first window: enough for the tokenizer to know that a word went on."""

INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one request. ``stop`` ends it; ``keep_stop`` leaves the stop string in the text."""

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._stop = stop
        self._keep_stop = keep_stop
        self._ids = list(prompt[-CONTEXT:])
        self._window = 0
        self._read = len(self._ids)
        # A prompt may end inside a character: its half is no text yet.
        while self._read and self._decode(self._ids[: self._read]).endswith(INCOMPLETE):
            self._read -= 1
        self._held = ""
        self.matched: str | None = None

    def feed(self, token: int, *, may_stop: bool = True) -> str:
        """The text that became certain with this token. After it, ``matched`` is the stop string that ended the request,
        if one did; nothing more may be fed then."""
        assert self.matched is None
        self._ids.append(token)
        fresh = self._fresh()
        if fresh.endswith(INCOMPLETE):
            return ""
        self._window, self._read = self._read, len(self._ids)
        self._held += fresh
        return self._release(may_stop)

    def flush(self) -> str:
        """The rest, once no token will follow: an incomplete character becomes U+FFFD, as ``decode`` gives it."""
        rest = self._held if self.matched else self._held + self._fresh()
        self._held = ""
        return rest

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._window : self._read])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
        )  # fmt: skip

    def _release(self, may_stop: bool) -> str:
        if may_stop and self._stop:
            found = min(((at, text) for text in self._stop if (at := self._held.find(text)) >= 0), default=None)
            if found:
                at, self.matched = found
                text = self._held[: at + len(self.matched) * self._keep_stop]
                self._held = ""
                return text
        safe = len(self._held) - self._possible_stop()
        text, self._held = self._held[:safe], self._held[safe:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the held text with which a stop string could begin."""
        longest = min(max((len(text) for text in self._stop), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            suffix = self._held[-length:]
            if any(text.startswith(suffix) for text in self._stop):
                return length
        return 0
