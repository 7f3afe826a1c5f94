"""What every way to quantize while loading has in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quant.base import LinearShape, QuantMethod, QuantWeight, Scheme, TensorSpec

WEIGHTS_AT_ONCE = 1 << 21
"""Weights that are worked on together: bounds the float32 copies beside a layer."""


@dataclass(frozen=True)
class OnLoad(QuantMethod):
    """A method whose stored tensor is the dense weight, so that reading a layer is quantizing it.

    ``dense`` maps the layers that are left alone to the reason. ``dtype`` is that of the weights: the model's, as in
    Transformers and vLLM, whatever the file stores.
    """

    dense: Mapping[str, str]
    dtype: torch.dtype

    opaque: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        return None  # what is dense names no format

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32

    @abstractmethod
    def scheme(self, shape: LinearShape) -> Scheme:
        """What a layer of this shape becomes."""

    @abstractmethod
    def quantize(self, weight: Tensor, scheme: Scheme, shape: LinearShape) -> QuantWeight:
        """The canonical weight for a dense ``[out, in]`` one, which is not modified. Pure."""

    def remark(self, shape: LinearShape) -> str | None:
        """What people should know about a layer of this shape."""
        return None

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        return None if shape.lookup or layer in self.dense else self.scheme(shape)

    def dense_reason(self, layer: str) -> str:
        return self.dense[layer]

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec((shape.out_features, shape.in_features), self.dtype)}

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        return self.quantize(tensors["weight"], scheme, shape)
