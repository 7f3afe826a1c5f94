"""Single tokens for log-probabilities: the bytes a token stands for, which may be a part of a character, and their text."""

from __future__ import annotations

import json
import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: value for value, character in bytes_to_unicode().items()}
"""Byte-level BPE writes every byte as a visible character (GPT-2's table)."""
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a byte of a character that its vocabulary lacks."""
SPACE = "\u2581"


class TokenTable:
    """What the tokens of one tokenizer stand for; remembers what it was asked."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._decoders = _decoders(tokenizer)
        self._known: dict[int, bytes | None] = {}

    def spelling(self, token: int) -> bytes | None:
        """The token's bytes; ``None`` if this tokenizer does not say."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """The token's text, with U+FFFD for a part of a character."""
        known = self.spelling(token)
        return "\ufffd" if known is None else known.decode(errors="replace")

    def name(self, token: int) -> str:
        """The token's text, or ``token_id:N`` where parts of characters would share one."""
        text = self.text(token)
        return f"token_id:{token}" if "\ufffd" in text else text

    def _find(self, token: int) -> bytes | None:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""  # the vocabulary of the model is larger than the tokenizer's
        if token in self._tokenizer.added_tokens_decoder:
            return str(piece).encode()
        if "ByteLevel" in self._decoders and all(character in BYTES for character in piece):
            return bytes(BYTES[character] for character in piece)
        if "ByteFallback" in self._decoders:
            single = FALLBACK.fullmatch(piece)
            return bytes([int(single[1], 16)]) if single else piece.replace(SPACE, " ").encode()
        text = str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return None if "\ufffd" in text else text.encode()


def _decoders(tokenizer: Any) -> set[str]:
    """The types of the steps by which a fast tokenizer turns pieces into text; empty for any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = json.loads(backend.to_str())["decoder"] if backend is not None else None
    steps = (found or {}).get("decoders", [found or {}])
    return {step["type"] for step in steps if "type" in step}
