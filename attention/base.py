"""The nouns of paged attention: what one attention call computes, on which rows, and who computes it.

A forward is *packed*: the new tokens of all its sequences lie one after another in one row of ``T`` tokens, and nothing
says prefill or decode. A sequence with one new token is decoding, one with many is prefilling (perhaps a chunk of a
longer prompt), and one forward may hold both. ::

    rows      0  1  2  3  4 │ 5 │ 6  7  8         T = 9 new tokens of B = 3 sequences
    starts    0               5   6           9   query_starts [B + 1]
    kv_lens   5               12  8               keys per sequence once this forward has written its own
    positions 0  1  2  3  4 │11 │ 5  6  7         implied: the queries are the last tokens of their sequence

Keys and values live in blocks of ``block_size`` tokens (:mod:`attention.kv_cache`), and ``block_tables[b]`` lists those
of sequence ``b``: position ``p`` is in slot ``block_tables[b, p // block_size] * block_size + p % block_size``. Entries
past its last block are padding; no backend reads them, nor any slot that the sequence does not own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attention.kv_cache import KVCache


class AttentionError(Exception):
    """Base of every error of this package. It knows modules and shapes; the runtime adds the path."""


class UnsupportedAttention(AttentionError):
    """The model, or one of its layers, asks for attention that nothing here computes."""


class Reach(NamedTuple):
    """How far back a call looks: at most one of the two is set; see :class:`AttentionSpec`."""

    window: int | None = None
    chunk: int | None = None

    @property
    def bounded(self) -> bool:
        return self != Reach()

    @property
    def most(self) -> int | None:
        """The most keys that a query sees, its own among them; ``None``: any number."""
        return self.chunk if self.window is None else self.window

    def first(self, position: int) -> int:
        """The first key that a query at ``position``, or any after it, sees."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def within(self, longest: int | None) -> Reach:
        """The same for sequences of at most ``longest`` tokens, in which a longer reach is none."""
        return self if longest is None or self.most is None or self.most < longest else Reach()


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention call computes: ``softmax(mask(cap(q @ k.T * scale))) @ v``, query heads sharing key heads.

    Every mask is causal. ``window`` W: a query at position q sees keys ``q - W < kv <= q``. ``chunk`` C: only keys with
    ``kv // C == q // C``. ``softcap`` c: scores become ``c * tanh(score / c)`` before masking. ``sinks``: each head has
    one more logit, which takes part in the softmax and has no value.

    Two kinds of calls keep less than keys and values. ``latent``: the values are the first ``value_dim`` numbers of the keys
    (:mod:`attention.latent`), and only the keys are kept. ``shares``: the keys and values are those of an earlier call, this
    number, which keeps them for both.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: bool = False
    shares: int | None = None

    def __post_init__(self) -> None:
        assert not self.latent or self.value_dim <= self.key_dim
        if self.heads % self.kv_heads:
            raise UnsupportedAttention(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly")

    @property
    def kept(self) -> tuple[int, ...]:
        """The dimensions of the vectors that are kept of every token and key head: a key and a value, a key, or nothing."""
        if self.shares is not None:
            return ()
        return (self.key_dim,) if self.latent else (self.key_dim, self.value_dim)

    @property
    def reach(self) -> Reach:
        return Reach(self.window, self.chunk)

    def __str__(self) -> str:
        dims = f"dim {self.key_dim}" + (f"/{self.value_dim}" if self.value_dim != self.key_dim else "")
        parts = [f"{self.heads} heads", f"{self.kv_heads} kv heads", dims, f"scale {self.scale:.6g}"]
        parts += [f"{name} {value:g}" for name in ("window", "chunk", "softcap") if (value := getattr(self, name))]
        parts += ["sinks"] * self.sinks + ["latent"] * self.latent
        return ", ".join(parts + ["keys and values of another layer"] * (self.shares is not None))


@dataclass(frozen=True)
class AttentionBatch:
    """One packed forward; see the module's picture. The tensors are on the model's device, the integers on the host."""

    slots: Tensor  # int64 [T]: where each new token's key and value go
    block_tables: Tensor  # int32 [B, n]
    query_starts: Tensor  # int32 [B + 1]
    kv_lens: Tensor  # int32 [B]
    max_query: int
    max_kv: int

    @classmethod
    def pack(
        cls,
        queries: Sequence[int],
        kv_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """From host lists: per sequence its number of new tokens, its keys after this forward, and its blocks."""
        rows = zip(queries, kv_lens, tables, strict=True)
        assert all(0 < query <= kv <= len(table) * block_size for query, kv, table in rows)
        width = max(map(len, tables))
        block_tables = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32)
        starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lens = torch.tensor(kv_lens, dtype=torch.int32)
        sequence, positions = _locate(starts, lens, sum(queries))
        slots = block_tables[sequence, positions // block_size].long() * block_size + positions % block_size
        return cls(
            slots.to(device), block_tables.to(device), starts.to(device), lens.to(device), max(queries), max(kv_lens)
        )

    def positions(self) -> Tensor:
        """The position of each new token in its own sequence, int64 [T], without a host synchronisation."""
        return _locate(self.query_starts, self.kv_lens, self.slots.shape[0])[1]


def _locate(query_starts: Tensor, kv_lens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The sequence and the position of each packed row, both int64 [total]."""
    rows = torch.arange(total, device=query_starts.device)
    sequence = torch.searchsorted(query_starts.long(), rows, right=True) - 1
    return sequence, rows - query_starts[1:].long()[sequence] + kv_lens.long()[sequence]


class AttentionBackend(ABC):
    """One way to compute attention over the paged cache."""

    name: ClassVar[str]
    capturable: ClassVar[bool] = False
    """Whether, where every sequence has one new token, a forward asks the device for nothing: fit for a CUDA graph."""

    @property
    def summary(self) -> str:
        """The name, and what on this machine it uses."""
        return self.name

    @abstractmethod
    def refuses(self, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why this backend cannot compute ``spec`` on ``device``; ``None``: it can. Asked before any weight is read."""

    @abstractmethod
    def forward(
        self,
        call: int,
        spec: AttentionSpec,
        q: Tensor,  # [T, H, Dk]
        k: Tensor,  # [T, Hkv, Dk]
        v: Tensor,  # [T, Hkv, Dv]
        batch: AttentionBatch,
        cache: KVCache,
        sinks: Tensor | None,  # [H]
    ) -> Tensor:
        """Write what ``spec`` keeps of ``k`` and ``v`` to ``batch.slots`` of pair ``call`` of the cache, then attend:
        [T, H, Dv], contiguous.

        ``q``, ``k`` and ``v`` are whatever views the model made; a backend that needs strides makes them itself.
        """
