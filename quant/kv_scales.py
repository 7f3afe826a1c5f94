"""Scales of a quantized KV cache, which checkpoints store beside the weights of linear layers and which are none.

A cached key is ``fp8(k / k_scale)``, a value likewise; a scale is one number of a layer, or one of each key head. Who writes
what: compressed-tensors ``self_attn.k_scale`` (``q_scale`` and zero points too), old AutoFP8 one ``kv_scale`` for both,
modelopt ``k_proj.k_scale``, Quark and old compressed-tensors ``k_proj.output_scale``, Mistral
``k_fake_quantizer.qscale_act``. Source: vLLM 0.33 ``model_executor/model_loader/weight_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

KV_SCALES = re.compile(
    r"\.(self_attn|attn|attention|self_attention|mixer)\.(attn\.)?([qkv]_(scale|zero_point)|kv_scale)$"  # CT, AutoFP8
    r"|\.[qkv]_proj\.[qkv]_scale$"  # modelopt
    r"|\.(qkv_proj|[qkv]_proj|query_key_value)\.output_(scale|zero_point)$"  # quark, old compressed-tensors
    r"|\.[qkv]_fake_quantizer\.qscale_act$"  # Mistral
    r"|\.(k|v)_bmm_quantizer\._amax$"
)
READ = re.compile(
    r"^(?P<attention>.+?)\.(?:"
    r"(?:(?<=_attn\.)attn\.)?(?P<own>k|v|kv)_scale"
    r"|(?P<projection>[kv])_proj\.(?:(?P=projection)_scale|output_scale)"
    r"|(?P<fake>[kv])_fake_quantizer\.qscale_act)$"
)
REASON = "scale of a quantized KV cache, no weight: the engine uses it for an FP8 cache"


class KVScale(NamedTuple):
    """``attention`` is the module whose ``parts`` (``k``, ``v`` or ``kv``: both) are scaled."""

    attention: str
    parts: str


def kv_scale_reason(name: str) -> str | None:
    """Why a stored tensor may be left out of the model, if it is a scale of a quantized KV cache."""
    return REASON if KV_SCALES.search(name) else None


def kv_scale_of(name: str) -> KVScale | None:
    """What a stored tensor scales; ``None``: no keys or values, or it is a zero point or a calibration's other finding."""
    found = READ.match(name) if KV_SCALES.search(name) else None
    return KVScale(found["attention"], found["own"] or found["projection"] or found["fake"]) if found else None


def zero_point_of(name: str) -> str:
    """The name of the zero point that goes with a scale."""
    return re.sub(r"scale$", "zero_point", name)


def kv_cache_asked(config: Mapping[str, Any] | None) -> str | None:
    """What a quantization configuration wants keys and values stored as: ``fp8_e4m3``, another word for what is not known
    here, ``None`` if it says nothing. compressed-tensors and modelopt write ``kv_cache_scheme``, modelopt's side file
    ``kv_cache_quant_algo``, AutoFP8 ``kv_cache_scheme: static``."""
    entries = dict(config or {})
    for nested in ("quantization", "quantization_config"):
        if isinstance(entries.get(nested), Mapping):
            entries |= entries[nested]
    scheme = entries.get("kv_cache_scheme") or entries.get("kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        kind, bits = str(scheme.get("type", "int")).lower(), scheme.get("num_bits", 8)
        return "fp8_e4m3" if (kind, bits) == ("float", 8) else f"{kind}{bits}"
    if not scheme or str(scheme).lower() == "none":
        return None
    return "fp8_e4m3" if str(scheme).lower() in ("fp8", "fp8_e4m3", "static") else str(scheme).lower()
