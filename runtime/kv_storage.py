"""What the engine keeps keys and values as: what ``--kv-cache-dtype`` asks for, and the scales that a checkpoint brings.

``auto`` is FP8 where the checkpoint's quantization configuration says that its keys and values were calibrated for it, and
the model's dtype elsewhere, as in vLLM and SGLang. An FP8 cache takes a layer's static scale where one is stored, and scales of
each token and head where none is: those are at least as exact, so that a missing one is no reason for 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from attention.base import AttentionSpec
from attention.hf import Layers
from attention.kv_cache import StaticScales
from attention.kv_dtypes import LARGEST_CODE, cache_dtype
from quant.kv_scales import kv_cache_asked, kv_scale_of, zero_point_of
from runtime.errors import LoadError, some
from runtime.plan import LoadPlan

FP8 = "fp8_e4m3"
WAY_OUT = "The file is damaged; --kv-cache-dtype bf16 does without it."


@dataclass(frozen=True)
class Storage:
    """``static`` scales of every attention call; ``note`` says where scales come from. Prints as people read it."""

    dtype: torch.dtype
    static: list[StaticScales]
    note: str

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") + (f" ({self.note})" if self.note else "")


def resolve_name(plan: LoadPlan, asked: str) -> str:
    """``asked``, or for ``auto`` what the checkpoint was calibrated for, if that is known here."""
    return FP8 if asked == "auto" and kv_cache_asked(plan.checkpoint.quantization) == FP8 else asked


def plan_storage(plan: LoadPlan, layers: Layers, asked: str) -> Storage:
    """How to cache what ``layers`` compute; reads the scales, a number each. Raises :class:`LoadError` for scales that are
    none, :class:`attention.base.AttentionError` for an unknown name."""
    name, wanted = resolve_name(plan, asked), kv_cache_asked(plan.checkpoint.quantization)
    dtype = cache_dtype(name, plan.dtype)
    nothing = [StaticScales()] * len(layers.attention)
    if dtype != torch.float8_e4m3fn or wanted not in (FP8, None):
        own = "scales per token and head" if dtype in LARGEST_CODE else ""
        left_out = f"{len(plan.kv_scales)} scales of the checkpoint are for {wanted or FP8} and left out"
        unknown = f"the checkpoint asks for {wanted}, which is not supported" if wanted not in (FP8, None) else ""
        notes = [own, left_out if plan.kv_scales else "", unknown]
        return Storage(dtype, nothing, "; ".join(filter(None, notes)))
    static, stored = _read(plan, layers)
    count = sum(scale is not None for pair in static for scale in pair)
    source = "as the checkpoint asks, " if asked == "auto" else ""
    left_out = f"; {stored - count} are left out: their layers keep no keys and values" if stored > count else ""
    if not count:
        return Storage(dtype, nothing, f"{source}scales per token and head: {stored or 'none'} are stored{left_out}")
    rest = sum(len(spec.kept) for spec in layers.attention) - count
    others = f", {rest} others per token and head" if rest else ""
    return Storage(dtype, static, f"{source}{count} static scales of the checkpoint{others}{left_out}")


def _read(plan: LoadPlan, layers: Layers) -> tuple[list[StaticScales], int]:
    """The scales that calls use, and how many are stored for them."""
    found: dict[tuple[str, str], str] = {}
    for name in plan.kv_scales:
        if (scale := kv_scale_of(name)) is None:
            continue
        for part in scale.parts:
            if (other := found.setdefault((scale.attention, part), name)) != name:
                raise LoadError(
                    f"{plan.checkpoint.folder}: {name} and {other} scale the same keys or values. {WAY_OUT}"
                )
    strangers = sorted(name for (module, _), name in found.items() if module not in layers.callers)
    if strangers:
        raise LoadError(
            f"{plan.checkpoint.folder}: {len(strangers)} scales of keys and values belong to no attention of this model: "
            f"{some(strangers)}. --kv-cache-dtype bf16 does without them."
        )

    def scale_of(caller: str, part: str, spec: AttentionSpec) -> Tensor | None:
        # A latent is neither a key nor a value, and what is shared has the scale that it was stored with.
        name = None if spec.latent or spec.shares is not None else found.get((caller, part))
        return None if name is None else _checked(plan, name, spec.kv_heads).to(plan.device)

    static = [
        StaticScales(*(scale_of(caller, part, spec) for part in "kv"))
        for caller, spec in zip(layers.callers, layers.attention, strict=True)
    ]
    return static, len(found)


def _checked(plan: LoadPlan, name: str, heads: int) -> Tensor:
    """The scale of each key head, float32 [heads]."""
    scale = _tensor(plan, name).float().flatten()
    if scale.numel() not in (1, heads):
        raise LoadError(
            f"{plan.checkpoint.folder}: {name} holds {scale.numel()} scales, the layer has {heads} key heads: it must be one "
            f"scale, or one of each head. {WAY_OUT}"
        )
    if not bool((scale.isfinite() & (scale > 0)).all()):
        wrong = next(value for value in scale.tolist() if not 0 < value < torch.inf)
        raise LoadError(f"{plan.checkpoint.folder}: {name} is {wrong:g}, no scale of keys or values. {WAY_OUT}")
    zero = zero_point_of(name)
    if zero in plan.kv_scales and bool(_tensor(plan, zero).float().any()):
        raise LoadError(
            f"{plan.checkpoint.folder}: {zero} is not zero, but FP8 keys and values have no zero point. {WAY_OUT}"
        )
    return scale.expand(heads).contiguous()


def _tensor(plan: LoadPlan, name: str) -> Tensor:
    stored = plan.kv_scales[name]
    for path in plan.checkpoint.files:
        with safe_open(path, "pt") as file:
            if stored in file.keys():  # noqa: SIM118 - a file, no mapping
                tensor: Tensor = file.get_tensor(stored)
                return tensor
    raise AssertionError(f"{stored} was among the headers")
