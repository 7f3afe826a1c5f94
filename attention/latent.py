"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): a latent is kept of each token, not the heads made of it.

A projection expands the latent c of a token to the keys and values of all heads; every key ends in the same rotated part r::

    key of head h      [K_h c | r]       K_h [nope, rank] and V_h [value, rank] are rows of ``kv_b_proj``
    value of head h    V_h c

A query [n | p] scores ``n . K_h c + p . r``, which is ``[n K_h | p] . [c | r]``: absorbed into the query, the projection
turns all heads into queries of one key [c | r], whose first part is the value as well. What comes out is a mean of latents,
which V_h expands. So a token costs ``rank + rotated`` numbers a layer. A model's own code stays as it is: its attention
modules expand in a method of theirs, ``expand_kv(c, r)``, which is answered here, and hand on what it returns.

A module is recognised by that method, and by what it computes: it is run once, on random numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.base import AttentionError, AttentionSpec
from attention.call import Call

METHOD = "expand_kv"
PROJECTION = "kv_b_proj"


def may_expand(module: nn.Module) -> bool:
    """Whether a module has the parts that latent attention needs."""
    projection = getattr(module, PROJECTION, None)
    return hasattr(type(module), METHOD) and isinstance(projection, nn.Module)


class Expanded(NamedTuple):
    """Keys [1, H, T, Dk] and values [1, H, T, Dv] that a module made, and the sizes of the latents that it made them of."""

    keys: Tensor
    values: Tensor
    rank: int
    rotated: int

    def spec(self, call: Call, expanded: AttentionSpec) -> AttentionSpec:
        """What ``call`` computes over latents, if it is over these keys and values; else ``expanded``, what it says itself."""
        if call.k is not self.keys or call.v is not self.values or expanded.heads != expanded.kv_heads:
            return expanded
        return replace(expanded, kv_heads=1, key_dim=self.rank + self.rotated, value_dim=self.rank, latent=True)


Sizes = tuple[type[nn.Module], int, int, int, int, int]


def recognise(
    module: nn.Module, latent: Tensor, rotated: Tensor, keys: Tensor, values: Tensor, tried: dict[Sizes, bool]
) -> Expanded | None:
    """What ``module`` did when it made ``keys`` and ``values`` of ``latent`` [1, 1, T, rank] and ``rotated`` [1, 1, T, r];
    ``None`` if that is not what this module says above. ``tried`` are answers for modules of the same kind and sizes."""
    tokens, rank, rest = latent.shape[2], latent.shape[3], rotated.shape[3]
    heads, nope, value = keys.shape[1], keys.shape[3] - rest, values.shape[3]
    wanted = ((1, 1, tokens, rank), (1, 1, tokens, rest), (1, heads, tokens, nope + rest), (1, heads, tokens, value))
    if tuple(tuple(tensor.shape) for tensor in (latent, rotated, keys, values)) != wanted or nope < 1:
        return None
    sizes = type(module), heads, nope, value, rank, rest
    if sizes not in tried:
        tried[sizes] = _expands(module, *sizes[1:])
    return Expanded(keys, values, rank, rest) if tried[sizes] else None


def _expands(module: nn.Module, heads: int, nope: int, value: int, rank: int, rest: int) -> bool:
    """Whether :data:`METHOD` makes keys and values as said above, tried with random numbers on the CPU."""
    rows = heads * (nope + value)
    projection = getattr(module, PROJECTION)
    if not isinstance(projection, nn.Linear) or projection.bias is not None or projection.weight.shape != (rows, rank):
        return False
    random = torch.Generator().manual_seed(0)
    latent, rotated = (torch.randn(1, 1, 2, size, generator=random) for size in (rank, rest))
    trial = nn.Linear(rank, rows, bias=False, device="meta")
    trial.weight = nn.Parameter(torch.randn(rows, rank, generator=random), requires_grad=False)
    to_keys, to_values = trial.weight.view(heads, -1, rank).split([nope, value], 1)
    setattr(module, PROJECTION, trial)
    try:
        keys, values = getattr(type(module), METHOD)(module, latent, rotated)
    except Exception:  # code that needs more than this is not what it looks like
        return False
    finally:
        setattr(module, PROJECTION, projection)
    return _close(values, latent @ to_values.transpose(1, 2)) and _close(
        keys, torch.cat([latent @ to_keys.transpose(1, 2), rotated.expand(-1, heads, -1, -1)], -1)
    )


def _close(got: Any, wanted: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-3, atol=1e-3)


def joined(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept of tokens, [1, 1, T, rank + r], and its part that is the value."""
    kept = torch.cat([latent, rotated], -1)
    return kept, kept[..., : latent.shape[-1]]


class Projection(NamedTuple):
    """The weight of ``kv_b_proj`` by head, [H, nope + value, rank]: rows to keys first, then rows to values."""

    weight: Tensor
    nope: int

    @classmethod
    def of(cls, module: nn.Module, spec: AttentionSpec, key_dim: int) -> Projection:
        """Of a module whose call was recorded as ``spec``, with queries for keys of ``key_dim``."""
        projection = getattr(module, PROJECTION)
        if not isinstance(projection, nn.Linear) or projection.bias is not None:
            raise AttentionError(f"{type(module).__name__}: to keep latents, {PROJECTION} must be dense, without bias")
        by_head = projection.weight.view(spec.heads, -1, spec.value_dim)
        return cls(by_head, key_dim - (spec.key_dim - spec.value_dim))

    @property
    def value(self) -> int:
        return self.weight.shape[1] - self.nope

    def absorb(self, q: Tensor) -> Tensor:
        """Queries [T, H, rank + r] for latents, of those [T, H, nope + r] for keys."""
        nope = q[..., : self.nope].transpose(0, 1) @ self.weight[:, : self.nope]
        return torch.cat([nope.transpose(0, 1), q[..., self.nope :]], -1)

    def expand(self, means: Tensor) -> Tensor:
        """The values [T, H, Dv] that means of latents [T, H, rank] stand for."""
        return (means.transpose(0, 1) @ self.weight[:, self.nope :].transpose(1, 2)).transpose(0, 1)

    def part(self, heads: slice) -> Projection:
        return Projection(self.weight[heads], self.nope)

    def apart(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [P, H, nope + r] and values [P, H, Dv] of what is kept of tokens [P, rank + r]."""
        heads, _, rank = self.weight.shape
        made = functional.linear(kept[:, :rank], self.weight.flatten(0, 1)).unflatten(1, (heads, -1))
        rotated = kept[:, None, rank:].expand(-1, heads, -1)
        return torch.cat([made[..., : self.nope], rotated], -1), made[..., self.nope :].contiguous()
