"""What an engine is told once, at the start. Frozen: nothing writes to it later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch

from runtime.errors import LoadError


@dataclass(frozen=True)
class EngineConfig:
    """``None`` means: decided from the model and the memory that is there, and reported.

    ``quantization`` confirms a checkpoint's format, or names what a dense one is quantized to while it loads, with the options
    in ``quantization_config`` (:class:`quant.onload.options.Options`); ``kernel`` and ``attention_backend`` choose by name and
    fail rather than fall back. ``weight_only`` says whether layers' inputs are left alone where they would be quantized
    (``None``: as the format's own library does on this device). ``lm_head_quantization`` (``int8``) rounds an output head that
    the checkpoint keeps dense; ``activation_quantization`` (``int8``) rounds the inputs of integer layers that the checkpoint
    leaves alone: faster on CPUs with AVX512-VNNI, less exact. ``max_model_len`` is the longest prompt and answer
    together, ``max_total_tokens`` (or ``kv_cache_memory``, bytes or ``"2GiB"``) the size of the KV cache,
    ``mem_fraction_static`` the most it may take of the memory that is free once the weights are loaded (``None``: half),
    ``max_num_batched_tokens`` the tokens of one forward pass and ``max_num_seqs`` the requests that run at once.
    ``kv_cache_dtype`` is ``auto`` (FP8 if the checkpoint asks for it, else the model's), ``bf16``, ``fp16``, ``fp32``,
    ``fp8_e4m3`` or ``int8``. ``max_queued_requests`` may wait for that, at most ``queue_timeout`` seconds, and must
    be done after ``request_timeout`` (``None``: no limit). ``skip_tokenizer_init`` takes and gives token ids only.
    ``disable_cuda_graph`` lets Python make every call of every decoding step, on a CPU too; ``fuse`` false multiplies every
    linear layer by itself, also those that are given the same input and of one kind (queries, keys and values; gate and up).
    ``native`` false leaves everything but quantized layers and attention to torch and Python.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    quantization: str | None = None
    quantization_config: Mapping[str, Any] | None = None
    kernel: str | None = None
    weight_only: bool | None = None
    lm_head_quantization: str | None = None
    activation_quantization: str | None = None
    attention_backend: str | None = None
    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 32
    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    kv_cache_memory: int | str | None = None
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    seed: int = 0
    trust_remote_code: bool = False
    revision: str | None = None
    enable_prefix_caching: bool = True
    max_queued_requests: int | None = None
    queue_timeout: float | None = None
    request_timeout: float | None = None
    startup_check: bool = True
    disable_cuda_graph: bool = False
    fuse: bool = True
    native: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_model_len", "max_num_batched_tokens", "max_num_seqs", "max_total_tokens", "block_size",
            "max_queued_requests",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise LoadError(f"{name} must be a positive integer, not {value!r}.")
        for name in ("queue_timeout", "request_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise LoadError(f"{name} must be a positive number of seconds, not {seconds!r}.")
        fraction = self.mem_fraction_static
        if fraction is not None and not 0 < fraction < 1:
            raise LoadError(f"mem_fraction_static must be between 0 and 1, not {fraction!r}.")
        if fraction is not None and (self.max_total_tokens is not None or self.kv_cache_memory is not None):
            raise LoadError("mem_fraction_static limits a KV cache whose size is not given; leave one of them out.")
        if self.max_total_tokens is not None and self.kv_cache_memory is not None:
            raise LoadError("max_total_tokens and kv_cache_memory both size the KV cache; give one of them.")

    @property
    def loading(self) -> dict[str, Any]:
        """What of it decides how the model is loaded: the arguments of :func:`runtime.plan.make_plan`."""
        return {
            "dtype": self.dtype,
            "device": self.device,
            "quantization": self.quantization,
            "quantization_config": self.quantization_config,
            "kernel": self.kernel,
            "weight_only": self.weight_only,
            "lm_head_quantization": self.lm_head_quantization,
            "activation_quantization": self.activation_quantization,
            "trust_remote_code": self.trust_remote_code,
        }

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """The configuration for keyword options; an unknown one is an error that suggests the nearest."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
                raise TypeError(f"unknown option {name!r}.{hint}")
        return cls(**options)
