"""AWQ checkpoints (``quant_method: "awq"``): groups along the inputs, as AutoAWQ, GPTQModel, llm-awq and auto-round write
them.

``W = (q - z) * s``, codes unsigned, nothing is added to the zeros. The versions differ in arrangement only:
:mod:`quant.methods.awq_layouts`. Shape does not tell ``gemm`` from ``gemv`` where a layer is square; ``version`` does, and
the layers that are not square confirm it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quant.base import (
    BadCheckpoint,
    LinearShape,
    QuantMethod,
    QuantWeight,
    Scheme,
    TensorSpec,
    UnsupportedCheckpoint,
    WeightKind,
)
from quant.matching import gptqmodel_rules
from quant.methods.awq_layouts import LAYOUTS, Layout
from quant.methods.selection import FORMAT, Options, Selection, method_of, read
from quant.methods.settled import settled

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SPELLINGS = {"llm_awq": "llm-awq", "llmawq": "llm-awq", "gemvfast": "gemv_fast", "gemv-fast": "gemv_fast"}


@dataclass(frozen=True)
class AWQ(QuantMethod):
    """``version`` is a key of :data:`quant.methods.awq_layouts.LAYOUTS`."""

    version: str
    selection: Selection
    headers: Mapping[str, TensorSpec]

    name: ClassVar[str] = "awq"

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        if method_of(config) != cls.name:
            return None
        version = version_of(config)
        if version not in LAYOUTS:
            raise UnsupportedCheckpoint(
                f"AWQ version {version!r} (quantization_config: version) is not supported, only {', '.join(LAYOUTS)}. "
                "Convert the checkpoint with the tool that wrote it, or use a gemm copy of the model."
            )
        selection = Selection.of(config, Options(4, 128, False), gptqmodel_rules(config))
        _refuse_widths(selection, version)
        _refuse_scaled_activations(headers)
        return cls(version, selection, headers)

    @property
    def summary(self) -> str:
        return f"awq {self.version}, {self.selection}"

    @property
    def _layout(self) -> Layout:
        return LAYOUTS[self.version]

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        if not self.selection.is_stored(layer, self.headers, "qweight", ("scales", "qzeros", "scaled_zeros")):
            return None
        options = self.selection.options_for(layer)
        assert options.group_size is not None
        group = shape.in_features if options.group_size == -1 else options.group_size
        if shape.in_features % group:
            raise BadCheckpoint(
                f"{layer}: group {group} does not divide {shape.in_features} inputs (quantization_config: group_size). "
                "The file is damaged or from another tool."
            )
        zeros = self._zeros(layer)
        if options.symmetric is False and zeros is None and self._layout.zeros is not None:
            raise BadCheckpoint(
                f"{layer}: {self._layout.zeros} is missing, but quantization_config says zero_point: true."
            )
        scheme = Scheme(WeightKind.integer(options.bits), (1, group), zero_point=zeros is not None)
        if misfit := self._layout.misfit(scheme, shape):
            raise BadCheckpoint(f"{layer}: {misfit}. The file is damaged or from another tool.")
        self._check_version(layer, scheme, shape)
        return scheme

    def dense_reason(self, layer: str) -> str:
        return self.selection.dense_reason(layer)

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        return self.selection.unmatched(layers)

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        scheme = self.scheme_for(layer, shape)
        assert scheme is not None, layer
        stored = self.headers.get(f"{layer}.scales")
        scale = stored.dtype if stored and stored.dtype in SCALE_DTYPES else torch.float16
        specs = self._layout.specs(scheme, shape, scale)
        return {local: spec for local, spec in specs.items() if local != self._layout.zeros or scheme.zero_point}

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        parts = self._layout.read(tensors, scheme, shape)
        return settled(scheme, shape, parts.q, parts.scale, parts.zero, None)

    def _check_version(self, layer: str, scheme: Scheme, shape: LinearShape) -> None:
        """Say which version or width the file has, if it is not the configuration's."""
        stored = self.headers[f"{layer}.qweight"]
        # On a square layer codes of several versions have one shape, and the scales tell.
        locals_ = ("qweight", "scales") if self._is(self._layout, scheme, layer, shape, ["qweight"]) else ("qweight",)
        if len(locals_) == 2 and self._is(self._layout, scheme, layer, shape, locals_):
            return
        for version, layout in LAYOUTS.items():
            for bits in layout.bits:
                other = replace(scheme, kind=WeightKind.integer(bits))
                if layout.misfit(other, shape) is None and self._is(layout, other, layer, shape, locals_):
                    raise BadCheckpoint(
                        f"{layer}.qweight is {stored}: version {version} with {bits} bits for {shape.in_features} inputs and "
                        f"{shape.out_features} outputs, but quantization_config says {self.version} with {scheme.kind.bits}. "
                        "Correct version or bits, or the file is not the one that the config describes."
                    )

    def _is(self, layout: Layout, scheme: Scheme, layer: str, shape: LinearShape, names: Iterable[str]) -> bool:
        """Whether the tensors of these names are stored as a layout has them."""
        stored = {local: self.headers.get(f"{layer}.{local}") for local in names}
        scale = stored.get("scales")
        specs = layout.specs(scheme, shape, scale.dtype if scale else torch.float16)
        return all(stored[local] == specs.get(local) for local in stored)

    def _zeros(self, layer: str) -> str | None:
        """The name of the zero points of a layer, if they are stored: then they count, whatever ``zero_point`` says."""
        name = self._layout.zeros
        return name if name is not None and f"{layer}.{name}" in self.headers else None


def version_of(config: Mapping[str, Any]) -> str:
    """The arrangement: ``version`` and its synonyms; the old field ``backend: llm-awq`` means the version of that name."""
    backend = str(config.get("backend") or "").lower()
    if SPELLINGS.get(backend, backend) == "llm-awq":
        return "llm-awq"
    version = str(read(config, ("version", *FORMAT), "gemm")).lower()
    return SPELLINGS.get(version, version)


def _refuse_widths(selection: Selection, version: str) -> None:
    """Raise for a width that a version cannot hold, in general or by a rule."""
    rules = selection.rules
    settings = [selection.options, *(selection.options.updated(s) for s in rules.settings.values() if s is not None)]
    for options in settings:
        if options.bits not in LAYOUTS[version].bits:
            raise UnsupportedCheckpoint(
                f"AWQ {version} with {options.bits} bits (quantization_config: bits) is not supported, only 4. "
                "Use a gemm copy of the model."
            )


def _refuse_scaled_activations(headers: Mapping[str, TensorSpec]) -> None:
    """AWQ divides the output of some activation functions by a vector stored beside the linears (``ScaledActivation``, for
    falcon, mpt, gptj, gpt_neox, bloom, gpt_bigcode, starcoder2, internlm2); ignoring it gives garbage without an error."""
    for name, spec in headers.items():
        module, _, local = name.rpartition(".")
        if local == "scales" and len(spec.shape) == 1 and f"{module}.qweight" not in headers:
            raise UnsupportedCheckpoint(
                f"{name} is {spec} without qweight beside it: AWQ's ScaledActivation, which divides the output of {module} "
                "by these values. It is not supported. Use a GPTQ or compressed-tensors copy of the model."
            )
