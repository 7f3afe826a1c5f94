"""What a benchmark asks for: prompts of random tokens, or the first turns of recorded conversations."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from runtime.bench_client import Prompt
from runtime.errors import Error


def add_options(parser: argparse.ArgumentParser) -> None:
    """SGLang's flags."""
    parser.add_argument("--num-prompts", type=int, default=40, metavar="N")
    parser.add_argument("--dataset-name", choices=("random", "sharegpt"), default="random", help="default: random")
    parser.add_argument("--dataset-path", metavar="FILE", help="of sharegpt: JSON, a list of conversations")
    parser.add_argument("--sharegpt-output-len", type=int, default=64, metavar="N", help="tokens to generate")
    parser.add_argument("--random-input-len", type=int, default=64, metavar="N")
    parser.add_argument("--random-output-len", type=int, default=64, metavar="N")
    parser.add_argument("--random-range-ratio", type=float, default=1.0, metavar="R", help="shortest to longest")


def make_load(arguments: argparse.Namespace, vocabulary: int, run: int = 0) -> list[tuple[Prompt, int]]:
    """Prompts, and how many tokens to generate after each; random ones are others in each ``run``, so that none is cached.
    Raises :class:`Error`."""
    if arguments.num_prompts < 1:
        raise Error(f"--num-prompts must be at least 1, not {arguments.num_prompts}.")
    chance = random.Random(arguments.seed + run)
    if arguments.dataset_name == "random":
        return _random(arguments, vocabulary, chance)
    texts = _first_turns(arguments.dataset_path)
    chance.shuffle(texts)
    return [(text, arguments.sharegpt_output_len) for text in texts[: arguments.num_prompts]]


def _random(arguments: argparse.Namespace, vocabulary: int, chance: random.Random) -> list[tuple[Prompt, int]]:
    ratio = arguments.random_range_ratio
    if not 0 < ratio <= 1:
        raise Error(f"--random-range-ratio must be above 0 and at most 1, not {ratio}.")

    def length(longest: int) -> int:
        return chance.randint(max(1, int(longest * ratio)), longest)

    return [
        ([chance.randrange(vocabulary) for _ in range(length(arguments.random_input_len))], length(arguments.random_output_len))
        for _ in range(arguments.num_prompts)
    ]  # fmt: skip


def _first_turns(file: str | None) -> list[Any]:
    """Of every conversation that got an answer."""
    if file is None:
        raise Error("--dataset-name sharegpt needs --dataset-path: a JSON file of conversations.")
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
        turns = [row.get("conversations") or row.get("conversation") or [] for row in rows]
        texts = [turn[0]["value"] for turn in turns if len(turn) > 1 and turn[0]["value"]]
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise Error(f"--dataset-path {file}: {type(error).__name__}: {error}") from error
    if not texts:
        raise Error(f"--dataset-path {file}: no conversation has a question and an answer.")
    return texts
