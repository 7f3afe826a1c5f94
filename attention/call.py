"""One attention call as a model makes it, and what about it we could not honour.

Whatever a model wants from attention besides queries, keys and values arrives as keyword arguments, and a function that
swallows the ones it does not know computes something else in silence. So every argument is in one of three lists: used,
harmless for a stated reason, or refused; one that is in none is refused too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attention.base import AttentionSpec

Original = Callable[..., Any]
"""A method of a module, as its own code has it."""

USED = {"sliding_window", "softcap", "s_aux"}
HARMLESS = {
    "position_ids": "rotary embeddings are applied already, and the batch implies the positions",
    "cache_position": "as position_ids",
    "is_causal": "True, or it has been refused before this table is asked",
    "use_cache": "asks the model for a cache object, which none of ours is",
    "logits_to_keep": "concerns the head, after the last layer",
    "output_router_logits": "concerns the experts",
    "output_hidden_states": "concerns what the model returns",
    "return_dict": "concerns what the model returns",
}
REFUSED = {
    "output_attentions": "paged attention has no weights to return",
    "position_bias": "a bias is added to the scores",
    "indices": "an indexer selects the keys (sparse attention)",
    "block_indices": "an indexer selects blocks of keys (sparse attention)",
    "cu_seq_lens_q": "the model packs sequences by itself",
}


@dataclass(frozen=True)
class Call:
    """What one attention layer handed over: the arguments of an attention function of Transformers."""

    module: nn.Module
    q: Tensor  # [1, H, T, Dk]
    k: Tensor  # [1, Hkv, T, Dk]
    v: Tensor  # [1, Hkv, T, Dv]
    mask: Tensor | None
    dropout: float
    scaling: float | None
    options: dict[str, Any]

    @property
    def sinks(self) -> Tensor | None:
        return self.options.get("s_aux")

    def spec(self, window: int | None, chunk: int | None) -> AttentionSpec:
        """What the call computes, given what its mask would hide: that, the call itself does not always know."""
        return AttentionSpec(
            heads=self.q.shape[1],
            kv_heads=self.k.shape[1],
            key_dim=self.q.shape[3],
            value_dim=self.v.shape[3],
            scale=self.q.shape[3] ** -0.5 if self.scaling is None else float(self.scaling),
            window=window,
            chunk=chunk,
            softcap=self.options.get("softcap"),
            sinks=self.sinks is not None,
        )

    def refusal(self) -> str | None:
        """What in this call, whatever its mask, would be computed wrongly."""
        if self.q.shape[0] != 1:
            return f"a batch of {self.q.shape[0]}, but sequences must be packed into one row"
        if self.k.shape[2] != self.q.shape[2]:
            keys = "keys that the model compresses or keeps by itself, or another sequence's"
            return f"{self.q.shape[2]} queries meet {self.k.shape[2]} keys: {keys}"
        if self.options.get("is_causal") is False or getattr(self.module, "is_causal", True) is False:
            return "it is not causal (is_causal is False)"
        if self.dropout:
            return f"dropout is {self.dropout}: the model is in training mode"
        for name, value in self.options.items():
            if value is None or name in USED or name in HARMLESS or (name == "output_attentions" and not value):
                continue
            return f"argument {name!r} is not supported: {REFUSED.get(name, 'nothing here knows its meaning')}"
        return None


class Forward(ABC):
    """A forward under way, which answers the calls that it makes."""

    @abstractmethod
    def describe(self, module: nn.Module) -> str:
        """Where the call that is being answered comes from, for an error message."""

    @abstractmethod
    def attend(self, call: Call) -> Tensor:
        """The answer to a call that has nothing to refuse, [1, T, H, Dv]."""

    @abstractmethod
    def mix(self, module: nn.Module, forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer of a recurrent layer, whose own ``forward`` knows nothing of packed sequences."""

    @abstractmethod
    def expand(self, module: nn.Module, original: Original, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer will hand over, of latents and of the rotated part of the keys."""
