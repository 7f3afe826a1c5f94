"""``quant_method: "toy"``: ``levels uint8 [out, in]``, one number from 0 to 15 a weight, and ``step float32 [out]``.

``W = (levels - 8) * step``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quant.base import LinearShape, QuantMethod, QuantWeight, Scheme, TensorSpec, WeightKind
from quant.packing import pack_stream


@dataclass(frozen=True)
class Toy(QuantMethod):
    headers: Mapping[str, TensorSpec]

    name: ClassVar[str] = "toy"

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        return cls(headers) if config.get("quant_method") == cls.name else None

    @property
    def summary(self) -> str:
        return "toy, 4 bits, one step a row"

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        return Scheme(WeightKind.INT4, (1, shape.in_features)) if f"{layer}.levels" in self.headers else None

    def dense_reason(self, layer: str) -> str:
        return "stored dense: it has no levels"

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        return {
            "levels": TensorSpec((shape.out_features, shape.in_features), torch.uint8),
            "step": TensorSpec((shape.out_features,), torch.float32),
        }

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        return QuantWeight(scheme, shape, pack_stream(tensors["levels"], 4), tensors["step"][:, None].contiguous())
