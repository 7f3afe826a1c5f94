"""What the server is asked in a soak, and what the same model says offline."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from runtime import LLM, SamplingParams
from tests.runtime.served import CHAT_TEMPLATE

MARGIN = 0.02
"""Least distance, in log-probability, between the best two tokens of a position: batches of different sizes may round
differently, and a near tie would tell nothing."""

PROMPTS = (
    "def main():\n", "import os\n", "class Stack:\n    def push(self, item):\n", "x = [1, 2, 3]\nfor", "import os\n" * 40,
    "    def __init__(self, name):\n        self.", "try:\n    import json\nexcept", "with open(path) as file:\n",
    "def add(a, b):\n    return a + b\n" * 60, "raise ValueError(", "class Error(Exception):\n", "if __name__ ==",
)  # fmt: skip
FORMS: tuple[dict[str, Any], ...] = (
    {"regex": "[a-c]{3}-[0-9]{2}"},
    {"choice": ["left", "right"]},
    {
        "json": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
    },
)


@dataclass(frozen=True)
class Question:
    """A greedy request as each route takes it, and its answer."""

    route: str
    body: dict[str, Any]
    answer: str

    def text(self, row: dict[str, Any]) -> str:
        """What an answer, or one event of it, says."""
        if self.route == "/generate":
            return str(row["text"])
        choice = row["choices"][0]
        if self.route == "/v1/completions":
            return str(choice["text"])
        return str((choice.get("message") or choice["delta"]).get("content") or "")

    @property
    def cumulative(self) -> bool:
        return self.route == "/generate"


def questions() -> list[Question]:
    """As many as can be told apart from their neighbours, with the answers of a model of our own."""
    llm = LLM("demo", dtype="float32")
    chance = random.Random(0)
    found: list[Question] = []
    for number, prompt in enumerate(PROMPTS):
        form = FORMS[number % len(FORMS)] if number % 4 == 3 else None
        params = SamplingParams(
            temperature=0, max_tokens=chance.choice([4, 16, 48]), logprobs=2, structured_outputs=form,
            stop=["return"] if number % 3 == 0 and form is None else (),
        )  # fmt: skip
        fields = {"max_tokens": params.max_tokens, "temperature": 0, "stop": list(params.stop_strings) or None}
        if form is not None:
            fields["structured_outputs"] = form
        output = llm.generate([prompt], params)[0]
        if _clear(output):
            found.append(Question("/v1/completions", {**fields, "prompt": prompt}, output.outputs[0].text))
            if form is None:
                sampling = {"max_new_tokens": params.max_tokens, "temperature": 0, "stop": fields["stop"]}
                ids = {"input_ids": output.prompt_token_ids, "sampling_params": sampling}
                found.append(Question("/generate", ids, output.outputs[0].text))
        messages = [{"role": "user", "content": prompt}]
        said = llm.chat(messages, params, chat_template=CHAT_TEMPLATE)
        if _clear(said):
            found.append(Question("/v1/chat/completions", {**fields, "messages": messages}, said.outputs[0].text))
    assert len({question.answer for question in found}) > 8
    return found


def _clear(output: Any) -> bool:
    """Whether every token of an answer was the best by :data:`MARGIN`."""
    rows = [sorted((entry.logprob for entry in row.values()), reverse=True) for row in output.outputs[0].logprobs]
    return all(best - second >= MARGIN for best, second, *_ in rows)
