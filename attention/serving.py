"""Answering the calls of a served forward: each is checked against the one that was recorded, then a backend attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from attention import latent, mixers
from attention.base import AttentionBackend, AttentionBatch, AttentionError, AttentionSpec, UnsupportedAttention
from attention.call import Call, Forward, Original
from attention.expansion import LatentForward
from attention.kv_cache import KVCache
from attention.positions import retemper, tempers_rows
from attention.states import Segment, StateCache


class Serving(Forward):
    """The calls of one forward, in order; each must be what was recorded. ``calls``: how many came so far."""

    def __init__(
        self,
        batches: Sequence[AttentionBatch],
        cache: KVCache,
        backend: AttentionBackend,
        specs: Sequence[AttentionSpec],
        states: StateCache | None,
        segments: Sequence[Segment],
        lengths: Sequence[int],
    ) -> None:
        self.batches = cache.layout.in_pages(batches, cache.block_size)
        self.cache, self.backend, self.specs = cache, backend, specs
        self.states, self.segments, self.lengths = states, segments, lengths
        self.calls = 0
        self.latents = [LatentForward(backend, batch, cache) for batch in self.batches]
        self.kept: tuple[Tensor, Tensor] | None = None  # latents that the next call must bring
        self.shared = {spec.shares for spec in specs if spec.shares is not None}
        self.handed: dict[int, tuple[Tensor, Tensor]] = {}  # what calls brought that others share

    def describe(self, module: nn.Module) -> str:
        return f"attention call {self.calls} ({type(module).__name__}, layer {getattr(module, 'layer_idx', '?')})"

    def attend(self, call: Call) -> Tensor:
        if call.mask is not None:
            raise UnsupportedAttention(f"{self.describe(call.module)}: it brings an attention mask")
        if self.calls == len(self.specs):
            raise AttentionError(f"{self.describe(call.module)}: the recorded forward made only {self.calls} calls")
        spec = self.specs[self.calls]
        self._require_kept(spec, call)
        seen = call.spec(call.options.get("sliding_window", spec.window), spec.chunk)
        if replace(seen, key_dim=call.k.shape[3], latent=spec.latent, shares=spec.shares) != spec:
            raise AttentionError(f"{self.describe(call.module)}: it is {seen}, but {spec} was recorded")
        group = self.cache.layout.groups[self.calls]
        batch = self.batches[group]
        if call.q.shape[2] != batch.slots.shape[0]:
            raise AttentionError(f"{call.q.shape[2]} tokens came, the batch describes {batch.slots.shape[0]}")

        q, k, v = (tensor[0].transpose(0, 1) for tensor in (call.q, call.k, call.v))  # [T, H, D]
        if tempers_rows(call.module):
            q = retemper(call.module, q, batch.positions())
        if spec.latent:
            projection = latent.Projection.of(call.module, spec, q.shape[2])
            out = self.latents[group].attend(self.calls, spec, projection, q, k, call.sinks)
        else:
            out = self.backend.forward(self.calls, spec, q, k, v, batch, self.cache, call.sinks)
        self.calls += 1
        return out[None]

    def _require_kept(self, spec: AttentionSpec, call: Call) -> None:
        """Keys and values that are not kept as they come must be what was recorded: latents, or those of another call."""
        if self.calls in self.shared:
            self.handed[self.calls] = call.k, call.v
        known = self.kept if spec.latent else (call.k, call.v)
        if spec.shares is not None:
            known = self.handed[spec.shares]
        if known is None or known[0] is not call.k or known[1] is not call.v:
            raise AttentionError(f"{self.describe(call.module)}: it brings keys of its own, but {spec} was recorded")
        self.kept = None

    def expand(self, module: nn.Module, original: Original, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        if self.calls == len(self.specs) or not self.specs[self.calls].latent:
            keys, values = original(latents, rotated)
            return keys, values
        self.kept = latent.joined(latents, rotated)
        return self.kept

    def mix(self, module: nn.Module, forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.states is None:
            raise AttentionError(f"{type(module).__name__} keeps a recurrent state, but this forward brings no states")
        return mixers.serve(forward, args, kwargs, self.states, self.segments)
