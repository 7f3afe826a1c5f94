"""Every stored tensor has an owner and every parameter a source, or loading is refused, before any weight is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quant.base import TensorSpec
from runtime.checkpoint import Checkpoint
from runtime.errors import LoadError
from runtime.naming import Headers

DENSE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

IGNORED_TENSORS = {
    r"\.rotary_emb\.inv_freq$": "computed from the configuration",
    r"\.masked_bias$|\.attn\.bias$|\.attention\.bias$": "a causal mask that old checkpoints store",
}
"""Stored tensors that no model needs, with the reason."""


@dataclass(frozen=True)
class Account:
    """``ignored``: stored but not needed -> why. ``unclaimed``: stored, without owner. ``missing``: without source."""

    ignored: Mapping[str, str]
    unclaimed: tuple[str, ...]
    missing: tuple[str, ...]


def balance(
    checkpoint: Checkpoint,
    model: nn.Module,
    headers: Headers,
    quantized: Mapping[str, Collection[str]],
    ignored_by_format: Callable[[str], str | None] = lambda name: None,
) -> Account:
    """Match headers and tree. ``quantized`` maps each quantized layer to the local names of its stored tensors;
    ``ignored_by_format`` says why a tensor that nobody wants may be left out.

    Raises :class:`LoadError` if a dense tensor has another shape than its parameter, or is stored as quantized codes.
    """
    state = model.state_dict()
    replaced = {f"{layer}.weight" for layer in quantized}
    codes = {f"{layer}.{local}" for layer, locals_ in quantized.items() for local in locals_}
    claimed: set[str] = set()
    ignored: dict[str, str] = {}
    unclaimed: list[str] = []
    for name, spec in headers.tensors.items():
        if name in state and name not in replaced:
            _check_dense(name, spec, state[name])
            claimed.add(name)
        elif name in codes:
            claimed.add(name)
        elif reason := ignored_by_format(name) or _ignorable(name, model):
            ignored[name] = reason
        else:
            unclaimed.append(name)
    parts: dict[str, list[str]] = {}
    for stored, targets in headers.converted.items():
        target = targets[0]
        if state.keys() >= set(targets):
            _check_codes(stored, checkpoint.tensors[stored], state[target])
            if len(targets) > 1:
                _check_cut(stored, checkpoint.tensors[stored], {name: state[name] for name in targets})
                claimed |= set(targets)
            else:
                parts.setdefault(target, []).append(stored)
        elif reason := _ignorable(target, model):
            ignored[stored] = reason
        else:
            unclaimed.append(stored)
    for target, sources in parts.items():
        _check_parts(target, {name: checkpoint.tensors[name] for name in sources}, state[target])
        claimed.add(target)
    return Account(ignored, tuple(unclaimed), _missing(model, state.keys() - replaced, claimed - replaced))


def check_stored(name: str, found: TensorSpec | None, expected: TensorSpec) -> None:
    """Raise :class:`LoadError` unless the stored tensor is exactly what the layer needs."""
    if found is None:
        raise LoadError(
            f"{name} is missing; the layer's other tensors are there. The checkpoint is damaged; fetch it again."
        )
    if found != expected:
        raise LoadError(
            f"{name} is {found}, but this layer needs {expected}. The checkpoint is damaged or of another model."
        )


def _check_dense(name: str, found: TensorSpec, parameter: torch.Tensor) -> None:
    if found.shape != tuple(parameter.shape):
        check_stored(name, found, TensorSpec(tuple(parameter.shape), found.dtype))
    _check_codes(name, found, parameter)


def _check_codes(name: str, found: TensorSpec, parameter: torch.Tensor) -> None:
    """Codes copied into a dense parameter would be garbage without an error."""
    if parameter.is_floating_point() and found.dtype not in DENSE_DTYPES:
        raise LoadError(
            f"{name} is stored as {found}: quantized values, but the checkpoint's configuration does not say how to read "
            "them for this module. Its quantization_config is missing, incomplete, or of a kind that is not supported."
        )


def _check_parts(target: str, sources: Mapping[str, TensorSpec], parameter: torch.Tensor) -> None:
    """What is stacked or joined into one parameter must fill it: a missing expert would be left to chance."""
    values = sum(math.prod(spec.shape) for spec in sources.values())
    if len(sources) > 1 and values != parameter.numel():
        common = Counter(spec.shape for spec in sources.values()).most_common(1)[0][0]
        odd = [f"{name} is {spec}" for name, spec in sources.items() if spec.shape != common]
        raise LoadError(
            f"{target} {list(parameter.shape)} is made of {len(sources)} stored tensors with {values} values in all, but needs "
            f"{parameter.numel()}: {odd[0] if odd else 'one is missing'}. The checkpoint is damaged; fetch it again."
        )


def _check_cut(stored: str, found: TensorSpec, parameters: Mapping[str, torch.Tensor]) -> None:
    """What is cut into several parameters must give each its share."""
    values = sum(parameter.numel() for parameter in parameters.values())
    if math.prod(found.shape) != values:
        raise LoadError(
            f"{stored} is {found}, but {', '.join(parameters)} are cut from it and have {values} values. The checkpoint is "
            "damaged or of another model."
        )


def _ignorable(name: str, model: nn.Module) -> str | None:
    for pattern, reason in IGNORED_TENSORS.items():
        if re.search(pattern, name):
            return reason
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return "not used by this model, says Transformers" if any(re.search(p, name) for p in patterns) else None


def _missing(model: nn.Module, needed: Collection[str], claimed: set[str]) -> tuple[str, ...]:
    """Parameters and persistent buffers that no stored tensor fills and no tie provides."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = {name for pair in ties.items() if claimed & set(pair) for name in pair}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    without_source = set(needed) - claimed - tied
    return tuple(sorted(name for name in without_source if not any(re.search(p, name) for p in optional)))
