"""A loaded model, asked for the logits of one window after the other.

The plain Transformers model with quantized linears, unless the configuration names what only the engine has, a KV cache
dtype (or the checkpoint does) or an attention backend: then keys and values go through the engine's pages.
"""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

from attention.base import AttentionBatch, AttentionError
from attention.hf import NAME as ATTENTION
from attention.hf import attention_only, forward_batch, read_layers
from attention.kv_cache import KVCache
from attention.registry import select
from runtime.checkpoint import Checkpoint
from runtime.config import EngineConfig
from runtime.defaults import context_length, load_tokenizer
from runtime.errors import Error, InvalidRequest, LoadError
from runtime.kv_storage import plan_storage, resolve_name
from runtime.loader import load
from runtime.plan import make_plan

BLOCK = 16


def as_config(model: str | EngineConfig) -> EngineConfig:
    return model if isinstance(model, EngineConfig) else EngineConfig(str(model))


def label(config: EngineConfig) -> str:
    """The model and whatever about it is not the default."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    said = [f"{name}={value}" for name, (value, usual) in values.items() if name != "model" and value != usual]
    return " ".join([config.model, *said])


class Scorer:
    """One side of a comparison. Raises :class:`LoadError`."""

    def __init__(self, config: EngineConfig):
        self.label = label(config)
        checkpoint = Checkpoint.open(config.model, config.revision, code=config.trust_remote_code)
        loading = [
            name for name in signature(make_plan).parameters if name != "checkpoint"
        ]  # whatever options there are
        self.plan = make_plan(checkpoint, **{name: getattr(config, name) for name in loading})
        self.tokenizer = load_tokenizer(config, checkpoint)
        self.paged = resolve_name(self.plan, config.kv_cache_dtype) != "auto" or config.attention_backend is not None
        if self.paged:
            try:
                layers = read_layers(self.plan.config, self.plan.trust_remote_code)
                self._specs = attention_only(self.plan.config.model_type, layers).attention
                self._backend = select(self._specs, self.plan.device, config.attention_backend).backend
                self._stored_as = plan_storage(self.plan, layers, config.kv_cache_dtype)
            except AttentionError as error:
                raise LoadError(f"{checkpoint.folder}: {error}") from error
        self.model: Any = load(self.plan, ATTENTION if self.paged else None).model
        self.vocabulary = int(cast(Any, self.model).get_input_embeddings().num_embeddings)
        self._cache: KVCache | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of all linear layers, scales included, by the count of their weights."""
        modules = [module for module in self.plan.modules.values() if module.nbytes]
        weights = sum(module.shape.in_features * module.shape.out_features for module in modules)
        return 8 * sum(module.nbytes for module in modules) / weights

    @property
    def kernels(self) -> list[str]:
        """What multiplies, by name."""
        return sorted({module.kernel for module in self.plan.modules.values()})

    def require_length(self, length: int) -> None:
        """Raise :class:`InvalidRequest` if the model was not made for windows this long."""
        limit = context_length(self.plan.config)
        if limit is not None and length > limit:
            raise InvalidRequest(f"{self.label}: windows of {length} tokens, and the model was made for {limit}.")

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """``[tokens, vocabulary]``, in the model's dtype. Raises :class:`Error` if one is not finite."""
        inputs = torch.tensor([ids], device=self.plan.device)
        logits: Tensor
        logits = self._through_pages(inputs) if self.paged else self.model(input_ids=inputs, use_cache=False).logits[0]
        finite = logits.amax(-1).isfinite() & logits.amin(-1).isfinite()
        if not finite.all():
            place = int(finite.logical_not().nonzero()[0])
            raise Error(
                f"{self.label}: the logits at token {place} of {len(ids)} are NaN or infinite. Whatever is averaged over them "
                "means nothing. In float16 that is often an overflow: try --dtype bfloat16; else look at the per-layer errors."
            )
        return logits

    def _through_pages(self, inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        blocks = -(-length // BLOCK)
        if self._cache is None or self._cache.blocks < blocks:
            stored_as = self._stored_as
            self._cache = KVCache(self._specs, blocks, BLOCK, stored_as.dtype, self.plan.device, stored_as.static)
        batch = AttentionBatch.pack([length], [length], [list(range(blocks))], BLOCK, self.plan.device)
        with forward_batch(batch, self._cache, self._backend, self._specs):
            logits: Tensor = self.model(input_ids=inputs, position_ids=batch.positions()[None], use_cache=False).logits[
                0
            ]
        return logits
