"""Incremental text: never half a character, never a part of a stop string, and nothing is lost at the end."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.checkpoint import locate
from runtime.detokenize import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(locate("demo-bf16"))


def pieces(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def run(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = (), **options: Any) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, pieces(tokenizer, "def f(x):"), stop, **options)
    emitted = []
    for token in ids:
        emitted.append(detokenizer.feed(token))
        if detokenizer.matched is not None:
            return emitted, detokenizer.matched
    return [*emitted, detokenizer.flush()], None


TEXTS = [
    "\n    return x + 1\n",
    " 🙂🙂 naïve — “quoted” 漢字\n",
    "\t\t  \n\n",
    "a" * 50,
    "x" + "\N{COMBINING ACUTE ACCENT}" * 5,
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_hold_no_half_character(tokenizer: Any, text: str) -> None:
    emitted, _ = run(tokenizer, pieces(tokenizer, text))
    assert "".join(emitted) == text
    assert not any("\ufffd" in piece for piece in emitted)


def test_a_character_cut_off_at_the_end_is_flushed_as_decode_gives_it(tokenizer: Any) -> None:
    ids = pieces(tokenizer, "ok 🙂")[:-1]
    emitted, _ = run(tokenizer, ids)
    assert "".join(emitted) == tokenizer.decode(ids)
    assert "".join(emitted).endswith("\ufffd")


def test_a_prompt_that_ends_inside_a_character(tokenizer: Any) -> None:
    ids = pieces(tokenizer, "a 🙂")
    detokenizer = Detokenizer(tokenizer, ids[:-1])
    assert detokenizer.feed(ids[-1]) + detokenizer.flush() == "🙂"


def test_random_tokens_add_up_to_what_decode_gives(tokenizer: Any) -> None:
    chance = random.Random(0)
    for _ in range(20):
        ids = [chance.randrange(300, len(tokenizer)) for _ in range(30)]
        emitted, _ = run(tokenizer, ids)
        prompt = pieces(tokenizer, "def f(x):")
        whole = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
        assert "".join(emitted) == whole


@pytest.mark.parametrize("stop", ["return", "rn x", "\n    return x +", "1\n", " "])
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_split(tokenizer: Any, stop: str) -> None:
    text = "\n    return x + 1\n"
    for ids in (pieces(tokenizer, text), [token for char in text for token in pieces(tokenizer, char)]):
        emitted, matched = run(tokenizer, ids, (stop,))
        assert matched == stop
        assert "".join(emitted) == text[: text.index(stop)]
        kept, _ = run(tokenizer, ids, (stop,), keep_stop=True)
        assert "".join(kept) == text[: text.index(stop) + len(stop)]


def test_no_part_of_a_stop_string_is_ever_shown(tokenizer: Any) -> None:
    ids = [token for char in "abcSTOxSTOP" for token in pieces(tokenizer, char)]
    emitted, matched = run(tokenizer, ids, ("STOP",))
    assert matched == "STOP"
    assert emitted == ["a", "b", "c", "", "", "", "STOx", "", "", "", ""]


def test_what_was_held_back_comes_out_at_the_end(tokenizer: Any) -> None:
    emitted, matched = run(tokenizer, pieces(tokenizer, "abc ST"), ("STOP",))
    assert matched is None
    assert "".join(emitted) == "abc ST"


def test_the_earliest_of_several_stop_strings_wins(tokenizer: Any) -> None:
    emitted, matched = run(tokenizer, pieces(tokenizer, "one two three"), ("three", "two", "wo"))
    assert matched == "two"
    assert "".join(emitted) == "one "


def test_a_stop_string_does_not_count_before_it_may(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, [5], ("b",))
    text = "".join(detokenizer.feed(token, may_stop=False) for char in "abc" for token in pieces(tokenizer, char))
    assert text == "abc"


def test_special_tokens_are_left_out_unless_wanted(tokenizer: Any) -> None:
    ids = [*pieces(tokenizer, "x"), tokenizer.eos_token_id]
    assert "".join(run(tokenizer, ids)[0]) == "x"
    assert "".join(run(tokenizer, ids, skip_special_tokens=False)[0]) == "x" + tokenizer.eos_token
