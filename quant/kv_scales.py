"""Scales of a quantized KV cache, which checkpoints store beside the weights of linear layers and which are none."""

from __future__ import annotations

import re

KV_SCALES = re.compile(
    r"\.(self_attn|attn|attention|self_attention|mixer)\.(attn\.)?([qkv]_(scale|zero_point)|kv_scale)$"  # CT, AutoFP8
    r"|\.[qkv]_proj\.[qkv]_scale$"  # modelopt
    r"|\.(qkv_proj|[qkv]_proj|query_key_value)\.output_(scale|zero_point)$"  # quark, old compressed-tensors
    r"|\.[qkv]_fake_quantizer\.qscale_act$"  # Mistral
    r"|\.(k|v)_bmm_quantizer\._amax$"
)
REASON = "scale of a quantized KV cache; keys and values are kept in the model's dtype, so it is not needed"


def kv_scale_reason(name: str) -> str | None:
    """Why a stored tensor may be left out, if it is a scale of a quantized KV cache."""
    return REASON if KV_SCALES.search(name) else None
