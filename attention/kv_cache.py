"""Where keys and values live: one pair of tensors per attention call of the model's forward.

    k[call]  [blocks, block_size, kv_heads, key_dim]
    v[call]  [blocks, block_size, kv_heads, value_dim]

A pair belongs to a *call*, not to a layer: some models attend twice in one layer or run a layer several times. All
pairs share one numbering of blocks. Who owns which block is the runtime's business: nothing is initialised, counted or
freed here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.base import AttentionSpec


class KVCache:
    """The cache of a whole model. ``dtype`` may differ from the model's; a backend converts as it writes."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size

        def allocate(kv_heads: int, dim: int) -> Tensor:
            return torch.empty(blocks, block_size, kv_heads, dim, dtype=dtype, device=device)

        self.k = [allocate(spec.kv_heads, spec.key_dim) for spec in specs]
        self.v = [allocate(spec.kv_heads, spec.value_dim) for spec in specs]

    @staticmethod
    def bytes_per_token(specs: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
        """Bytes that one token takes in all pairs together; times ``block_size`` it is the price of a block."""
        return sum(spec.kv_heads * (spec.key_dim + spec.value_dim) for spec in specs) * dtype.itemsize
