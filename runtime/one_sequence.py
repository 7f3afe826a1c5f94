"""One sequence at a time through the engine's attention and pages, without its scheduler: for what compares logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attention.base import AttentionBackend, AttentionBatch
from attention.hf import Layers, forward_batch
from attention.kv_cache import KVCache, StaticScales
from attention.states import Segment, StateCache

BLOCK = 16


class OneSequence:
    """Keys and values of one sequence, as ``dtype`` and with the ``static`` scales of the checkpoint, if it has any."""

    def __init__(
        self,
        layers: Layers,
        backend: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
        static: Sequence[StaticScales] | None = None,
    ):
        self._layers, self._backend, self._device = layers, backend, device
        self._dtype, self._static = dtype, static
        self._cache: KVCache | None = None

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """``[tokens, vocabulary]`` of a model that attends over pages, for the whole sequence ``ids`` ``[tokens]``."""
        length = len(ids)
        blocks = -(-length // BLOCK)
        if self._cache is None or self._cache.blocks < blocks:
            self._cache = KVCache(self._layers.attention, blocks, BLOCK, self._dtype, self._device, self._static)
        states = StateCache(self._layers.mixers, 1, self._device) if self._layers.mixers else None
        batch = AttentionBatch.pack([length], [length], [list(range(blocks))], BLOCK, self._device)
        whole = [Segment(0, 0, length, fresh=True)]
        with forward_batch(batch, self._cache, self._backend, self._layers.attention, states, whole):
            logits: Tensor = model(input_ids=ids[None], position_ids=batch.positions()[None], use_cache=False).logits[0]
        return logits
