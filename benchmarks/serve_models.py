"""Checkpoints that any server answers to the end, with a tokenizer of one word a token.

Text goes in and comes out, and still says exactly which tokens it was, so that answers of servers that never show token ids
can be compared token by token. No token ends an answer, so all answers have the length that was asked for.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks import random_llama
from runtime.checkpoint import locate

KINDS = {"awq": "demo", "bf16": "demo-bf16"}
"""Kinds of checkpoint, and the bundled model of each."""
ENDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def write(name: str, folder: Path, kind: str) -> Path:
    """Write the ``kind`` of ``demo`` or of a shape to ``folder``; returns it."""
    if name == "demo":
        shutil.copytree(locate(KINDS[kind]), folder, ignore=shutil.ignore_patterns("tokenizer*", "generation_config*"))
    else:
        random_llama.write(random_llama.SHAPES[name], folder, quantized=kind == "awq")
    file = folder / "config.json"
    config = json.loads(file.read_text()) | dict.fromkeys(ENDS)
    file.write_text(json.dumps(config))
    words = Tokenizer(WordLevel({word(token): token for token in range(config["vocab_size"])}, unk_token=word(0)))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def word(token: int) -> str:
    return f"w{token}"


def text_of(tokens: Sequence[int]) -> str:
    return " ".join(map(word, tokens))


def tokens_of(text: str) -> list[int]:
    """The tokens of a text; none if it has a word that is not a token's."""
    words = text.split()
    known = all(word.startswith("w") and word[1:].isdigit() for word in words)
    return [int(word[1:]) for word in words] if known else []


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(vocabulary) for _ in range(length)] for _ in range(count)]
