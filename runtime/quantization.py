"""What is quantized, and by which method: the checkpoint's own, or one to quantize a dense one with as it loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from quant import onload, registry
from quant.base import LinearShape, QuantMethod, TensorSpec, UnsupportedCheckpoint
from runtime.checkpoint import Checkpoint


def resolve_method(
    checkpoint: Checkpoint,
    headers: Mapping[str, TensorSpec],
    model: nn.Module,
    dtype: torch.dtype,
    asked: str | None,
    options: Mapping[str, Any] | None,
) -> QuantMethod | None:
    """The method for a checkpoint of ``model`` (on the meta device); ``None``: it is dense and stays so. ``asked`` is a name,
    ``options`` belong to quantizing while loading. Raises :class:`quant.base.QuantError`."""
    if checkpoint.quantization is None:
        keep = {} if (options or {}).get("quantize_lm_head") else dense_by_default(model)
        return onload.create(asked, options, keep, dtype)
    method = registry.resolve(checkpoint.quantization, headers, None if asked in onload.NAMES else asked)
    if options or (asked in onload.NAMES and asked not in registry.known_methods()):
        what = f"--quantization {asked}" if asked else ", ".join(options or ())
        raise UnsupportedCheckpoint(
            f"{what} is for quantizing a dense checkpoint while it loads, but this one is quantized already: {method.name}. "
            "Leave it out, or take the original model."
        )
    registry.confirm(method.name, asked)
    return method


def dense_by_default(model: Any) -> dict[str, str]:
    """The output head, which bitsandbytes and vLLM leave alone as well: its errors reach every logit."""
    head = model.get_output_embeddings()
    reason = "the output head stays dense while loading; quantize_lm_head includes it"
    return {name: reason for name, module in model.named_modules() if module is head}


def linear_shape(module: nn.Module) -> LinearShape | None:
    """The sizes of a linear layer, GPT-2's ``Conv1D`` included, or of an embedding; ``None`` for everything else and for
    subclasses, whose forward does something of its own."""
    if type(module) is nn.Linear:
        return LinearShape(module.in_features, module.out_features, module.bias is not None)
    if stored_transposed(module):
        inputs, outputs = module.get_parameter("weight").shape
        return LinearShape(inputs, outputs, True)
    if type(module) is nn.Embedding:
        return LinearShape(module.embedding_dim, module.num_embeddings, lookup=True)
    return None


def matrix_shape(module: nn.Module) -> LinearShape | None:
    """The sizes of ``weight [out, in]`` of a module that multiplies by it in a way of its own: the router of a mixture, say."""
    weight = None if isinstance(module, nn.Embedding) else module._parameters.get("weight")
    return LinearShape(weight.shape[1], weight.shape[0]) if weight is not None and weight.ndim == 2 else None


def stored_transposed(module: nn.Module) -> bool:
    """``Conv1D``: a linear layer whose dense weight is ``[in, out]``. Quantized ones are stored like any other."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def refuse_shared(head: str, source: str) -> NoReturn:
    """A dense head cannot share a weight that is not there."""
    raise UnsupportedCheckpoint(
        f"{head} shares the weight of {source} (tie_word_embeddings), which is stored quantized: multiplying by an embedding's "
        "codes is not supported. Use a copy whose head is stored by itself, or whose embedding is dense."
    )
