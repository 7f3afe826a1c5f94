"""What a model answers to a prompt by itself: the oracle of everything that is computed in batches, chunks and pages."""

from __future__ import annotations

import torch
from torch import nn


@torch.inference_mode()
def greedy_alone(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The ``count`` likeliest next tokens, each by a whole forward pass without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
