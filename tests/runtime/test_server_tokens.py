"""The bytes of single tokens, with both kinds of tokenizers that split characters."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runtime.checkpoint import locate
from runtime.server.tokens import TokenTable

TEXT = "x =  'na\u00efve \N{PILE OF POO}'\n\u4f60\u597d"


def byte_level() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(locate("demo"))


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces with U+2581 for a space, and bytes for everything else."""
    pieces = ["<unk>", "\u2581", "x", "=", "\u2581'", "na", "ve", "'", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = Tokenizer(
        models.BPE({piece: place for place, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_make_the_text(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    table, ids = TokenTable(tokenizer), tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    known = [table.spelling(token) for token in ids]
    assert b"".join(part or b"" for part in known).decode() == TEXT
    parts = [(table.text(token), table.name(token)) for token, part in zip(ids, known, strict=True) if part == b"\xf0"]
    assert parts == [("\ufffd", f"token_id:{token}") for token, part in zip(ids, known, strict=True) if part == b"\xf0"]
    assert parts, "the text has a character that is split"


def test_a_special_token_is_its_name() -> None:
    tokenizer = byte_level()
    assert TokenTable(tokenizer).text(tokenizer.eos_token_id) == tokenizer.eos_token
    assert TokenTable(tokenizer).spelling(len(tokenizer) + 5) == b""
