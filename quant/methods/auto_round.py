"""auto-round checkpoints (``quant_method: "auto-round"``, before ``"intel/auto-round"``): tensors of GPTQ, AWQ or
compressed-tensors under another configuration.

``packing_format`` says which: ``auto_round:auto_gptq`` is GPTQ's first version without ``g_idx``, ``auto_round:gptqmodel``
and the bare ``auto_round`` of old files are the second, ``auto_round:auto_awq`` is AWQ ``gemm``,
``auto_round:llm_compressor`` is compressed-tensors, for integers, MXFP4, MXFP8 and NVFP4. ``extra_config`` holds settings of
single modules. Source: auto-round 0.16.1 ``inference/backend.py``, ``inference/convert_model.py``,
``export/export_to_autoround/export.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from quant.base import LinearShape, QuantMethod, QuantWeight, Scheme, TensorSpec, UnsupportedCheckpoint
from quant.matching import REGEX_CHARACTERS, Rules, auto_round_rules
from quant.methods.awq import AWQ
from quant.methods.compressed import CompressedTensors
from quant.methods.gptq import GPTQ
from quant.methods.gptq_zeros import AUTO_ROUND
from quant.methods.selection import Selection, method_of

NAMES = ("auto-round", "intel/auto-round")
ELSEWHERE = {
    "fp8": "its weights are FP8; export it again in format llm_compressor or fp8",
    "gguf": "GGUF is not supported, by design; export it again as auto_round:auto_gptq or auto_round:auto_awq",
    "mlx": "its tensors are MLX's, for Apple's GPUs",
    "fake": "its weights are dense and only rounded; remove quantization_config to load them",
}
VERSIONS = {"gptq": "packing_format: auto_round:auto_gptq", "gptq_v2": "packing_format: auto_round:gptqmodel"}
"""Of GPTQ."""
RUNTIMES = ("", "exllamav2", "triton", "tritonv2", "torch", "marlin", "exllama")
"""What old files append to ``auto_round``: how to multiply, the tensors are the same."""
FLOATS = ("mx_fp", "nv_fp")
"""Data types of weights that are stored as compressed-tensors stores them."""
AGAIN = "Export the model again as auto_round:auto_gptq or auto_round:auto_awq with 16-bit activations."


@dataclass(frozen=True)
class AutoRound(QuantMethod):
    """``inner`` reads the tensors."""

    packing: str
    inner: GPTQ | AWQ | CompressedTensors

    name: ClassVar[str] = AUTO_ROUND

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        if method_of(config).replace("_", "-") not in NAMES:
            return None
        rules = auto_round_rules(config)
        packing, inner = _packing(config)
        floats = inner["quant_method"] == CompressedTensors.name
        for entry, settings in {"": config, **rules.settings}.items():
            if settings is not None:
                _refuse(settings, f"extra_config {entry!r}: " if entry else "", FLOATS if floats else ())
        if floats:
            compressed = CompressedTensors.from_checkpoint(_as_compressed(config, rules), headers)
            assert compressed is not None
            return cls(packing, compressed)
        reader = GPTQ if inner["quant_method"] == GPTQ.name else AWQ
        common = {"provider": AUTO_ROUND, "dynamic": None, "pack_dtype": "int32", "desc_act": False}
        method = reader.from_checkpoint({**config, **inner, **common}, headers)
        assert method is not None
        method = replace(method, selection=Selection.of(config, method.selection.options, rules))
        return cls(packing, replace(method, versions=VERSIONS) if isinstance(method, GPTQ) else method)

    @property
    def summary(self) -> str:
        return f"auto-round ({self.packing}): {self.inner.summary}"

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        return self.inner.scheme_for(layer, shape)

    def dense_reason(self, layer: str) -> str:
        return self.inner.dense_reason(layer)

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        return self.inner.unmatched(layers)

    def ignored(self, name: str) -> str | None:
        return self.inner.ignored(name)

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        return self.inner.tensors(layer, shape)

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        return self.inner.repack(tensors, scheme, shape)


def _packing(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The packing format, and what it means in the terms of GPTQ or AWQ. Old files say it in ``backend``."""
    field = "packing_format" if config.get("packing_format") else "backend"
    stored = str(config.get(field) or "auto_round:auto_gptq").lower().replace("autoround", "auto_round")
    stored = "auto_round:auto_gptq" if stored == "auto" else stored
    kind = stored.removeprefix("auto_round").removeprefix(":")
    if reason := next((why for name, why in ELSEWHERE.items() if name in kind), None):
        raise UnsupportedCheckpoint(f"auto-round {field} {stored!r} (quantization_config) is not supported: {reason}.")
    if "llm_compressor" in kind:
        return stored, {"quant_method": CompressedTensors.name}
    if "awq" in kind:
        return stored, {"quant_method": AWQ.name, "version": "gemm", "backend": None}
    if "gptqmodel" in kind:
        return stored, {"quant_method": GPTQ.name, "checkpoint_format": "gptq_v2"}
    if "gptq" in kind:
        return stored, {"quant_method": GPTQ.name, "checkpoint_format": "gptq"}
    if kind in RUNTIMES:
        return stored, {"quant_method": GPTQ.name, "checkpoint_format": "gptq_v2"}
    raise UnsupportedCheckpoint(
        f"auto-round {field} {stored!r} (quantization_config) is not known; known: auto_round:auto_gptq, "
        f"auto_round:gptqmodel, auto_round:auto_awq, auto_round:llm_compressor, auto_round. {AGAIN}"
    )


