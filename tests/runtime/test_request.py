"""Sampling parameters validate themselves; the message names the field and the value."""

from __future__ import annotations

import random
from typing import Any

import pytest

from runtime.errors import InvalidRequest
from runtime.request import FinishReason, Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 10**6), ("n", True), ("n", 1.5),
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("top_k", 2.5), ("min_p", -0.1), ("min_p", 1.5),
        ("seed", "x"), ("seed", 10**30), ("max_tokens", -1), ("max_tokens", 1.0), ("min_tokens", -1), ("min_tokens", 500),
        ("stop", [""]), ("stop", [1]), ("stop", ["x"] * 10_000), ("stop_token_ids", ["a"]),
        ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop", 5),
        ("logprobs", -1), ("logprobs", 10**6), ("prompt_logprobs", -1),
        ("repetition_penalty", 0), ("presence_penalty", 2.5), ("frequency_penalty", float("nan")),
        ("logit_bias", {5: 101}), ("logit_bias", {-1: 1}), ("logit_bias", dict.fromkeys(range(100000), 1)),
    ],
)  # fmt: skip
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field):
        SamplingParams(**{field: value})


def test_a_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="\n\n").stop_strings == ("\n\n",)
    assert SamplingParams(stop=None).stop_strings == ()


def make_request(**params: Any) -> Request:
    return Request(0, 0, [1, 2, 3], SamplingParams(**params), 4, random.Random(0), frozenset({9}))


def test_ids_cross_from_prompt_to_output() -> None:
    request = make_request()
    request.output = [4, 5, 6]
    assert [request.ids(a, b) for a, b in [(0, 6), (2, 4), (3, 5), (0, 2), (5, 6)]] == [
        [1, 2, 3, 4, 5, 6], [3, 4], [4, 5], [1, 2], [6],
    ]  # fmt: skip


def test_what_ends_a_request() -> None:
    request = make_request(min_tokens=1)
    request.output = [9]
    assert request.ended_by(9) is None, "min_tokens is not reached"
    request.output = [8, 9]
    assert request.ended_by(9) is FinishReason.STOP
    request.output = [8, 8, 8, 8]
    assert request.ended_by(8) is FinishReason.LENGTH
