"""AWQ checkpoints (``quant_method: "awq"``): 4-bit groups along the inputs, as AutoAWQ writes them.

Version ``gemm``, the only one read so far: ``qweight int32 [in, out / 8]``, eight codes of neighbouring outputs a word in
the order of :data:`quant.packing.AWQ_NIBBLE_OF_COLUMN`; ``scales [in / group, out]``; ``qzeros int32 [in / group, out / 8]``
packed alike. ``W = (q - z) * s``, codes unsigned, nothing is added to the zeros. Source: AutoAWQ 0.2.9,
``awq/modules/linear/gemm.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from quant.packing import pack_stream, unpack_awq

CODES_PER_WORD = 8
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class AWQ(QuantMethod):
    """``group_size`` -1 is one group a row."""

    group_size: int
    zero_point: bool
    skipped: tuple[str, ...]
    headers: Mapping[str, TensorSpec]

    name: ClassVar[str] = "awq"

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        if str(config.get("quant_method", "")).lower() != cls.name:
            return None
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise UnsupportedCheckpoint(
                f"AWQ version {version!r} (quantization_config: version) is not supported, only 'gemm'. "
                "Convert the checkpoint with the tool that wrote it, or use a gemm copy of the model."
            )
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise UnsupportedCheckpoint(
                f"AWQ gemm with {bits!r} bits (quantization_config: bits) is not supported, only 4."
            )
        group_size = config.get("group_size", config.get("q_group_size", 128))
        if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
            raise BadCheckpoint(f"quantization_config: group_size must be a positive integer or -1, not {group_size!r}")
        skipped = tuple(config.get("modules_to_not_convert") or ())
        return cls(group_size, bool(config.get("zero_point", True)), skipped, headers)

    @property
    def summary(self) -> str:
        symmetry = "asymmetric" if self.zero_point else "symmetric"
        return f"awq gemm, 4 bits, group {self.group_size}, {symmetry}"

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        if f"{layer}.qweight" not in self.headers:
            for orphan in ("scales", "qzeros"):
                if f"{layer}.{orphan}" in self.headers:
                    raise BadCheckpoint(f"{layer}: {orphan} is there but qweight is missing. The file is damaged.")
            return None
        if f"{layer}.weight" in self.headers:
            raise BadCheckpoint(
                f"{layer}: both qweight and a dense weight are stored. The file is damaged or merged by hand."
            )
        if entry := self._skip_entry(layer):
            raise BadCheckpoint(
                f"{layer}: qweight is stored, but modules_to_not_convert lists {entry!r}. "
                "Remove the entry from quantization_config, or the file is not the one that the config describes."
            )
        group = shape.in_features if self.group_size == -1 else self.group_size
        if shape.in_features % group:
            raise BadCheckpoint(
                f"{layer}: group {group} does not divide {shape.in_features} inputs (quantization_config: group_size). "
                "The file is damaged or from another tool."
            )
        if shape.out_features % CODES_PER_WORD:
            raise BadCheckpoint(
                f"{layer}: {shape.out_features} outputs are not a multiple of 8, the codes in a gemm word."
            )
        zeros = f"{layer}.qzeros" in self.headers
        if self.zero_point and not zeros:
            raise BadCheckpoint(f"{layer}: qzeros is missing, but quantization_config says zero_point: true.")
        return Scheme(WeightKind.INT4, (1, group), zero_point=zeros)

    def dense_reason(self, layer: str) -> str:
        if entry := self._skip_entry(layer):
            return f"named in modules_to_not_convert ({entry!r})"
        return "stored dense: the file has no qweight for it"

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        scheme = self.scheme_for(layer, shape)
        assert scheme is not None, layer
        groups, words = shape.in_features // scheme.group, shape.out_features // CODES_PER_WORD
        stored = self.headers.get(f"{layer}.scales")
        scale_dtype = stored.dtype if stored and stored.dtype in SCALE_DTYPES else torch.float16
        specs = {
            "qweight": TensorSpec((shape.in_features, words), torch.int32),
            "scales": TensorSpec((groups, shape.out_features), scale_dtype),
        }
        if scheme.zero_point:
            specs["qzeros"] = TensorSpec((groups, words), torch.int32)
        return specs

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        def transposed_codes(name: str) -> Tensor:
            return unpack_awq(tensors[name]).t().contiguous()

        return QuantWeight(
            scheme=scheme,
            shape=shape,
            q=pack_stream(transposed_codes("qweight"), 4),
            scale=tensors["scales"].t().contiguous(),
            zero=transposed_codes("qzeros") if scheme.zero_point else None,
        )

    def _skip_entry(self, layer: str) -> str | None:
        """The entry of ``modules_to_not_convert`` that surely names this layer: equal to it or to whole path components
        of it. AutoAWQ matches any substring; a looser match is no contradiction because the tensors decide."""
        path = f".{layer}."
        return next((entry for entry in self.skipped if f".{entry.strip('.')}." in path), None)
