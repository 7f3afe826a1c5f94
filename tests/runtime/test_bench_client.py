"""What the client of ``relinear bench serving`` makes of the bytes that came."""

from __future__ import annotations

import pytest

from runtime.bench_client import Target, Transcript
from runtime.errors import Error

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
WORDS = [
    b'data: {"choices":[{"text":"a"}]}\n\n',
    b'data: {"choices":[{"text":"b\xc3\xa9"}]}\n\n',
    b'data: {"choices":[{"text":"","finish_reason":"length"}],"usage":{"completion_tokens":5}}\n\n',
    b"data: [DONE]\n\n",
]
ROWS = [
    b'data: {"text":"a","meta_info":{"completion_tokens":2}}\n\n',
    b'data: {"text":"ab","meta_info":{"completion_tokens":3}}\n\n',
]


def heard(*arrived: bytes) -> Transcript:
    """A transcript to which a part came every second."""
    transcript = Transcript(b"")
    transcript.started = 0.0
    for second, data in enumerate(arrived, 1):
        transcript.raw += data
        transcript.arrivals.append((len(transcript.raw), float(second)))
    transcript.ended = float(len(arrived))
    return transcript


def framed(data: bytes, sizes: list[int]) -> list[bytes]:
    """Chunks of HTTP of these sizes, the rest in a last one."""
    chunks, place = [], 0
    for size in [*sizes, len(data) - sum(sizes)]:
        chunks.append(b"%x\r\n%b\r\n" % (size, data[place : place + size]))
        place += size
    return [*chunks, b"0\r\n\r\n"]


def test_pieces_and_their_times() -> None:
    answer = heard(HEAD + b"\r\n", *WORDS).answer(9)
    assert (answer.text, answer.tokens, answer.error) == ("abé", 5, None)
    assert (answer.first, answer.gaps, answer.seconds) == (2.0, [1.0], 5.0)


@pytest.mark.parametrize("sizes", [[], [1], [20, 30], [len(WORDS[0]), len(WORDS[1])]])
def test_chunks_may_end_anywhere(sizes: list[int]) -> None:
    chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    answer = heard(chunked, *framed(b"".join(WORDS), sizes)).answer(9)
    assert (answer.text, answer.tokens, answer.error) == ("abé", 5, None)
    assert answer.first == 2.0 + sum(sum(sizes[: k + 1]) < len(WORDS[0]) for k in range(len(sizes)))


def test_cumulative_rows_of_generate() -> None:
    answer = heard(HEAD + b"\r\n", *ROWS).answer(9)
    assert (answer.text, answer.tokens, answer.first, answer.gaps) == ("ab", 3, 2.0, [1.0])


@pytest.mark.parametrize(
    ("arrived", "message"),
    [
        ([], "without an answer"),
        ([b"HTTP/1.1 429 Too Many\r\n\r\n", b"later"], "HTTP 429: later"),
        ([HEAD + b"\r\n", b'data: {"error": {"message": "dead"}}\n\n'], "dead"),
        ([HEAD + b"\r\n", b"data: {]\n\n"], "not a stream of events"),
        ([HEAD + b"\r\n", b"data: [DONE]\n\n"], "no text"),
    ],
)
def test_what_is_no_answer(arrived: list[bytes], message: str) -> None:
    assert message in (heard(*arrived).answer(9).error or "")


def test_only_plain_http() -> None:
    with pytest.raises(Error, match="http://"):
        Target("https://127.0.0.1:1")
