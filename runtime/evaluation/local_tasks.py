"""Tasks that need no download: questions made here, the same on every machine, with enough of them that a difference of a
percent or two is one (:mod:`runtime.evaluation.tasks` pairs the answers).

Every question has one right continuation among several of the same length, so that log-likelihoods compare. They ask for
what small models of text or code can do: copy, close brackets, go on counting, keep to a list.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

ITEMS = 500
"""Questions of each task."""

NAMES = (
    "alpha", "beta", "count", "data", "entry", "field", "group", "header", "index", "key", "line", "mode", "name", "offset",
    "path", "query", "result", "size", "table", "unit", "value", "width",
)  # fmt: skip
PAIRS = {"(": ")", "[": "]", "{": "}"}

Question = dict[str, Any]


def _copy(chance: random.Random) -> Question:
    """A sequence, and the same one again up to its last name."""
    names = chance.sample(NAMES, 5)
    wrong = chance.sample([name for name in NAMES if name not in names], 3)
    return _question(f"{' '.join(names)}\n{' '.join(names[:-1])}", [names[-1], *wrong], chance)


def _brackets(chance: random.Random) -> Question:
    """Nested calls, and the brackets that close them."""
    opened = [chance.choice("([{") for _ in range(chance.randint(2, 4))]
    right = "".join(PAIRS[bracket] for bracket in reversed(opened))
    text = "".join(f"{chance.choice(NAMES)}{bracket}" for bracket in opened) + chance.choice(NAMES)
    wrong = {"".join(chance.choice(")]}") for _ in opened) for _ in range(40)} - {right}
    return _question(f"x = {text}", [right, *sorted(wrong)[:3]], chance, gap="")


def _counting(chance: random.Random) -> Question:
    """Numbers in equal steps."""
    start, step = chance.randint(0, 400), chance.randint(1, 25)
    shown = [start + step * k for k in range(5)]
    right = start + step * 5
    wrong = chance.sample([right + d for d in (-3, -2, -1, 1, 2, 3) if d != 0 and right + d > 0], 3)
    return _question(", ".join(map(str, shown)) + ",", [str(right), *map(str, wrong)], chance)


def _argument(chance: random.Random) -> Question:
    """A constructor that stores its arguments under their names."""
    names = chance.sample(NAMES, 3)
    wrong = chance.sample([name for name in NAMES if name not in names], 2)
    body = "".join(f"        self.{name} = {name}\n" for name in names[:2])
    text = f"    def __init__(self, {', '.join(names)}):\n{body}        self.{names[2]} ="
    return _question(text, [names[2], names[0], *wrong], chance)


def _question(text: str, choices: list[str], chance: random.Random, gap: str = " ") -> Question:
    """``choices[0]`` is right; it is shuffled among the others."""
    order = list(range(len(choices)))
    chance.shuffle(order)
    return {"text": text, "choices": [gap + choices[place] for place in order], "label": order.index(0)}


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "relinear_copy": _copy,
    "relinear_brackets": _brackets,
    "relinear_counting": _counting,
    "relinear_argument": _argument,
}


def questions(name: str) -> list[Question]:
    """The questions of one task, always the same ones."""
    chance = random.Random(name)
    return [KINDS[name](chance) for _ in range(ITEMS)]


def task_config(name: str) -> dict[str, Any]:
    """lm-eval's configuration of a local task."""

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(questions(name))}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
