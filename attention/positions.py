"""Where a model takes positions from something that a packed forward changes.

A packed forward gives every token its own position id, and nearly all models use nothing else. The exceptions are here:
rotary embeddings whose frequencies depend on the longest sequence in the forward, and layers that number the tokens of
the forward themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BATCH_DEPENDENT_ROPE = {
    "longrope": "it uses its long factors for every sequence as soon as one passes original_max_position_embeddings",
    "dynamic": "it rescales every sequence as soon as one passes max_position_embeddings",
}


def batch_dependent_rope(config: Any) -> str | None:
    """Why one sequence's rotary embedding depends on its neighbours in the batch; ``None``: it does not."""
    text = config.get_text_config(decoder=True)
    for rope_type in _rope_types(getattr(text, "rope_parameters", None)):
        if rope_type in BATCH_DEPENDENT_ROPE:
            return f"the rotary embedding is of type {rope_type}: {BATCH_DEPENDENT_ROPE[rope_type]}"
    return None


def _rope_types(parameters: Mapping[str, Any] | None) -> Iterator[str]:
    """The rope type, or one for each kind of layer where the config nests them."""
    for value in [parameters or {}, *(parameters or {}).values()]:
        if isinstance(value, Mapping) and "rope_type" in value:
            yield value["rope_type"]


def tempers_rows(module: nn.Module) -> bool:
    """Whether this is a Llama 4 layer that scales its queries by their row: :func:`retemper` sets it right."""
    return (
        type(module).__name__ == "Llama4TextAttention"
        and bool(module.attn_temperature_tuning and not module.use_rope)
        and "arange" in inspect.unwrap(type(module).forward).__code__.co_names  # the version at hand still counts rows
    )


def retemper(module: Any, q: Tensor, positions: Tensor) -> Tensor:
    """Scale the queries [T, H, D] of a Llama 4 layer by their positions [T] instead of their rows.

    The layer has multiplied row ``i`` by ``1 + attn_scale * log(1 + floor((i + 1) / floor_scale))``: rows are positions
    only for one sequence computed in one piece.
    """

    def temperature(positions: Tensor) -> Tensor:
        steps = torch.floor((positions + 1.0) / float(module.floor_scale))
        return torch.log1p(steps) * float(module.attn_scale) + 1.0

    rows = torch.arange(q.shape[0], device=q.device)
    correction = temperature(positions) / temperature(rows)
    return (q * correction[:, None, None]).to(q.dtype)
