"""Attention over a filled paged cache, and the same keys and values for PyTorch's own attention, lying one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attention import AttentionBackend, AttentionBatch, AttentionSpec, KVCache

BLOCK_SIZE = 16
MOST_COPIES = 32

PEERS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Case:
    """``queries`` new tokens of each of ``batch`` sequences, which then have ``context`` tokens."""

    spec: AttentionSpec
    batch: int
    context: int
    queries: int
    stored: torch.dtype

    def __str__(self) -> str:
        kind = "decode" if self.queries == 1 else "prefill"
        return f"{kind} {self.context} x {self.batch}" + (" latent" if self.spec.latent else "")

    @property
    def nbytes(self) -> int:
        """Of the keys and values that have to be read."""
        return self.batch * self.context * KVCache.bytes_per_token([self.spec], self.stored)

    @property
    def operations(self) -> int:
        seen = sum(range(self.context - self.queries + 1, self.context + 1))
        return 2 * self.batch * seen * self.spec.heads * (self.spec.key_dim + self.spec.value_dim)


class Filled:
    """A case with data: random numbers in scattered pages, in as many copies as no cache of the device holds."""

    def __init__(self, case: Case, model: torch.dtype, device: torch.device, beyond: int) -> None:
        spec = case.spec
        pages = -(-case.context // BLOCK_SIZE)
        copies = max(1, min(MOST_COPIES, -(-beyond // case.nbytes)))
        self.case, self.copies = case, range(copies)
        self.cache = KVCache([spec] * copies, pages * case.batch, BLOCK_SIZE, case.stored, device)
        for tensor in (*self.cache.k, *self.cache.v):
            for block in tensor.split(1024):
                values = torch.randn(block.shape, device=device)
                block.copy_(values * 40 if case.stored == torch.int8 else values)
        for tensor in (*self.cache.k_scale, *self.cache.v_scale):
            tensor.uniform_(0.01, 0.03) if case.stored == torch.int8 else tensor.uniform_(0.5, 1.5)
        scattered = torch.randperm(pages * case.batch).view(case.batch, pages).tolist()
        self.batch = AttentionBatch.pack(
            [case.queries] * case.batch, [case.context] * case.batch, scattered, BLOCK_SIZE, device
        )
        random = partial(torch.randn, device=device, dtype=model)
        tokens = case.queries * case.batch
        self.q = random(tokens, spec.heads, spec.key_dim)
        self.k, self.v = random(tokens, spec.kv_heads, spec.key_dim), random(tokens, spec.kv_heads, spec.value_dim)

    def forwards(self, backend: AttentionBackend) -> list[Callable[[], Tensor]]:
        """Storing and attending."""
        return [partial(backend.forward, call, *self._arguments()) for call in self.copies]

    def error(self, backend: AttentionBackend, reference: AttentionBackend) -> float:
        """Relative, of the first copy."""
        got, wanted = (each.forward(0, *self._arguments()).float() for each in (backend, reference))
        return ((got - wanted).norm() / wanted.norm()).item()

    def _arguments(self) -> tuple[AttentionSpec, Tensor, Tensor, Tensor, AttentionBatch, KVCache, None]:
        return self.case.spec, self.q, self.k, self.v, self.batch, self.cache, None

    def peers(self) -> dict[str, list[Callable[[], Tensor]]]:
        """PyTorch's attention over keys and values that need no pages and no storing, and on CPUs also over those gathered
        from the pages; without those that refuse."""
        case, spec = self.case, self.case.spec
        lying = [
            tuple(
                torch.randn(case.batch, spec.kv_heads, case.context, dim, device=self.q.device, dtype=self.q.dtype)
                for dim in (spec.key_dim, spec.value_dim)
            )
            for _ in self.copies
        ]
        q = self.q.view(case.batch, case.queries, spec.heads, spec.key_dim).transpose(1, 2)
        options = {"is_causal": case.queries > 1, "scale": spec.scale, "enable_gqa": True}

        def attend(kind: SDPBackend, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

        kinds = PEERS if self.q.device.type == "cuda" else {"sdpa": SDPBackend.FLASH_ATTENTION}
        found = {name: [partial(attend, kind, k, v) for k, v in lying] for name, kind in kinds.items()}
        if self.q.device.type == "cuda":
            found["varlen_attn"] = self._varlen(lying)
        else:
            positions = torch.arange(case.context)
            slots = self.batch.block_tables[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE

            def gather(call: int) -> Tensor:
                k, v = (tensor.transpose(1, 2) for tensor in self.cache.read(call, slots))
                return attend(SDPBackend.FLASH_ATTENTION, k, v)

            found["gather + sdpa"] = [partial(gather, call) for call in self.copies]
        return {name: calls for name, calls in found.items() if _works(name, calls[0])}

    def _varlen(self, lying: list[tuple[Tensor, ...]]) -> list[Callable[[], Tensor]]:
        from torch.nn.attention.varlen import varlen_attn

        case, device = self.case, self.q.device
        # from torch 2.12 on, sharing keys has to be asked for
        grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
        starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            window = (-1, 0) if case.queries > 1 else (-1, -1)
            options = {"scale": case.spec.scale, "window_size": window, **grouped}
            shape = (starts * case.queries, starts * case.context, case.queries, case.context)
            result: Tensor = varlen_attn(self.q, k, v, *shape, **options)
            return result

        packed = [tuple(each.transpose(1, 2).flatten(0, 1).contiguous() for each in pair) for pair in lying]
        return [partial(attend, k, v) for k, v in packed]


_refused: set[str] = set()


def _works(name: str, call: Callable[[], Tensor]) -> bool:
    try:
        call()
    except (RuntimeError, TypeError) as error:
        if name not in _refused:
            print(f"{name} cannot: {str(error).splitlines()[0][:100]}")
        _refused.add(name)
        return False
    return True
