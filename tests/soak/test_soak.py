"""A short soak, and that it would notice."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from tests.soak.answers import Question, questions
from tests.soak.run import Soak


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return questions()


def test_a_short_soak_holds(asked: list[Question]) -> None:
    result = Soak(asked).run(seconds=7, round_seconds=2, ends=[(0.2, signal.SIGKILL)])
    assert not result.violations
    assert result.restarts == 1
    kinds = {outcome.partition(" ")[0] for outcome in result.outcomes}
    assert {"answered", "streamed", "left", "refused", "looked", "sampled"} <= kinds, result.outcomes
    assert sum(result.outcomes.values()) > 50


def test_a_wrong_answer_is_a_violation(asked: list[Question]) -> None:
    wrong = [replace(question, answer=question.answer + "!") for question in asked]
    assert "offline" in Soak(wrong).run(seconds=2, round_seconds=1).violations[0]
