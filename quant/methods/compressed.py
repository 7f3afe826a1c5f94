"""compressed-tensors checkpoints (``quant_method: "compressed-tensors"``), as llm-compressor and auto-round write them.

Each layer's tensors say which format it is stored in; the group that targets it says what they mean:

==================================  ==================================================================================
``weight_packed`` int32             integers of 2 to 8 bits, ``2 ** (bits - 1)`` added, in words along the inputs; zero
                                    points alike along the outputs (since 0.9.4) or plain; ``weight_g_idx`` for act-order
``weight_packed`` uint8             E2M1, low nibble first; ``weight_scale`` e4m3 under ``weight_global_scale``, a divisor
                                    (nvfp4), or bytes that are powers of two (mxfp4)
``weight`` int8, float8_e4m3fn      one number an element; ``weight_scale`` float, or bytes (mxfp8)
``compressed``, ``bitmask``         2:4 sparse: the numbers that are not zero, and where they are
==================================  ==================================================================================

``W = (q - z) * s``. Sources: compressed-tensors 0.20.0 and 0.12.2, ``compressors/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quant import matching
from quant.base import (
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
from quant.compressed_config import CompressedConfig, Group
from quant.compressed_layout import (
    canonical_codes,
    canonical_zeros,
    expected_codes,
    expected_scales,
    sorted_by_group,
)
from quant.float8 import POWER_DTYPES, SCALE_DTYPES, canonical_scale, is_float8, single
from quant.kv_scales import kv_scale_reason
from quant.methods.selection import method_of
from quant.packing import pack_stream, unpack_stream

BESIDE_CODES = (
    "weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx", "weight_shape", "bitmask", "shape",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
"""Every tensor that a layer may have, next to its codes."""


@dataclass(frozen=True)
class CompressedTensors(QuantMethod):
    config: CompressedConfig
    headers: Mapping[str, TensorSpec]

    name: ClassVar[str] = "compressed-tensors"

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        nested = config.get("quantization_config")  # old files keep theirs one level deeper
        config = nested if isinstance(nested, Mapping) and "config_groups" in nested else config
        method = method_of(config).replace("_", "-")
        if method != cls.name and (method or "config_groups" not in config):
            return None
        return cls(CompressedConfig.read(config), headers)

    @property
    def summary(self) -> str:
        if not self.quantizes_layers:
            return f"{self.name}, no weights, at most keys and values"
        kinds = dict.fromkeys(group.weights.kind.value for group in self.config.groups)
        return f"{self.name} {self.config.format}, {' and '.join(kinds)} weights"

    @property
    def quantizes_layers(self) -> bool:
        return bool(self.config.groups)

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        codes = self._codes(layer)
        if codes is None:
            return None
        group = self._group(layer, codes, matching.EMBEDDING_CLASSES if shape.lookup else matching.LINEAR_CLASSES)
        self._check_presence(layer, codes, group)
        kind = group.weights.kind
        return Scheme(
            kind=kind,
            block=group.weights.block_of(shape),
            zero_point=kind.is_integer and self._has(layer, "weight_zero_point"),
            act_order=self._has(layer, "weight_g_idx"),
            global_scale=self._has(layer, "weight_global_scale"),
            activation=None if shape.lookup else group.inputs,
        )

    def sparse(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        if not self._is_sparse(layer):
            return {}
        rows, columns, found = shape.out_features, shape.in_features, self.headers[f"{layer}.compressed"]
        bitmask = TensorSpec((rows, -(-columns // 8)), torch.uint8)
        return {"compressed": TensorSpec((rows, columns // 2), found.dtype), "bitmask": bitmask}

    def dense_reason(self, layer: str) -> str:
        if self._is_sparse(layer):
            return "2:4 sparse (compressed, bitmask), not quantized: decompressed while loading"
        if entry := self.config.ignored(layer):
            return f"named in ignore ({entry!r})"
        if self.config.group_of(layer) is None:
            return "no group of quantization_config targets it"
        return "stored dense: no codes for it"

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        return self.config.unmatched(layers)

    def ignored(self, name: str) -> str | None:
        layer, _, local = name.rpartition(".")
        if local == "shape" and self._is_sparse(layer):
            return "sizes of a 2:4 sparse weight, which are the layer's"
        return kv_scale_reason(name)

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        scheme, codes = self.scheme_for(layer, shape), self._codes(layer)
        assert scheme is not None, layer
        assert codes is not None, layer
        stored = {
            local: self.headers[f"{layer}.{local}"] for local in (codes, *BESIDE_CODES) if self._has(layer, local)
        }
        return stored | expected_codes(codes, stored[codes], scheme, shape) | expected_scales(stored, scheme, shape)

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        for local in ("weight_shape", "shape"):
            sizes = tensors[local].flatten().tolist() if local in tensors else [shape.out_features, shape.in_features]
            if sizes != [shape.out_features, shape.in_features]:
                raise BadCheckpoint(f"{local} is {sizes}, the layer is {shape}. The file is of another model.")
        q, order = canonical_codes(tensors, scheme, shape, self.config.continuous), None
        if scheme.act_order:
            order = sorted_by_group(tensors["weight_g_idx"], scheme.group)
            codes = unpack_stream(q, scheme.kind.bits, shape.in_features)
            q = pack_stream(codes[:, order.long()], scheme.kind.bits)
        zero = canonical_zeros(tensors, scheme, shape, self.config.continuous) if scheme.zero_point else None
        if zero is None and "weight_zero_point" in tensors and bool(tensors["weight_zero_point"].float().any()):
            raise BadCheckpoint(f"weight_zero_point is not zero everywhere, but {scheme.kind.value} weights have none.")
        inputs = _inputs(tensors, scheme)
        return QuantWeight(
            scheme=scheme,
            shape=shape,
            q=q,
            scale=canonical_scale(tensors["weight_scale"], canonical_specs(scheme, shape)["scale"]),
            zero=zero,
            order=order,
            global_scale=1 / single(tensors["weight_global_scale"]).float() if scheme.global_scale else None,
            input_scale=inputs.get("input_scale"),
            input_zero=inputs.get("input_zero"),
        )

    def _has(self, layer: str, local: str) -> bool:
        return f"{layer}.{local}" in self.headers

    def _is_sparse(self, layer: str) -> bool:
        """2:4 sparse and not quantized."""
        found = self.headers.get(f"{layer}.compressed")
        return found is not None and found.dtype in SCALE_DTYPES

    def _codes(self, layer: str) -> str | None:
        """The local name of the tensor that holds the codes; ``None``: the layer is dense."""
        if self._is_sparse(layer):
            return None
        for local in ("weight_packed", "compressed"):
            if self._has(layer, local):
                return local
        weight = self.headers.get(f"{layer}.weight")
        if is_float8(self.headers, f"{layer}.weight") or (weight and weight.dtype == torch.int8):
            return "weight"
        if weight and self._has(layer, "weight_scale"):
            raise UnsupportedCheckpoint(
                f"{layer}: weight_scale is stored beside a dense weight ({weight}): the model was saved before it was "
                "compressed (quantization_status: frozen). Save it with llm-compressor's save_compressed=True."
            )
        return None

    def _group(self, layer: str, codes: str, classes: tuple[str, ...]) -> Group:
        """What the configuration says about a layer that is stored quantized."""
        if entry := self.config.ignored(layer, classes):
            raise BadCheckpoint(
                f"{layer}: {codes} is stored quantized, but ignore lists {entry!r}. "
                "Remove the entry from quantization_config, or the file is not the one that the config describes."
            )
        group = self.config.group_of(layer, classes)
        if group is None:
            raise BadCheckpoint(
                f"{layer}: {codes} is stored quantized, but no target in quantization_config: config_groups means this layer."
            )
        spec, kind = self.headers[f"{layer}.{codes}"], group.weights.kind
        fitting = {torch.int32: kind.is_integer, torch.uint8: kind is WeightKind.E2M1}
        if codes != "weight_packed":
            fitting = {torch.int8: kind.is_integer, torch.float8_e4m3fn: kind is WeightKind.FP8}
        if not fitting.get(spec.dtype, False):
            raise BadCheckpoint(
                f"{layer}.{codes} is {spec}, which cannot hold {kind.value} weights (quantization_config: config_groups: "
                f"{group.name}: weights). The file is not the one that the config describes."
            )
        return group

    def _check_presence(self, layer: str, codes: str, group: Group) -> None:
        """Raise :class:`BadCheckpoint` if a tensor is missing that gives the codes their meaning."""
        needed = ["weight_scale"]
        scale = self.headers.get(f"{layer}.weight_scale")
        if group.weights.kind is WeightKind.E2M1 and scale and scale.dtype not in (*POWER_DTYPES, *SCALE_DTYPES):
            needed.append("weight_global_scale")
        if not group.weights.symmetric:
            needed.append("weight_zero_point")
        if group.weights.ordered:
            needed.append("weight_g_idx")
        if codes == "compressed":
            needed.append("bitmask")
        if group.inputs and group.inputs.needs_scale:
            needed.append("input_scale" if group.inputs.static else "input_global_scale")
        for local in needed:
            if not self._has(layer, local):
                raise BadCheckpoint(
                    f"{layer}: {codes} is stored but {local} is missing, which quantization_config: config_groups: "
                    f"{group.name} asks for. The file is damaged."
                )


def _inputs(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """``input_scale`` and ``input_zero``, if the scheme has them."""
    activation = scheme.activation
    if activation is None or not activation.needs_scale:
        return {}
    inputs = {"input_scale": single(tensors["input_scale" if activation.static else "input_global_scale"])}
    if activation.static and not activation.symmetric:
        stored = tensors.get("input_zero_point")
        inputs["input_zero"] = torch.zeros_like(inputs["input_scale"]) if stored is None else single(stored)
    return inputs
