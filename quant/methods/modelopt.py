"""Checkpoints of NVIDIA's modelopt (``quant_method: "modelopt"``, or only a side file ``hf_quant_config.json``).

========================================  ============================================================================
``FP8``                                   ``weight`` e4m3, ``weight_scale`` and ``input_scale`` one number each
``FP8_PER_CHANNEL_PER_TOKEN``             ``weight_scale [out]``; inputs per token
``FP8_PB_WO``, ``FP8_BLOCK_SCALES``       ``weight_scale [out / 128, 1, in / 128, 1]``; inputs left alone
``NVFP4``, ``W4A16_NVFP4``                ``weight`` bytes of two E2M1, low nibble first; ``weight_scale`` e4m3, one a 16
                                          inputs, times ``weight_scale_2``; inputs alike under ``input_scale``, if stored
``MIXED_PRECISION``                       ``quantized_layers``: one of these for each layer
null                                      weights as they are; ``kv_cache_quant_algo`` is for keys and values alone
========================================  ============================================================================

Which one a layer is stored in is told by its tensors and checked against the configuration. Algorithms with a
``pre_quant_scale`` (AWQ) and all others are refused by name. NVFP4 cannot be written on a CPU: it is compared with
compressed-tensors', whose numbers are the same under reciprocal global scales. Source: nvidia-modelopt 0.47.0
(``torch/export/unified_export_hf.py``, ``quant_utils.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quant import matching
from quant.base import (
    Activation,
    BadCheckpoint,
    LinearShape,
    QuantMethod,
    QuantWeight,
    Scheme,
    TensorSpec,
    UnsupportedCheckpoint,
    WeightKind,
    canonical_specs,
)
from quant.float8 import SCALE_DTYPES, canonical_scale, is_float8, single
from quant.kv_scales import kv_cache_asked, kv_scale_reason
from quant.methods.selection import method_of
from quant.methods.skip_list import SkipList
from quant.scheme import ScaleRule

TENSOR, CHANNEL, BLOCKS, MIXED = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MIXED_PRECISION"
NVFP4 = "NVFP4"
NONE = "none"
ALGORITHMS = {
    **{name: name for name in (TENSOR, CHANNEL, BLOCKS, NVFP4, MIXED)},
    "FP8_BLOCK_SCALES": BLOCKS,
    "W4A16_NVFP4": NVFP4,
}
BLOCK, NVFP4_GROUP = 128, 16
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
SKIP_LISTS = ("ignore", "exclude_modules")


@dataclass(frozen=True)
class ModelOpt(QuantMethod):
    """``layers``: the algorithm of single layers, if the configuration lists them."""

    algorithm: str
    layers: Mapping[str, str]
    skipped: SkipList
    headers: Mapping[str, TensorSpec]

    name: ClassVar[str] = "modelopt"

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        method = method_of(config)
        nested = config.get("quantization")  # as the side file has it
        entries = nested if isinstance(nested, Mapping) else config
        if not (method.startswith(cls.name) or (not method and "quant_algo" in entries)):
            return None
        layers = {
            str(layer): _algorithm(entry.get("quant_algo"), f"quantized_layers: {layer}: quant_algo")
            for layer, entry in (entries.get("quantized_layers") or {}).items()
        }
        skipped = SkipList.of(entries, SKIP_LISTS, matching.modelopt)
        cache_alone = not entries.get("quant_algo") and not layers and kv_cache_asked(config)
        algorithm = NONE if cache_alone else _algorithm(entries.get("quant_algo"), "quant_algo")
        return cls(algorithm, layers, skipped, headers)

    @property
    def summary(self) -> str:
        return f"modelopt {self.algorithm}" if self.quantizes_layers else "modelopt, keys and values alone"

    @property
    def quantizes_layers(self) -> bool:
        return self.algorithm != NONE

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        if is_float8(self.headers, f"{layer}.weight"):
            found, scheme = self._fp8(layer, shape)
        elif self._is_nvfp4(layer):
            local = Activation(WeightKind.E2M1, group=NVFP4_GROUP, rule=ScaleRule.LOCAL)
            inputs = local if self._has_input_scale(layer) else None
            found, scheme = NVFP4, Scheme(WeightKind.E2M1, (1, NVFP4_GROUP), global_scale=True, activation=inputs)
        else:
            self._refuse_other(layer)
            return None
        self.skipped.require_absent(layer)
        if (expected := self.layers.get(layer, self.algorithm)) not in (found, MIXED):
            raise BadCheckpoint(f"{layer} is stored as {found}, but the configuration says quant_algo: {expected}.")
        return scheme

    def _fp8(self, layer: str, shape: LinearShape) -> tuple[str, Scheme]:
        """Algorithm and scheme of a layer with FP8 weights, by the shape of its scales."""
        scale = self.headers.get(f"{layer}.weight_scale")
        if scale is None or scale.dtype not in SCALE_DTYPES:
            raise BadCheckpoint(f"{layer}: an FP8 weight needs weight_scale in float, stored is {scale or 'none'}.")
        rows, columns = shape.out_features, shape.in_features
        down, across = -(-rows // BLOCK), -(-columns // BLOCK)
        if scale.shape in ((), (1,)):
            inputs = Activation(WeightKind.FP8, static=True) if self._has_input_scale(layer) else None
            return TENSOR, Scheme(WeightKind.FP8, (rows, columns), activation=inputs)
        if scale.shape in ((rows,), (rows, 1)):
            return CHANNEL, Scheme(WeightKind.FP8, (1, columns), activation=Activation(WeightKind.FP8))
        if scale.shape in ((down, 1, across, 1), (down, across)):
            return BLOCKS, Scheme(WeightKind.FP8, (BLOCK, BLOCK))
        raise BadCheckpoint(
            f"{layer}.weight_scale is {scale}: for {shape} it must hold one scale, {rows} (a row each) or "
            f"{[down, 1, across, 1]} (blocks of {BLOCK}x{BLOCK}). The file is damaged or of another model."
        )

    def dense_reason(self, layer: str) -> str:
        if not self.quantizes_layers:
            return "quant_algo is null"
        return self.skipped.naming(layer) or "stored dense: its weight is neither FP8 nor NVFP4"

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        known = list(layers)
        return self.skipped.unmatched(known) + [
            f"quantized_layers: {name}" for name in self.layers if name not in known
        ]

    def ignored(self, name: str) -> str | None:
        return kv_scale_reason(name)

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        rows, columns = shape.out_features, shape.in_features
        specs = {"weight": TensorSpec((rows, columns), torch.float8_e4m3fn)}
        stored = {local: self.headers.get(f"{layer}.{local}") for local in SCALES}
        specs |= {local: spec for local, spec in stored.items() if spec}
        if self._is_nvfp4(layer):
            specs["weight"] = TensorSpec((rows, columns // 2), torch.uint8)
            specs["weight_scale"] = TensorSpec((rows, -(-columns // NVFP4_GROUP)), torch.float8_e4m3fn)
        return specs

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        inputs = None
        if scheme.activation is not None and scheme.activation.needs_scale:
            stored = single(tensors["input_scale"])
            inputs = stored if scheme.activation.static else 1 / stored.float()
        return QuantWeight(
            scheme=scheme,
            shape=shape,
            q=tensors["weight"],
            scale=canonical_scale(tensors["weight_scale"], canonical_specs(scheme, shape)["scale"]),
            global_scale=single(tensors["weight_scale_2"]).float() if scheme.global_scale else None,
            input_scale=inputs,
        )

    def _is_nvfp4(self, layer: str) -> bool:
        weight, factor = (self.headers.get(f"{layer}.{local}") for local in ("weight", "weight_scale_2"))
        if not weight or weight.dtype != torch.uint8 or f"{layer}.pre_quant_scale" in self.headers:
            return False
        return factor is not None and factor.shape in ((), (1,))

    def _has_input_scale(self, layer: str) -> bool:
        """Calibrated, for the inputs of one layer; without one the weights were quantized alone."""
        spec = self.headers.get(f"{layer}.input_scale")
        if spec and spec.shape not in ((), (1,)):
            raise BadCheckpoint(f"{layer}.input_scale is {spec}, it must be one number. The file is damaged.")
        if spec is None and self.algorithm in (TENSOR, NVFP4) and self._calibrated:
            raise BadCheckpoint(
                f"{layer}: input_scale is missing, and other layers have one, which quant_algo: {self.algorithm} asks for. "
                "The file is damaged."
            )
        return spec is not None

    @cached_property
    def _calibrated(self) -> bool:
        return any(name.endswith(".input_scale") for name in self.headers)

    def _refuse_other(self, layer: str) -> None:
        """Raise :class:`UnsupportedCheckpoint` for a layer in one of modelopt's other layouts."""
        weight = self.headers.get(f"{layer}.weight")
        if weight and weight.dtype in (torch.uint8, torch.int8):
            awq = f"{layer}.pre_quant_scale" in self.headers
            raise UnsupportedCheckpoint(
                f"{layer}.weight is {weight}, modelopt's {'AWQ (pre_quant_scale)' if awq else '4-bit or int8'} layout, "
                f"which is not supported; known: {', '.join(ALGORITHMS)}. Use an AWQ, GPTQ or FP8 copy of the model."
            )


def _algorithm(value: Any, where: str) -> str:
    name = str(value or "").upper()
    if name not in ALGORITHMS:
        raise UnsupportedCheckpoint(
            f"modelopt algorithm {str(value)!r} (quantization_config: {where}) is not supported; known: "
            f"{', '.join(ALGORITHMS)}. Use an FP8 copy of the model, or a 4-bit one in AWQ, GPTQ or compressed-tensors."
        )
    return ALGORITHMS[name]
