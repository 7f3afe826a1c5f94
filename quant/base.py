"""What a quantized weight is: the types that formats and kernels share, and the one canonical layout.

A *method* (``quant/methods``) turns the tensors of a checkpoint into a :class:`QuantWeight`; a *kernel*
(``quant/kernels``) multiplies by it. They meet here and nowhere else.

The canonical layout of a weight ``W [out, in]``
------------------------------------------------
``q``
    Integer kinds: ``uint8 [out, ceil(in * bits / 8)]``, every row a continuous bit stream of unsigned codes, code ``i``
    in bits ``i * bits ... (i + 1) * bits - 1``, least significant bit first. For 4 bits: two codes a byte, the even
    column in the low nibble. NF4, FP4 and E2M1: the same with 4-bit codes. FP8: ``float8_e4m3fn [out, in]``.
``scale``
    ``[ceil(out / block_out), ceil(in / block_in)]``, one per block of outputs x inputs, the last ones may be short; or,
    if the scheme is ``flat``, ``[ceil(out * in / block_in)]`` over the weights in row order. float32, float16,
    bfloat16, float8_e4m3fn or float8_e8m0fnu (powers of two) as the checkpoint stores it; one that is derived is
    float32.
``zero``
    ``uint8``, the shape of ``scale``: the code that means zero. ``None``: ``2 ** (bits - 1)`` everywhere. Integers
    only.
``order``
    ``int32 [in]``: column ``i`` of ``q`` multiplies input ``order[i]`` (act-order checkpoints, sorted by group).
    ``None``: the natural order.
``table``
    ``float32 [16]``: what the codes of NF4 and FP4 mean. E2M1 needs none: :data:`quant.packing.E2M1_VALUES`.
``global_scale``
    ``float32 [1]``: one more factor of every scale.
``input_scale``, ``input_zero``
    ``[1]``, in the dtype they are stored in, for quantized inputs (:mod:`quant.activation`): the static scale and the
    signed code that means zero, or the global scale that local ones are stored under, a divisor.

Integers: ``W[o, order[i]] = (q[o, i] - zero[o / block_out, i / block_in]) * scale[o / block_out, i / block_in]``; other kinds:
``W[o, i] = value(q[o, i]) * scale[o / block_out, i / block_in] * global_scale``. Computed in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from quant.scheme import Activation, Scheme, WeightKind

__all__ = [
    "Activation",
    "BadCheckpoint",
    "LinearKernel",
    "LinearShape",
    "NoKernel",
    "QuantError",
    "QuantMethod",
    "QuantWeight",
    "Scheme",
    "TensorSpec",
    "UnsupportedCheckpoint",
    "WeightKind",
    "blank",
    "canonical_specs",
]


class QuantError(Exception):
    """Base of every error of this package. It knows modules and tensors; the runtime adds the path."""


class UnsupportedCheckpoint(QuantError):
    """The checkpoint names a format, version or option that no method here implements."""


class BadCheckpoint(QuantError):
    """The tensors and the configuration contradict each other, or the values cannot be right."""


class NoKernel(QuantError):
    """No kernel, or not the kernel asked for by name, can multiply by this weight on this device."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class LinearShape:
    """The sizes of one linear layer, ``y [.., out] = x [.., in] @ W.T + bias``; or, with ``lookup``, of an embedding that
    turns ids below ``out_features`` into rows of ``W``."""

    in_features: int
    out_features: int
    bias: bool = False
    lookup: bool = False

    def __str__(self) -> str:
        return f"{self.in_features}→{self.out_features}"


