"""GPTQ checkpoints (``quant_method: "gptq"``): 2 to 8 bits, groups along the inputs, as auto-gptq, GPTQModel, optimum and
auto-round write them.

``qweight [in * bits / w, out]``, words of ``w`` bits (``pack_dtype``) whose codes run along the inputs; ``qzeros
[groups, out * bits / w]``, along the outputs; ``scales [groups, out]``; ``g_idx int32 [in]``, the group of every input.
``W[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])``.

Codes are one continuous stream, least significant bit first, except in planes: 5, 6 and 7 bits by GPTQModel, and every
width of format ``gptq_p``. Format ``marlin`` (auto-gptq's ``is_marlin_format``) stores ``B`` and ``s`` in tiles instead, 4 bit,
symmetric. Zero points: :mod:`quant.methods.gptq_zeros`. Sources: auto-gptq 0.7.1 ``nn_modules/qlinear``, GPTQModel 7.7.0
``nn_modules/qlinear/__init__.py`` and ``utils/planar_packing.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
from quant.methods.gptq_config import REQUANTIZE, producer_of, refuse
from quant.methods.gptq_zeros import AUTO_ROUND, GPTQMODEL, carries, next_code, with_carry
from quant.methods.selection import FORMAT, Options, Selection, method_of, read
from quant.methods.settled import settled
from quant.packing import (
    MARLIN_TILE,
    as_bytes,
    pack_stream,
    unpack_marlin,
    unpack_planar,
    unpack_stream,
    unpermute_marlin_scales,
)

logger = logging.getLogger(__name__)

WORDS = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
INDICES = (torch.int32, torch.int64)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VERSIONS = {"gptq": "checkpoint_format: gptq", "gptq_v2": "checkpoint_format: gptq_v2"}
PLANAR_BLOCK = 32
"""Codes of inputs, and zero points of outputs, that are packed together."""


@dataclass(frozen=True)
class GPTQ(QuantMethod):
    """``producer`` is the library that wrote the file, where it says so; ``word`` is ``None`` where ``pack_dtype`` is not
    given: the tensors tell. ``versions``: how a configuration says either version."""

    format: str
    selection: Selection
    producer: str
    word: torch.dtype | None
    headers: Mapping[str, TensorSpec]
    versions: Mapping[str, str] = field(default_factory=lambda: VERSIONS)

    name: ClassVar[str] = "gptq"

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        stored = method_of(config)
        if stored not in (cls.name, "marlin"):
            return None
        marlin = stored == "marlin" or config.get("is_marlin_format")
        layout = "marlin" if marlin else str(read(config, FORMAT, "gptq")).lower()
        refuse(config, layout)
        word = config.get("pack_dtype")
        if word is not None and word not in WORDS:
            raise UnsupportedCheckpoint(
                f"pack_dtype {word!r} (quantization_config) is not supported, only {', '.join(WORDS)}. {REQUANTIZE}"
            )
        defaults = Options(4, None, True if layout == "marlin" else None)
        selection = Selection.of(config, defaults, gptqmodel_rules(config))
        if layout == "marlin" and (selection.options.bits != 4 or selection.options.symmetric is False):
            raise UnsupportedCheckpoint(
                f"GPTQ format 'marlin' with {selection.options} (quantization_config) is not supported, only 4 bits, "
                f"symmetric. {REQUANTIZE}"
            )
        producer = producer_of(config)
        if layout == "gptq" and selection.options.symmetric is False and producer not in (GPTQMODEL, AUTO_ROUND):
            logger.warning(
                "an asymmetric checkpoint in format gptq (the first version) that names no writer: auto-gptq damages zero "
                "points of 0, and those beside them, when it writes such a file. If results are poor, use a gptq_v2 copy."
            )
        return cls(layout, selection, producer, None if word is None else WORDS[word], headers)

    @property
    def summary(self) -> str:
        return f"gptq ({self.format}), {self.selection}"

    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        marlin = self.format == "marlin"
        codes, beside = ("B", ("s",)) if marlin else ("qweight", ("scales", "qzeros", "g_idx"))
        if not self.selection.is_stored(layer, self.headers, codes, beside):
            return None
        options = self.selection.options_for(layer)
        group = self._group(layer, shape, options)
        if marlin:
            return self._marlin_scheme(layer, shape, options, group)
        self._check_bits(layer, shape, options)
        zeros = f"{layer}.qzeros" in self.headers
        if options.symmetric is False and not zeros:
            raise BadCheckpoint(f"{layer}: qzeros is missing, but quantization_config says sym: false.")
        if options.act_order and group < shape.in_features and f"{layer}.g_idx" not in self.headers:
            raise BadCheckpoint(
                f"{layer}: g_idx is missing, but quantization_config says desc_act: true: which inputs share a group is not "
                "said. The file is damaged; if its inputs are in order, set desc_act: false."
            )
        # Where the configuration is silent, the plan expects the harder case and repack settles it.
        ordered = f"{layer}.g_idx" in self.headers and group < shape.in_features and options.act_order is not False
        asymmetric = zeros and options.symmetric is not True
        return Scheme(WeightKind.integer(options.bits), (1, group), zero_point=asymmetric, act_order=ordered)

    def dense_reason(self, layer: str) -> str:
        return self.selection.dense_reason(layer)

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        return self.selection.unmatched(layers)

    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        scheme = self.scheme_for(layer, shape)
        assert scheme is not None, layer
        bits, groups = scheme.kind.bits, -(-shape.in_features // scheme.group)
        if self.format == "marlin":
            rows, columns = shape.in_features // MARLIN_TILE[0], shape.out_features * 2
            scales = self._scales(f"{layer}.s", groups, shape)
            return {"B": TensorSpec((rows, columns), torch.int32), "s": scales}
        word = self._word(layer)

        def words(count: int) -> int:
            return -(-count * bits // (8 * word.itemsize))

        specs = {
            "qweight": TensorSpec((words(shape.in_features), shape.out_features), word),
            "scales": self._scales(f"{layer}.scales", groups, shape),
        }
        if f"{layer}.qzeros" in self.headers:
            specs["qzeros"] = TensorSpec((groups, words(shape.out_features)), word)
        if f"{layer}.g_idx" in self.headers:
            stored = self.headers[f"{layer}.g_idx"].dtype
            specs["g_idx"] = TensorSpec((shape.in_features,), stored if stored in INDICES else torch.int32)
        return specs

    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        bits = scheme.kind.bits
        if self.format == "marlin":
            q = pack_stream(unpack_marlin(tensors["B"]).t().contiguous(), bits)
            return QuantWeight(scheme, shape, q, unpermute_marlin_scales(tensors["s"]).t().contiguous())
        order = _order(tensors["g_idx"], scheme, shape) if "g_idx" in tensors else None
        stream = as_bytes(tensors["qweight"].t())
        if self._planar(bits):
            codes = unpack_planar(stream, bits, shape.in_features)
            q = pack_stream(codes if order is None else codes[:, order], bits)
        elif order is not None:
            q = pack_stream(unpack_stream(stream, bits, shape.in_features)[:, order], bits)
        else:  # the same stream, but for the padding of its last word
            q = stream[:, : -(-shape.in_features * bits // 8)].contiguous()
        zero = self._zeros(tensors["qzeros"], scheme, shape) if "qzeros" in tensors else None
        return settled(scheme, shape, q, tensors["scales"].t().contiguous(), zero, order)

    def _zeros(self, words: Tensor, scheme: Scheme, shape: LinearShape) -> Tensor:
        """``uint8 [out, groups]``, as they are meant."""
        bits = scheme.kind.bits
        first_version = self.format == "gptq"
        carry = first_version and carries(bits, self.producer)
        stream = as_bytes(with_carry(words, bits) if carry else words)
        unpack = unpack_planar if self._planar(bits) else unpack_stream
        zero = unpack(stream, bits, shape.out_features)
        if first_version and not carry:
            zero = next_code(zero, bits, self.producer, scheme.act_order)
        self._refuse_other_version(zero, bits, first_version)
        return zero.t().contiguous()

    def _refuse_other_version(self, zero: Tensor, bits: int, first_version: bool) -> None:
        """Zero points that are all one off the middle are those of symmetric weights, read as the other version."""
        middle = 2 ** (bits - 1)
        read, stored, other = (middle + 1, middle, "gptq_v2") if first_version else (middle - 1, middle - 1, "gptq")
        if self.selection.options.symmetric is not False and bool((zero == read).all()):
            raise BadCheckpoint(
                f"qzeros holds {stored} for every zero point, which is {middle} in format {other} but {read} in {self.format}, "
                f"and the weights are symmetric. Set {self.versions[other]} in quantization_config."
            )

    def _planar(self, bits: int) -> bool:
        return (bits in (5, 6, 7) and self.producer != AUTO_ROUND) or (bits == 3 and self.format == "gptq_p")

    def _group(self, layer: str, shape: LinearShape, options: Options) -> int:
        """The group of a layer; where ``group_size`` is not given, tools disagree on its default and the scales tell."""
        if options.group_size is not None:
            return shape.in_features if options.group_size == -1 else min(options.group_size, shape.in_features)
        name = f"{layer}.{'s' if self.format == 'marlin' else 'scales'}"
        stored = self.headers.get(name)
        groups = stored.shape[0] if stored and stored.shape else 0
        if not groups or shape.in_features % groups:
            raise BadCheckpoint(
                f"{name} is {stored or 'missing'}, which tells no group of {shape.in_features} inputs, and "
                "quantization_config has no group_size. Add the one that the file was written with."
            )
        return shape.in_features // groups

    def _word(self, layer: str) -> torch.dtype:
        stored = self.headers[f"{layer}.qweight"].dtype
        if self.word is not None:
            return self.word
        return stored if stored in WORDS.values() else torch.int32

    def _scales(self, name: str, groups: int, shape: LinearShape) -> TensorSpec:
        stored = self.headers.get(name)
        dtype = stored.dtype if stored and stored.dtype in SCALE_DTYPES else torch.float16
        return TensorSpec((groups, shape.out_features), dtype)

    def _check_bits(self, layer: str, shape: LinearShape, options: Options) -> None:
        """Say which width the file has, if it is not the configuration's."""
        word, stored = self._word(layer), self.headers[f"{layer}.qweight"]
        rows = stored.shape[0] if stored.shape else 0
        needed = -(-shape.in_features * options.bits // (8 * word.itemsize))
        if rows != needed and stored.dtype == word and rows * 8 * word.itemsize % shape.in_features == 0:
            found = rows * 8 * word.itemsize // shape.in_features
            raise BadCheckpoint(
                f"{layer}.qweight is {stored}: {found} bits for {shape.in_features} inputs, but quantization_config says "
                f"{options.bits}. Correct bits, or the dynamic rule that names this module."
            )
        ragged = shape.in_features % PLANAR_BLOCK or shape.out_features % PLANAR_BLOCK
        if self._planar(options.bits) and (ragged or word != torch.int32):
            raise BadCheckpoint(
                f"{layer}: planar {options.bits}-bit codes come in blocks of {PLANAR_BLOCK} in int32 words, but the layer is "
                f"{shape} in {str(word).removeprefix('torch.')}. The file is damaged or from another tool."
            )

    def _marlin_scheme(self, layer: str, shape: LinearShape, options: Options, group: int) -> Scheme:
        rows, columns = MARLIN_TILE
        if shape.in_features % rows or shape.out_features % columns or shape.in_features % group:
            raise BadCheckpoint(
                f"{layer}: marlin stores tiles of {rows} inputs x {columns} outputs and whole groups, but the layer is "
                f"{shape} with group {group}. The file is damaged or from another tool."
            )
        return Scheme(WeightKind.INT4, (1, group))


def _order(g_idx: Tensor, scheme: Scheme, shape: LinearShape) -> Tensor | None:
    """Inputs sorted by group, or ``None`` if they are in order already."""
    natural = torch.arange(shape.in_features, device=g_idx.device, dtype=g_idx.dtype) // scheme.group
    if torch.equal(g_idx, natural):
        return None
    groups = -(-shape.in_features // scheme.group)
    outside = int(((g_idx < 0) | (g_idx >= groups)).sum())
    if outside:
        raise BadCheckpoint(
            f"g_idx: {outside} of {shape.in_features} groups are outside 0 to {groups - 1}. The file is damaged."
        )
    if not scheme.act_order:
        raise BadCheckpoint(
            "g_idx is a permutation, but quantization_config says desc_act: false. "
            "If the file is act-order, set desc_act: true."
        )
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], natural):
        largest = int(torch.bincount(g_idx.long()).max())
        raise BadCheckpoint(
            f"g_idx: groups have different sizes, up to {largest} inputs where group_size is {scheme.group}, "
            "which is not supported. Quantize the model again."
        )
    return order.to(torch.int32)
