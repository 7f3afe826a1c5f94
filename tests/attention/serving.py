"""A whole model served over scattered pages, step by step, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention import AttentionBackend, AttentionBatch, AttentionSpec, forward_batch
from attention.hf import prepare
from attention.reference import ReferenceBackend
from tests.attention.paging import poisoned_cache, scattered_tables

Step = dict[int, int]
"""Sequence -> number of its next tokens, packed in this order."""


@torch.no_grad()
def serve(
    model: PreTrainedModel,
    specs: Sequence[AttentionSpec],
    prompts: list[list[int]],
    steps: list[Step],
    backend: AttentionBackend | None = None,
    block_size: int = 3,
) -> list[Tensor]:
    """The logits of every token of every prompt, [tokens, vocabulary], fed in ``steps``."""
    prepare(model)
    lengths = [len(prompt) for prompt in prompts]
    cache = poisoned_cache(specs, sum(lengths) + len(lengths) * block_size, block_size)
    tables = scattered_tables(lengths, cache)
    done = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for step in steps:
        ids = [token for s, count in step.items() for token in prompts[s][done[s] : done[s] + count]]
        for sequence, count in step.items():
            done[sequence] += count
        counts = list(step.values())
        batch = AttentionBatch.pack(counts, [done[s] for s in step], [tables[s] for s in step], block_size)
        with forward_batch(batch, cache, backend or ReferenceBackend(), specs):
            out = model(torch.tensor([ids]), position_ids=batch.positions()[None], use_cache=False).logits[0]
        for sequence, rows in zip(step, out.split(counts), strict=True):
            logits[sequence].append(rows)
    assert done == lengths
    return [torch.cat(rows) for rows in logits]


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """The logits of one prompt by itself through eager attention, [tokens, vocabulary]."""
    return model(torch.tensor([prompt]), use_cache=False).logits[0]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())
