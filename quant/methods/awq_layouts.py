"""The ways in which AWQ versions arrange the same codes, scales and zero points.

=============  =======================  ======================  ==========================================  ==============
version        qweight                  scales                  zeros                                       order of codes
=============  =======================  ======================  ==========================================  ==============
gemm           int32 [in, out / 8]      [groups, out]           ``qzeros`` int32 [groups, out / 8]          eight interleaved
gemm, not 4    int32 [in, out * b / 32]  [groups, out]          ``qzeros`` int32 [groups, out * b / 32]     a stream
gemv           int32 [out, in / 8]      [out, 8 Z]              ``qzeros`` int32 [out, Z]                   a stream
gemv_fast      int16 [out / 4, in]      [8 Z, out]              ``qzeros`` float16 [8 Z, out], minus s z    four rows
llm-awq        int16 [out / 4, in]      [8 Z, out]              ``scaled_zeros``, likewise                  four rows
marlin         int32 [in / 16, 2 out]   [groups, out]           none: 8                                     tiles
=============  =======================  ======================  ==========================================  ==============

``Z`` counts words of eight groups, padded. Sources: AutoAWQ 0.2.9 ``awq/modules/linear``; GPTQModel 7.7.0
``nn_modules/qlinear/torch_awq.py`` for widths other than 4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from quant.base import BadCheckpoint, LinearShape, Scheme, TensorSpec
from quant.packing import (
    MARLIN_TILE,
    as_bytes,
    pack_stream,
    transpose_awq,
    unpack_awq_fast,
    unpack_marlin,
    unpack_stream,
    unpermute_marlin_scales,
)


class Parts(NamedTuple):
    """``q``, ``scale`` and ``zero`` of the canonical layout."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None


