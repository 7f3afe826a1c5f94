"""Where a model takes positions from something that a packed forward changes.

A packed forward gives every token its own position id, and nearly all models use nothing else. The exceptions are here:
rotary embeddings whose frequencies depend on the longest sequence in the forward (:func:`rotate` asks them for one sequence
length after another), and layers that number the tokens of the forward themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention.call import Original

LENGTH_DEPENDENT_ROPE = {
    "longrope": "it uses its long factors for every sequence as soon as one passes original_max_position_embeddings",
    "dynamic": "it rescales every sequence as soon as one passes max_position_embeddings",
}
"""Types of rotary embedding, and what they do to the sequences of a batch."""


class LengthDependence(NamedTuple):
    """A rotary embedding of type ``kind`` treats sequences of more than ``limit`` tokens by their length."""

    kind: str
    limit: int

    def __str__(self) -> str:
        return f"the rotary embedding is of type {self.kind}: {LENGTH_DEPENDENT_ROPE[self.kind]} ({self.limit})"


def length_dependent_rope(config: Any) -> LengthDependence | None:
    """Whether, and from where on, a rotary embedding depends on the length of the sequence; ``None``: it does not."""
    text = config.get_text_config(decoder=True)
    for parameters in _rope_parameters(getattr(text, "rope_parameters", None)):
        kind = parameters["rope_type"]
        if kind == "longrope":
            return LengthDependence(kind, parameters["original_max_position_embeddings"])
        if kind == "dynamic":
            return LengthDependence(kind, text.max_position_embeddings)
    return None


def _rope_parameters(parameters: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The parameters, or those of each kind of layer where the config nests them."""
    for value in [parameters or {}, *(parameters or {}).values()]:
        if isinstance(value, Mapping) and "rope_type" in value:
            yield value


def depends_on_length(module: nn.Module) -> bool:
    """Whether this is a rotary embedding that treats sequences by their length."""
    types: Any = getattr(module, "rope_type", None)
    return bool(LENGTH_DEPENDENT_ROPE.keys() & set(types.values() if isinstance(types, dict) else [types]))


def rotate(
    module: nn.Module, forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: Sequence[int]
) -> Any:
    """What a rotary embedding answers if each token is in a sequence of so many tokens (0: of few): [1, T, ...].

    The tokens of each length are given to it by themselves, and with them the last position of such a sequence.
    """
    bound = inspect.signature(forward).bind(*args, **kwargs)
    positions = bound.arguments["position_ids"]  # [..., T]
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows.setdefault(length, []).append(row)
    out: Any = None
    for length, own in rows.items():
        index = torch.tensor(own, device=positions.device)
        last = [positions.new_full((*positions.shape[:-1], 1), length - 1)] if length else []
        bound.arguments["position_ids"] = torch.cat([positions[..., index], *last], -1)
        _forget_lengths(module)
        out = _merge(out, forward(*bound.args, **bound.kwargs), index, len(lengths))
    return out


def _forget_lengths(module: Any) -> None:
    """A dynamic embedding keeps the frequencies of the longest sequence that it has seen, until there is a short one."""
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            setattr(module, name.removesuffix("original_inv_freq") + "inv_freq", buffer.clone())


def _merge(out: Any, part: Any, rows: Tensor, total: int) -> Any:
    """Put the answer [..., n, D] for ``rows``, and perhaps one more, into ``out`` [..., T, D], made for the first."""
    if isinstance(part, tuple):
        outs = out if out is not None else (None,) * len(part)
        return tuple(_merge(place, item, rows, total) for place, item in zip(outs, part, strict=True))
    if out is None:
        out = part.new_empty(*part.shape[:-2], total, part.shape[-1])
    out[..., rows, :] = part[..., : len(rows), :]
    return out


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