def _as_compressed(config: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """The configuration in the terms of compressed-tensors: a group for all layers, one for each rule, which is closer."""
    groups = {"group_0": {"targets": ["Linear"], "weights": _weights(config)}}
    ignore = []
    for place, (entry, settings) in enumerate(rules.settings.items(), start=1):
        # auto-round searches for an expression, compressed-tensors wants it to match from the start
        target = entry if REGEX_CHARACTERS.isdisjoint(entry) else f"re:.*(?:{entry})"
        if settings is None:
            ignore.append(target)
        else:
            groups[f"group_{place}"] = {"targets": [target], "weights": _weights({**config, **settings})}
    return {
        "quant_method": CompressedTensors.name,
        "format": "mixed-precision",
        "config_groups": groups,
        "ignore": ignore,
    }


def _weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``weights`` of a group. A group size of -1 is one scale a row, 0 one in all."""
    kind, size = _data_type(settings), settings.get("group_size", 128)
    weights = {"num_bits": settings.get("bits", 4), "symmetric": bool(settings.get("sym", True))}
    if kind != "int":
        return weights | {
            "type": "float",
            "strategy": "tensor_group" if kind == "nv_fp" else "group",
            "group_size": size,
        }
    if size in (-1, 0):
        return weights | {"type": "int", "strategy": "tensor" if size == 0 else "channel"}
    return weights | {"type": "int", "strategy": "group", "group_size": size}


def _data_type(settings: Mapping[str, Any]) -> str:
    """``int``, ``mx_fp``, ``nv_fp``, or what else is written; how scales were found (``mx_fp_rceil``) does not matter."""
    written = str(settings.get("data_type") or "int").lower()
    return next((kind for kind in ("int", *FLOATS) if written.startswith(kind)), written)


def _refuse(settings: Mapping[str, Any], where: str, floats: tuple[str, ...]) -> None:
    """Raise for activations that must be quantized and for weights that are neither integers nor one of ``floats``."""
    bits = settings.get("act_bits")
    if isinstance(bits, int) and bits < 16:
        raise UnsupportedCheckpoint(
            f"auto-round: {where}act_bits {bits} (quantization_config) quantizes activations, which is not supported. {AGAIN}"
        )
    if _data_type(settings) not in ("int", *floats):
        raise UnsupportedCheckpoint(
            f"auto-round: {where}data_type {settings['data_type']!r} (quantization_config) is not supported here, only "
            f"{' and '.join(('int', *floats))}. {AGAIN}"
        )
    if rotation := settings.get("rotation_config"):
        raise UnsupportedCheckpoint(
            f"auto-round: {where}rotation_config {rotation!r} (quantization_config) rotates inputs at run time, which is not "
            f"supported. {AGAIN}"
        )