class Layout(ABC):
    """One version. ``zeros`` is the local name of its zero points, ``bits`` the widths that exist."""

    zeros: ClassVar[str | None] = "qzeros"
    bits: ClassVar[tuple[int, ...]] = (4,)

    @abstractmethod
    def misfit(self, scheme: Scheme, shape: LinearShape) -> str | None:
        """Why a layer of this shape cannot be stored so, or ``None``."""

    @abstractmethod
    def specs(self, scheme: Scheme, shape: LinearShape, scale: torch.dtype) -> dict[str, TensorSpec]:
        """The stored tensors, the zero points included."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> Parts:
        """The canonical tensors."""


class Gemm(Layout):
    bits = (2, 3, 4, 5, 6, 7, 8)

    def misfit(self, scheme: Scheme, shape: LinearShape) -> str | None:
        if scheme.kind.bits == 4 and shape.out_features % 8:
            return f"{shape.out_features} outputs are not a multiple of 8, the codes in a gemm word"
        return None

    def specs(self, scheme: Scheme, shape: LinearShape, scale: torch.dtype) -> dict[str, TensorSpec]:
        words, groups = -(-shape.out_features * scheme.kind.bits // 32), shape.in_features // scheme.group
        return {
            "qweight": TensorSpec((shape.in_features, words), torch.int32),
            "scales": TensorSpec((groups, shape.out_features), scale),
            "qzeros": TensorSpec((groups, words), torch.int32),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> Parts:
        bits = scheme.kind.bits

        def transposed(words: Tensor) -> Tensor:
            if bits == 4:
                return transpose_awq(words)
            return pack_stream(unpack_stream(as_bytes(words), bits, shape.out_features).t().contiguous(), bits)

        zero = (
            unpack_stream(transposed(tensors["qzeros"]), bits, shape.in_features // scheme.group)
            if "qzeros" in tensors
            else None
        )
        return Parts(transposed(tensors["qweight"]), tensors["scales"].t().contiguous(), zero)


def padded_groups(scheme: Scheme, shape: LinearShape) -> int:
    """Groups rounded up to whole words, and these to the width that the kernels of the time read.

    Source: ``calculate_zeros_width`` of AutoAWQ's ``gemv.py``; it knows no groups but these.
    """
    words = -(-(shape.in_features // scheme.group) // 8)
    several = {64: 2, 32: 4}.get(scheme.group, 1)
    return -(-words // several) * several * 8


def _narrow_group(version: str, scheme: Scheme) -> str | None:
    if scheme.group < 128 and scheme.group not in (32, 64):
        return f"{version} has groups of 32, 64 or at least 128, not {scheme.group} (quantization_config: group_size)"
    return None


class Gemv(Layout):
    def misfit(self, scheme: Scheme, shape: LinearShape) -> str | None:
        if shape.in_features % 8:
            return f"{shape.in_features} inputs are not a multiple of 8, the codes in a gemv word"
        return _narrow_group("gemv", scheme)

    def specs(self, scheme: Scheme, shape: LinearShape, scale: torch.dtype) -> dict[str, TensorSpec]:
        padded = padded_groups(scheme, shape)
        return {
            "qweight": TensorSpec((shape.out_features, shape.in_features // 8), torch.int32),
            "scales": TensorSpec((shape.out_features, padded), scale),
            "qzeros": TensorSpec((shape.out_features, padded // 8), torch.int32),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> Parts:
        groups = shape.in_features // scheme.group
        zero = unpack_stream(as_bytes(tensors["qzeros"]), 4, groups) if "qzeros" in tensors else None
        return Parts(as_bytes(tensors["qweight"]), tensors["scales"][:, :groups].contiguous(), zero)


class GemvFast(Layout):
    def misfit(self, scheme: Scheme, shape: LinearShape) -> str | None:
        if shape.in_features % 64 or shape.out_features % 4:
            return f"its blocks are 4 outputs of 64 inputs, but the layer is {shape}"
        return _narrow_group("gemv_fast", scheme)

    def specs(self, scheme: Scheme, shape: LinearShape, scale: torch.dtype) -> dict[str, TensorSpec]:
        groups = TensorSpec((padded_groups(scheme, shape), shape.out_features), scale)
        qweight = TensorSpec((shape.out_features // 4, shape.in_features), torch.int16)
        assert self.zeros is not None
        return {"qweight": qweight, "scales": groups, self.zeros: groups}

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> Parts:
        groups = shape.in_features // scheme.group
        scale = tensors["scales"][:groups].t().contiguous()
        zero = None
        if self.zeros is not None and self.zeros in tensors:
            zero = whole_zeros(tensors[self.zeros][:groups].t(), scale, self.zeros)
        return Parts(pack_stream(unpack_awq_fast(tensors["qweight"]), 4), scale, zero)


class LlmAwq(GemvFast):
    zeros = "scaled_zeros"


class Marlin(Layout):
    zeros = None

    def misfit(self, scheme: Scheme, shape: LinearShape) -> str | None:
        rows, columns = MARLIN_TILE
        if shape.in_features % rows or shape.out_features % columns:
            return f"marlin stores tiles of {rows} inputs x {columns} outputs, but the layer is {shape}"
        return None

    def specs(self, scheme: Scheme, shape: LinearShape, scale: torch.dtype) -> dict[str, TensorSpec]:
        return {
            "qweight": TensorSpec((shape.in_features // 16, shape.out_features * 2), torch.int32),
            "scales": TensorSpec((shape.in_features // scheme.group, shape.out_features), scale),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> Parts:
        q = pack_stream(unpack_marlin(tensors["qweight"]).t().contiguous(), 4)
        return Parts(q, unpermute_marlin_scales(tensors["scales"]).t().contiguous(), None)


def whole_zeros(scaled: Tensor, scale: Tensor, name: str) -> Tensor:
    """The zero points behind ``-(scale * zero)``. Rounding to float16 moves their quotient by far less than a half."""
    quotient = torch.where(scale == 0, 0.0, -scaled.float() / scale.float())
    zero = quotient.round()
    off = int((((quotient - zero).abs() > 0.125) | (zero < 0) | (zero > 15)).sum())
    if off:
        raise BadCheckpoint(
            f"{name}: {off} of {zero.numel()} values are not minus a scale times a whole number of 0 to 15. "
            "The file is damaged or from another tool."
        )
    return zero.to(torch.uint8)


LAYOUTS: dict[str, Layout] = {
    "gemm": Gemm(),
    "gemv": Gemv(),
    "gemv_fast": GemvFast(),
    "llm-awq": LlmAwq(),
    "marlin": Marlin(),
}
