"""Are answers the model's own greedy ones? Asked of plain Transformers, without engine, cache or server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from runtime import load_model

TIE = 0.5
"""Most nats by which a chosen token may be less likely than the likeliest. bfloat16 keeps 8 bits, so logits of 16 to 32,
which the bundled model gives, are multiples of 1/8, and two ways to compute one differ by a few of those. A token that was
picked without looking at the model is worse by 4 and more."""

ROUNDED_TIE = 2.0
"""The same for inputs of 8 bits and an output head of 8 bits, which move a logit by more than bfloat16 does."""


def plain_model(path: Path, quantized: bool) -> Any:
    """Transformers' own model; of a quantized checkpoint with our linear layers, which the tests compare with their
    reference."""
    if quantized:
        return load_model(str(path), device="cpu")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


@torch.inference_mode()
def largest_gap(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Nats between the likeliest token and the one that was answered, where that is largest; infinite where an answer has
    no tokens of the model."""
    if not answer or max(answer) >= model.config.vocab_size:
        return float("inf")
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return (logits.amax(-1) - chosen).max().item()
