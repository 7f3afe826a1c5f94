"""Who wrote a GPTQ checkpoint, and which configurations need more than its tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from quant.base import UnsupportedCheckpoint
from quant.methods.gptq_zeros import AUTO_ROUND, GPTQMODEL

logger = logging.getLogger(__name__)

FORMATS = ("gptq", "gptq_v2", "gptq_p", "marlin")
REQUANTIZE = "Use a copy of the model in format gptq, or quantize the original again."
REFUSED_FORMATS = {
    "bitblas": "weights are permuted for one kernel library and one GPU",
    "qqq": "4-bit weights are meant for 8-bit activations, with scales of their own",
    "exl3": "weights are trellis codes of ExLlamaV3",
    "vptq": "weights are vector-quantized",
    "paroquant": "inputs are rotated at run time",
    "gguf": "GGUF is not supported, by design",
}


def producer_of(config: Mapping[str, Any]) -> str:
    """The library that wrote the file: ``meta.quantizer`` (``["gptqmodel:7.7.0"]``), ``provider`` or, of old
    files of auto-round, ``autoround_version``; empty if unknown."""
    meta = config.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = [quantizer] if isinstance(quantizer, str) else quantizer if isinstance(quantizer, list) else []
    producers = [str(name).partition(":")[0].lower() for name in names]
    if GPTQMODEL in producers:
        return GPTQMODEL
    named = str(config.get("provider") or next(iter(producers), "")).lower().replace("_", "-")
    return named or (AUTO_ROUND if config.get("autoround_version") else "")


def refuse(config: Mapping[str, Any], layout: str) -> None:
    """Raise for everything that would need more than the tensors read here."""
    if layout not in FORMATS:
        why = REFUSED_FORMATS.get(layout, f"known formats are {', '.join(FORMATS)}")
        raise UnsupportedCheckpoint(
            f"GPTQ format {layout!r} (quantization_config: checkpoint_format) is not supported: {why}. {REQUANTIZE}"
        )
    for field, why in (
        ("adapter", "the weights need an adapter (EoRA) added at run time"),
        ("rotation", "inputs are rotated by a Hadamard matrix at run time"),
    ):
        if config.get(field):
            raise UnsupportedCheckpoint(
                f"quantization_config: {field} is {config[field]!r}: {why}, which is not supported. "
                f"Use a copy of the model without {field}."
            )
    if config.get("activation"):
        logger.warning(
            "quantization_config: activation %r quantizes inputs at run time; here only the weights are quantized, "
            "which is more exact.",
            config["activation"],
        )
