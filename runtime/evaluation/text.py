"""From text to the windows of tokens that models are asked about.

A document is a file; a window never crosses two. Every token is scored once: a window of ``length`` tokens starts with one
that is only context, the beginning-of-text token if the tokenizer has one, else the last token of the window before.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from runtime.errors import InvalidRequest


@dataclass(frozen=True)
class Document:
    """A text and what to call it."""

    name: str
    text: str


@dataclass(frozen=True)
class Window:
    """``ids[scored:]`` are scored, each given all before it; they stand for ``bytes`` bytes of UTF-8."""

    document: str
    ids: list[int]
    scored: int
    bytes: int


Text = str | Path | Sequence[Document]

PIECE = 1_000_000
"""Characters of a document that are tokenised together: with their offsets they take some 200 bytes each."""


def read_documents(text: Text) -> list[Document]:
    """The documents of a file, or of every file below a folder in the order of their names; ``demo`` is the bundled model's
    held-out text. Raises :class:`InvalidRequest` for what is not UTF-8 or empty."""
    if not isinstance(text, str | Path):
        documents = list(text)
    else:
        path = file = Path(text)
        if str(text) == "demo" and not path.exists():
            path = Path(__file__).parents[1] / "bundled" / "heldout.txt"
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        documents = []
        try:
            for file in files:
                documents.append(Document(file.name, file.read_bytes().decode("utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--text {file}: {error}. Text is read as UTF-8.") from error
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise InvalidRequest(f"--text {text}: there is no text in it.")
    return documents


def require_writable(option: str, file: str | Path, makes_folders: bool = False) -> None:
    """Raise :class:`InvalidRequest` if a file cannot be written, before what is to be in it is measured for hours."""
    path = Path(file)
    folder = path.parent
    while makes_folders and not folder.exists():
        folder = folder.parent
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidRequest(f"{option} {file}: it cannot be written: {error}.") from error


def fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 of the texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens, however long the text is."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids without special tokens, and for each the count of bytes of ``text`` up to its end."""
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidRequest(
            f"{type(tokenizer).__name__} does not say which bytes a token stands for: it is a slow tokenizer. "
            "Name one with a tokenizer.json: --tokenizer-path."
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    until = [0, *accumulate(len(character.encode()) for character in text)]
    return list(found["input_ids"]), [until[stop] for _, stop in found["offset_mapping"]]


def windows(tokenizer: Any, documents: Sequence[Document], length: int, tokens: int | None) -> list[Window]:
    """Windows of at most ``length`` tokens until ``tokens`` are scored (``None``: all of them), taken from the documents in
    turn, so that a few windows still speak for all."""
    if length < 2:
        raise InvalidRequest(f"--window {length}: a window holds at least 2 tokens, one of them context.")
    if tokens is not None and tokens < 1:
        raise InvalidRequest(f"--tokens {tokens}: at least one token must be scored.")
    streams = [_of_document(tokenizer, document, length) for document in documents]
    chosen: list[Window] = []
    left = tokens
    while streams and (left is None or left > 0):
        for stream in list(streams):
            window = next(stream, None)
            if window is None:
                streams.remove(stream)
                continue
            chosen.append(window)
            if left is not None:
                left -= len(window.ids) - window.scored
                if left <= 0:
                    break
    if not chosen:
        raise InvalidRequest("the text is too short: it has no token to score.")
    return chosen


def _of_document(tokenizer: Any, document: Document, length: int) -> Iterator[Window]:
    start = tokenizer.bos_token_id
    pieces = _pieces(tokenizer, document.text)
    ids, ends = next(pieces)
    place = 0 if start is not None else 1
    while True:
        while len(ids) - place < length - 1 and (more := next(pieces, None)):
            kept = max(place - 1, 0)  # the context of the next window
            ids, ends, place = ids[kept:] + more[0], ends[kept:] + more[1], place - kept
        if place >= len(ids):
            return
        stop = min(place + length - 1, len(ids))
        context = start if start is not None else ids[place - 1]
        before = ends[place - 1] if place else 0
        yield Window(document.name, [context, *ids[place:stop]], 1, ends[stop - 1] - before)
        place = stop


def _pieces(tokenizer: Any, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and ends of a text of any length, as they are asked for; one longer than :data:`PIECE` is cut where a line starts
    with its first word, which no tokenizer joins to the line before."""
    place = size = 0
    while place < len(text) or not place:
        stop = place + PIECE
        if stop < len(text):
            end = text.rfind("\n", place, stop)
            while end >= 0 and text[end + 1].isspace():
                end = text.rfind("\n", place, end)
            stop = end + 1 if end >= 0 else stop
        part = text[place:stop]
        ids, ends = encode(tokenizer, part)
        yield ids, [size + end for end in ends]
        size += len(part.encode())
        place = stop
