"""The module that takes the place of a quantized ``nn.Embedding``: the rows asked for are gathered, then dequantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from quant.base import LinearKernel, LinearShape, NoKernel, QuantWeight, Scheme, TensorSpec
from quant.kernels import Choice
from quant.linear import QuantLinear
from quant.reference import dequantize, linear


class Lookup(LinearKernel):
    """Keeps the canonical layout, of which rows can be taken."""

    name: ClassVar[str] = "lookup"
    joins: ClassVar[bool] = False
    summary: ClassVar[str] = "torch, dequantizes the rows asked for"

    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        return f"takes rows, and {scheme} has scales that belong to no row" if scheme.flat else None

    def apply(self, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)


def lookup(scheme: Scheme, shape: LinearShape, device: torch.device) -> Choice:
    """The one way to look rows up, or :class:`NoKernel`."""
    kernel = Lookup()
    if refusal := kernel.refuses(scheme, shape, device):
        raise NoKernel(f"a quantized embedding {refusal}; use a copy of the model with a dense embedding")
    return Choice(kernel, {})


class QuantEmbedding(QuantLinear):
    """``y [.., dim] = W[ids]`` in ``dtype``, with a quantized ``W [num, dim]``; loaded as a linear layer's weight is."""

    def __init__(
        self, name: str, shape: LinearShape, scheme: Scheme, tensors: Mapping[str, TensorSpec], dtype: torch.dtype
    ) -> None:
        super().__init__(name, shape, scheme, Lookup(), tensors, dtype)
        self.num_embeddings, self.embedding_dim = shape.out_features, shape.in_features
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.quant_weight
        assert weight is not None, f"{self.name} was not finished after loading"
        outputs, inputs = weight.scheme.block
        rows = ids.flatten()
        blocks = rows // outputs
        gathered = replace(
            weight,
            scheme=replace(weight.scheme, block=(1, inputs)),
            shape=replace(weight.shape, out_features=len(rows)),
            q=weight.q[rows],
            scale=weight.scale[blocks],
            zero=None if weight.zero is None else weight.zero[blocks],
        )
        return dequantize(gathered).to(self.dtype).view(*ids.shape, -1)
