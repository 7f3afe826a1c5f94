"""A model made hard to quantize without changing what it computes: some channels of the norms' outputs become large, as they
are in large models of their own accord, and the columns that multiply them small."""

from __future__ import annotations

import torch
from torch import nn

from tests.accuracy.calibrated import norms_and_linears

FACTOR, CHANNELS = 16.0, 8


@torch.no_grad()
def inject_outliers(model: nn.Module, factor: float = FACTOR, channels: int = CHANNELS) -> None:
    """Multiply ``channels`` gains of every norm of a Llama's layers, and divide the columns that take them."""
    chance = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        for norm, linears in norms_and_linears(layer):
            chosen = torch.randperm(len(norm.weight), generator=chance)[:channels]
            norm.weight[chosen] *= factor
            for linear in linears:
                linear.weight[:, chosen] /= factor
