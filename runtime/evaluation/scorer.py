"""A loaded model, asked for the logits of one window after the other.

The plain Transformers model with quantized linears, unless the configuration names what only the engine has, a KV cache
dtype (or the checkpoint does) or an attention backend: then keys and values go through the engine's pages.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from attention.base import AttentionError
from attention.hf import NAME as ATTENTION
from attention.hf import attention_only, prepare, read_layers
from attention.registry import select
from quant.kernels.native import build
from runtime.checkpoint import Checkpoint
from runtime.config import EngineConfig
from runtime.defaults import context_length, load_tokenizer
from runtime.errors import Error, InvalidRequest, LoadError
from runtime.evaluation.layers import decoder_layers, first_output
from runtime.kv_storage import plan_storage, resolve_name
from runtime.loader import load
from runtime.one_sequence import OneSequence
from runtime.plan import ABSORBED, make_plan


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
        self.plan = make_plan(checkpoint, **config.loading)
        self.tokenizer = load_tokenizer(config, checkpoint)
        self._pages: OneSequence | None = None
        self.attention = "Transformers'"
        """What attends, and over what."""
        if resolve_name(self.plan, config.kv_cache_dtype) != "auto" or config.attention_backend is not None:
            try:
                layers = read_layers(self.plan.config, self.plan.trust_remote_code)
                attention_only(self.plan.config.model_type, layers)
                self.plan = self.plan.dequantizing(layers.absorbed, ABSORBED)
                backend = select(layers.attention, self.plan.device, config.attention_backend, build).backend
                stored_as = plan_storage(self.plan, layers, config.kv_cache_dtype)
            except AttentionError as error:
                raise LoadError(f"{checkpoint.folder}: {error}") from error
            self._pages = OneSequence(layers, backend, self.plan.device, stored_as.dtype, stored_as.static)
            stored = str(stored_as.dtype).removeprefix("torch.")
            self.attention = f"{backend.name} over pages of {stored}"
        self.model: Any = load(self.plan, ATTENTION if self._pages else None).model
        if self._pages:
            prepare(self.model)
        self.vocabulary = int(cast(Any, self.model).get_input_embeddings().num_embeddings)

    @property
    def paged(self) -> bool:
        """Keys and values go through the engine's pages."""
        return self._pages is not None

    @property
    def bits_per_weight(self) -> float:
        """Bits of all linear layers, scales included, by the count of their weights."""
        modules = [module for module in self.plan.modules.values() if module.nbytes]
        weights = sum(module.shape.in_features * module.shape.out_features for module in modules)
        return 8 * sum(module.packed_bytes for module in modules) / weights

    @property
    def kernels(self) -> list[str]:
        """What multiplies, by name."""
        return sorted({module.kernel for module in self.plan.modules.values()})

    def require_length(self, length: int) -> None:
        """Raise :class:`InvalidRequest` if the model was not made for windows this long."""
        limit = context_length(self.plan.config)
        if limit is not None and length > limit:
            raise InvalidRequest(
                f"{self.label}: windows of {length} tokens, and the model was made for {limit}. Give a smaller --window or "
                "another --recipe."
            )

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """``[tokens, vocabulary]``, in the model's dtype. Raises :class:`Error` if one is not finite."""
        logits = self._forward(ids)
        finite = logits.amax(-1).isfinite() & logits.amin(-1).isfinite()
        if not finite.all():
            place = int(finite.logical_not().nonzero()[0])
            raise Error(
                f"{self.label}: the logits at token {place} of {len(ids)} are NaN or infinite. Whatever is averaged over them "
                f"means nothing. {self._origin(ids)} In float16 that is often an overflow: try --dtype bfloat16."
            )
        return logits

    def _forward(self, ids: list[int]) -> Tensor:
        inputs = torch.tensor(ids, device=self.plan.device)
        if self._pages:
            return self._pages.logits(self.model, inputs)
        logits: Tensor = self.model(input_ids=inputs[None], use_cache=False).logits[0]
        return logits

    def _origin(self, ids: list[int]) -> str:
        """Where values stop being finite, found by running the same once more."""
        broken: list[str] = []

        def look(_: nn.Module, __: Any, output: Any, name: str) -> None:
            if not first_output(output).isfinite().all():
                broken.append(name)

        layers = decoder_layers(self.model)
        handles = [layer.register_forward_hook(partial(look, name=name)) for name, layer in layers.items()]
        try:
            self._forward(ids)
        finally:
            for handle in handles:
                handle.remove()
        return f"It begins in {broken[0]}." if broken else "The layers' outputs are finite: it begins behind them."
