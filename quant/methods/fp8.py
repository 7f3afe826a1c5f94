"""FP8 checkpoints (``quant_method`` ``fp8``, ``fbgemm_fp8``, ``mxfp8``): e4m3 weights, ``W = w * scale``.

One method name, several families of tensors: DeepSeek-V3, Qwen3-FP8 and Transformers' FineGrainedFP8 store
``weight_scale_inv`` (it multiplies all the same), one a block of ``weight_block_size`` or one in all; AutoFP8 and vLLM
``weight_scale`` and, static, ``input_scale``; Mistral ``qscale_weight`` and ``qscale_act``; fbgemm one scale a row.
GPTQModel's ``weight_scale_inv`` alone is what it is called, a divisor: it says ``weight_scale_semantics: inverse``.
Scales are floats or, ``ue8m0``, powers of two. The last block of a row or column may be short.

Inputs are quantized when the model runs: static by the stored scale; dynamic per token, blocks of weights also per
block of inputs, absmax on 448. A dynamic scale for a whole tensor is taken per token (as vLLM's CUTLASS kernels do).
That serves FP8 units: Transformers dequantizes on a CPU and leaves inputs alone, vLLM does so on GPUs without such
units, and so does this on a CPU unless told otherwise. Sources: Transformers 5.23 ``integrations/finegrained_fp8.py``
and ``fbgemm_fp8.py``, vLLM 0.33 ``model_executor/layers/quantization/fp8.py``, DeepSeek-V3 ``inference/kernel.py``,
GPTQModel 7.7.0 ``nn_modules/qlinear/fp8.py`` (``quantize_fp8_weight``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
from quant.float8 import POWER_DTYPES, SCALE_DTYPES, canonical_scale, is_float8, single
from quant.kv_scales import kv_scale_reason
from quant.matching import Rules
from quant.methods.selection import method_of
from quant.methods.skip_list import SkipList
from quant.scheme import ScaleRule

NAMES = ("fp8", "fbgemm_fp8", "mxfp8")
WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
INPUT_SCALES = ("activation_scale", "input_scale", "qscale_act")
SKIP_LISTS = ("modules_to_not_convert", "ignored_layers")
FBGEMM_CLAMP = 1200.0


@dataclass(frozen=True)
class FP8(QuantMethod):
    """``block`` ``None`` is one scale a weight or a row, whichever is stored; ``inputs`` is the dynamic quantization of
    inputs, ``None`` if they have static scales; ``divides``: stored scales of weights are divisors; ``rules`` are GPTQModel's,
    blocks of single layers."""

    stored_as: str
    block: tuple[int, int] | None
    divides: bool
    inputs: Activation | None
    skipped: SkipList
    headers: Mapping[str, TensorSpec]
    rules: Rules = matching.NO_RULES

    name: ClassVar[str] = "fp8"
    executes_inputs_on: ClassVar[frozenset[str]] = frozenset({"cuda"})

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        method = method_of(config)
        if method not in NAMES:
            return None
        if (fmt := str(config.get("fmt") or config.get("format") or "e4m3").lower()) not in ("e4m3", "float8_e4m3fn"):
            raise UnsupportedCheckpoint(
                f"FP8 format {fmt!r} (quantization_config: fmt) is not supported, only 'e4m3'. Use a copy in E4M3."
            )
        block = _block(config.get("weight_block_size", [1, 32] if method == "mxfp8" else None))
        activation = str(config.get("activation_scheme") or "dynamic").lower()
        if activation not in ("dynamic", "static"):
            raise UnsupportedCheckpoint(
                f"activation_scheme {activation!r} (quantization_config) is not supported, only 'dynamic' and 'static'."
            )
        if block and activation == "static":
            raise UnsupportedCheckpoint(
                f"activation_scheme 'static' together with weight_block_size {list(block)} (quantization_config) is not "
                "defined: blocks of weights go with dynamic scales per block of inputs. The configuration is wrong."
            )
        if (semantics := str(config.get("weight_scale_semantics") or "").lower()) not in ("", "inverse"):
            raise UnsupportedCheckpoint(
                f"weight_scale_semantics {semantics!r} (quantization_config) is not known, only 'inverse': whether scales "
                "multiply or divide is not said. Use a copy written by another tool."
            )
        skipped = SkipList.of(config, SKIP_LISTS, matching.components)
        inputs = _dynamic(method, block, config) if activation == "dynamic" else None
        rules = matching.gptqmodel_rules(config)
        for entry, settings in rules.settings.items():
            _check_rule(f"{rules.field} {entry!r}", settings or {})
        return cls(method, block, bool(semantics), inputs, skipped, headers, rules)

    @property
    def summary(self) -> str:
        size = f"blocks of {self.block[0]}x{self.block[1]}" if self.block else "one scale a weight or a row"
        return f"{self.stored_as} e4m3, {size}, inputs {self.inputs or 'static'}"

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        scales = self._stored(layer, WEIGHT_SCALES)
        if not is_float8(self.headers, f"{layer}.weight"):
            if scales and f"{layer}.weight" in self.headers:
                raise BadCheckpoint(
                    f"{layer}: {scales[0]} is stored beside a weight that is "
                    f"{self.headers[f'{layer}.weight']}, not FP8. The file is damaged or merged by hand."
                )
            return None
        if len(scales) != 1:
            known = ", ".join(WEIGHT_SCALES)
            what = f"several scales ({', '.join(scales)})" if scales else f"no scale ({known})"
            raise BadCheckpoint(
                f"{layer}: an FP8 weight is stored with {what}, it needs exactly one. The file is damaged."
            )
        self.skipped.require_absent(layer)
        if found := self._rule_against(layer):
            raise BadCheckpoint(f"{layer}: a quantized weight is stored, but {found}. Remove the entry, or the weight.")
        return Scheme(WeightKind.FP8, self._block_of(layer, scales[0], shape), activation=self._activation(layer))

    def dense_reason(self, layer: str) -> str:
        return self.skipped.naming(layer) or self._rule_against(layer) or "stored dense: its weight is not FP8"

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        known = list(layers)
        missed = matching.unmatched(self.rules.settings, known, self.rules.dialect)
        return self.skipped.unmatched(known) + [f"{self.rules.field}: {entry}" for entry in missed]

    def ignored(self, name: str) -> str | None:
        if name.endswith(".input_scale_ub"):
            return "the clamp of fbgemm's inputs, which quantization_config has as activation_scale_ub"
        return kv_scale_reason(name)

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        scheme = self.scheme_for(layer, shape)
        assert scheme is not None, layer
        specs = {"weight": TensorSpec((shape.out_features, shape.in_features), torch.float8_e4m3fn)}
        for local in (*self._stored(layer, WEIGHT_SCALES), *self._stored(layer, INPUT_SCALES)):
            specs[local] = self.headers[f"{layer}.{local}"]  # its shape and dtype were checked with the scheme
        return specs

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        scale = next(tensors[local] for local in WEIGHT_SCALES if local in tensors)
        scale = 1 / scale.float() if self.divides else scale
        static = next((tensors[local] for local in INPUT_SCALES if local in tensors), None)
        return QuantWeight(
            scheme=scheme,
            shape=shape,
            q=tensors["weight"],
            scale=canonical_scale(scale, canonical_specs(scheme, shape)["scale"]),
            input_scale=single(static) if static is not None and scheme.activation else None,
        )

    def _rule_against(self, layer: str) -> str | None:
        entry = self.rules.find(layer)
        left_dense = entry is not None and self.rules.settings[entry] is None
        return f"{self.rules.field} leaves it dense by {entry!r}" if left_dense else None

    def _block_for(self, layer: str) -> tuple[int, int] | None:
        """What the configuration says of one layer."""
        entry = self.rules.find(layer)
        settings = (self.rules.settings[entry] if entry is not None else None) or {}
        if settings.get("weight_scale_method", "block") != "block":
            return None
        return _block(settings["weight_block_size"]) if "weight_block_size" in settings else self.block

    def _stored(self, layer: str, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if f"{layer}.{name}" in self.headers]

    def _block_of(self, layer: str, local: str, shape: LinearShape) -> tuple[int, int]:
        """What shares a scale, by the shape of the stored scales."""
        spec, rows, columns = self.headers[f"{layer}.{local}"], shape.out_features, shape.in_features
        if spec.dtype not in (*SCALE_DTYPES, *POWER_DTYPES):
            raise BadCheckpoint(f"{layer}.{local} is {spec}, which is no dtype of scales. The file is damaged.")
        if block := self._block_for(layer):
            expected = (-(-rows // block[0]), -(-columns // block[1]))
            if spec.shape != expected:
                raise BadCheckpoint(
                    f"{layer}.{local} is {spec}, but {shape} in blocks of {list(block)} (quantization_config: "
                    f"weight_block_size) has {list(expected)} scales. The file is damaged or the entry is wrong."
                )
            return block
        if spec.shape in ((), (1,), (1, 1)):
            return rows, columns
        if spec.shape in ((rows,), (rows, 1)):
            return 1, columns
        raise BadCheckpoint(
            f"{layer}.{local} is {spec}: neither one scale nor one for each of {rows} rows, and quantization_config has "
            "no weight_block_size that would explain it."
        )

    def _activation(self, layer: str) -> Activation | None:
        stored = self._stored(layer, INPUT_SCALES)
        if self.inputs is not None:
            if stored:
                raise BadCheckpoint(
                    f"{layer}: {stored[0]} is stored, but quantization_config says activation_scheme: dynamic. "
                    "Set it to static if the scales were calibrated."
                )
            block = self._block_for(layer)
            return self.inputs if block == self.block else replace(self.inputs, group=block[1] if block else None)
        if len(stored) != 1 or self.headers[f"{layer}.{stored[0]}"].shape not in ((), (1,)):
            found = ", ".join(f"{local} {self.headers[f'{layer}.{local}']}" for local in stored) or "none"
            raise BadCheckpoint(
                f"{layer}: quantization_config says activation_scheme: static, which needs one scale of the inputs "
                f"({', '.join(INPUT_SCALES)}); stored is {found}."
            )
        return Activation(WeightKind.FP8, static=True)


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise BadCheckpoint(f"quantization_config: weight_block_size must be two positive integers, not {value!r}")
    return int(value[0]), int(value[1])


def _check_rule(where: str, settings: Mapping[str, Any]) -> None:
    """Raise for a setting of single layers that would change what their tensors mean and is not read."""
    for field, known in (("weight_scale_semantics", ("inverse",)), ("weight_scale_method", ("row", "tensor", "block"))):
        if (value := str(settings.get(field, known[0])).lower()) not in known:
            raise UnsupportedCheckpoint(
                f"{field} {value!r} (quantization_config: {where}) is not known, only {', '.join(known)}. Use a copy "
                "written by another tool."
            )
    _block(settings.get("weight_block_size"))


def _dynamic(method: str, block: tuple[int, int] | None, config: Mapping[str, Any]) -> Activation:
    if method == "fbgemm_fp8":
        return Activation(WeightKind.FP8, clamp=float(config.get("activation_scale_ub") or FBGEMM_CLAMP))
    if method == "mxfp8":
        return Activation(WeightKind.FP8, group=block[1] if block else None, rule=ScaleRule.POWER)
    powers = str(config.get("scale_fmt", "")).lower() == "ue8m0"
    rule = ScaleRule.POWER_UP if powers else ScaleRule.FLOAT
    return Activation(WeightKind.FP8, group=block[1] if block else None, rule=rule)