@dataclass(frozen=True)
class QuantWeight:
    """A quantized weight. ``layout`` names how the tensors are arranged: ``"canonical"`` (this module's docstring) or a
    kernel's own name once :meth:`LinearKernel.prepare` has rearranged it."""

    scheme: Scheme
    shape: LinearShape
    q: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None
    table: Tensor | None = None
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    layout: str = "canonical"

    def __post_init__(self) -> None:
        if self.layout != "canonical":
            return
        expected = canonical_specs(self.scheme, self.shape)
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise BadCheckpoint(
                    f"{name} is {list(tensor.shape)}, a {self.scheme} {self.shape} weight has {list(shape)}"
                )
        activation = self.scheme.activation
        for name, present in (
            ("zero", self.scheme.zero_point),
            ("order", self.scheme.act_order),
            ("table", self.scheme.kind.has_table),
            ("global_scale", self.scheme.global_scale),
            ("input_scale", activation is not None and activation.needs_scale),
            ("input_zero", activation is not None and activation.static and not activation.symmetric),
        ):
            if (getattr(self, name) is not None) != present:
                raise BadCheckpoint(f"{name} is {'missing' if present else 'given'} for a {self.scheme} weight")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        return self.q.device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same weight with every tensor replaced, e.g. moved to another device."""
        moved: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **moved)


def canonical_specs(scheme: Scheme, shape: LinearShape) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of the canonical layout, of those too that this scheme does without."""
    outputs, inputs = scheme.block
    blocks: tuple[int, ...] = (-(-shape.out_features // outputs), -(-shape.in_features // inputs))
    if scheme.flat:
        blocks = (-(-shape.out_features * shape.in_features // inputs),)
    row = -(-shape.in_features * scheme.kind.bits // 8)
    single = dict.fromkeys(("global_scale", "input_scale", "input_zero"), (1,))
    layer = {"q": (shape.out_features, row), "scale": blocks, "zero": blocks, "order": (shape.in_features,)}
    return layer | {"table": (16,)} | single


def blank(scheme: Scheme, shape: LinearShape, scale_dtype: torch.dtype) -> QuantWeight:
    """A canonical weight on the meta device: sizes without memory."""
    activation = scheme.activation
    static = activation is not None and activation.static
    local = activation is not None and activation.needs_scale and not static
    wanted: dict[str, torch.dtype | None] = {
        "q": torch.float8_e4m3fn if scheme.kind is WeightKind.FP8 else torch.uint8,
        "scale": scale_dtype,
        "zero": torch.uint8 if scheme.zero_point else None,
        "order": torch.int32 if scheme.act_order else None,
        "table": torch.float32 if scheme.kind.has_table else None,
        "global_scale": torch.float32 if scheme.global_scale else None,
        "input_scale": scale_dtype if static else torch.float32 if local else None,  # as writers do
        "input_zero": torch.int8 if static and activation and not activation.symmetric else None,
    }
    specs = canonical_specs(scheme, shape)
    tensors: dict[str, Any] = {
        name: torch.empty(specs[name], dtype=dtype, device="meta") for name, dtype in wanted.items() if dtype
    }
    return QuantWeight(scheme, shape, **tensors)


class QuantMethod(ABC):
    """One checkpoint format. Built once per checkpoint, from its configuration; pure: knows no kernel and no module.

    ``headers`` maps the *module tree's* tensor names to what the file holds, so names are already those of the model.
    """

    name: ClassVar[str]
    opaque: ClassVar[frozenset[str]] = frozenset()
    """Local names of tensors whose bits are codes whatever their dtype says: not checked for NaN."""

    executes_inputs_on: ClassVar[frozenset[str] | None] = None
    """Types of device on which the format's own library quantizes inputs; ``None``: on every one."""

    def executes_inputs(self, device_type: str) -> bool:
        """Whether inputs are quantized on such a device, where the file wants it and nobody says otherwise."""
        return self.executes_inputs_on is None or device_type in self.executes_inputs_on

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> Self | None:
        """The method for this ``quantization_config``.

        Returns ``None`` if the configuration names another format. Raises :class:`UnsupportedCheckpoint`, naming the
        field, if it names this one with an option that is not implemented.
        """

    @property
    @abstractmethod
    def summary(self) -> str:
        """One line for people: format, version, bits, group."""

    @abstractmethod
    def scheme_for(self, layer: str, shape: LinearShape) -> Scheme | None:
        """The scheme of a layer, by its tensors; ``None`` if it is stored dense.

        Raises :class:`BadCheckpoint` if its tensors contradict each other or the configuration.
        """

    @abstractmethod
    def dense_reason(self, layer: str) -> str:
        """Why a layer for which :meth:`scheme_for` returned ``None`` is dense."""

    def ignored(self, name: str) -> str | None:
        """Why a stored tensor that no layer wants may be left out; ``None``: it may not."""
        return None

    def sparse(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        """The tensors on disk of a layer that is not quantized but stored without its zeros: what
        :func:`quant.packing.unpack_bitmask` takes, ``compressed`` and ``bitmask``. Empty: it is stored as it is."""
        return {}

    @abstractmethod
    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        """The tensors of a quantized layer on disk, by local name (``qweight``, ...); the bias is not listed.
        A local name may have dots in it."""

    @abstractmethod
    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        """The canonical weight; does not modify its input. ``scheme`` may be without the activation quantization that
        :meth:`scheme_for` found (weight only); the weight then is as well."""

    @property
    def quantizes_layers(self) -> bool:
        """Whether a file in which no layer is stored quantized contradicts the configuration; false where that is about keys
        and values alone."""
        return True

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """Entries of the configuration, after the field that holds them, that name none of these modules."""
        return []


class LinearKernel(ABC):
    """One way to multiply by a quantized weight."""

    name: ClassVar[str]
    joins: ClassVar[bool] = True
    """Whether weights that multiply the same input may be handed over as one of all their outputs."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What runs, in a few words, e.g. the instruction set found."""

    @abstractmethod
    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        """``None``: it can. A sentence: why not."""

    def prepare(self, weight: QuantWeight) -> QuantWeight:
        """This kernel's own arrangement of a canonical weight; called once, after loading. Before it, called with tensors on
        the meta device to learn what the arrangement will take: a kernel that cannot do that is taken to keep the size."""
        return weight

    @abstractmethod
    def apply(self, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
        """``x [.., in]`` of float32, float16 or bfloat16 times a prepared weight, ``[.., out]`` in the dtype of ``x``."""
