"""Every token is scored once, and its bytes are counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime import InvalidRequest
from runtime.checkpoint import locate
from runtime.evaluation import text as module
from runtime.evaluation.text import Document, fingerprint, read_documents, windows

TEXT = "def größe(x):\n    return 'naïve — 漢字 🙂'\n" * 30


@pytest.fixture(scope="module", params=["bos", "no bos"])
def tokenizer(request: pytest.FixtureRequest) -> AutoTokenizer:
    tokenizer = AutoTokenizer.from_pretrained(locate("demo"))
    if request.param == "no bos":
        tokenizer.bos_token = None
    return tokenizer


def test_windows_cover_a_document_once(tokenizer: AutoTokenizer) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = windows(tokenizer, [Document("a", TEXT)], 32, None)
    scored = [token for window in found for token in window.ids[window.scored :]]
    begins = tokenizer.bos_token_id is not None
    assert scored == (ids if begins else ids[1:])
    first = 0 if begins else len(tokenizer.decode(ids[:1]).encode())
    assert sum(window.bytes for window in found) == len(TEXT.encode()) - first
    contexts = [window.ids[0] for window in found]
    assert contexts == ([tokenizer.bos_token_id] * len(found) if begins else ids[: len(ids) - 1 : 31])


def test_a_long_document_is_tokenised_in_pieces_and_only_as_far_as_asked(
    tokenizer: AutoTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut where no token is: the windows are those of the whole."""
    whole = windows(tokenizer, [Document("a", TEXT)], 32, None)
    monkeypatch.setattr(module, "PIECE", 100)
    assert windows(tokenizer, [Document("a", TEXT)], 32, None) == whole
    asked: list[str] = []
    real = module.encode

    def encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
        asked.append(text)
        return real(tokenizer, text)

    monkeypatch.setattr(module, "encode", encode)
    assert windows(tokenizer, [Document("a", TEXT)], 32, 31) == whole[:1]
    assert 31 < len("".join(asked)) < 300
    assert "".join(asked) == TEXT[: len("".join(asked))]
    monkeypatch.setattr(module, "PIECE", 7)  # within lines too, and pieces of fewer tokens than a window
    pieced = windows(tokenizer, [Document("a", TEXT)], 32, None)
    first = 0 if tokenizer.bos_token_id is not None else 1
    assert sum(window.bytes for window in pieced) >= len(TEXT.encode()) - 7 * first
    assert tokenizer.decode([token for window in pieced for token in window.ids[1:]]) in TEXT


def test_windows_are_taken_from_documents_in_turn_and_cross_none(tokenizer: AutoTokenizer) -> None:
    documents = [Document("long", TEXT), Document("short", "import os, sys, re, json, math, time")]
    found = windows(tokenizer, documents, 16, 50)
    assert [window.document for window in found][:3] == ["long", "short", "long"]
    assert sum(len(window.ids) - 1 for window in found) >= 50
    assert sum(len(window.ids) - 1 for window in found[:-1]) < 50


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_bytes(b"one\r\n")
    (tmp_path / ".hidden").write_text("no")
    found = read_documents(tmp_path)
    assert [(one.name, one.text) for one in found] == [("a.txt", "one\r\n"), ("b.txt", "two")]
    assert fingerprint(found) != fingerprint([Document("", "one\r\ntwo")])
    assert fingerprint(found) == fingerprint([Document("x", one.text) for one in found])


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
    for which in (tmp_path / "a.bin", tmp_path):
        with pytest.raises(InvalidRequest, match=r"a\.bin: .* UTF-8"):
            read_documents(which)
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(InvalidRequest, match="no text"):
        read_documents(tmp_path / "empty")
    with pytest.raises(InvalidRequest, match="No such file"):
        read_documents(tmp_path / "absent")
