"""What a quantized weight is: the types that formats and kernels share, and the one canonical layout.

A *method* (``quant/methods``) turns the tensors of a checkpoint into a :class:`QuantWeight`; a *kernel*
(``quant/kernels``) multiplies by it. They meet here and nowhere else.

The canonical layout of a weight ``W [out, in]``
------------------------------------------------
``q``
    Integer kinds: ``uint8 [out, ceil(in * bits / 8)]``, every row a continuous bit stream of unsigned codes, code ``i``
    in bits ``i * bits ... (i + 1) * bits - 1``, least significant bit first. For 4 bits: two codes a byte, the even
    column in the low nibble.
``scale``
    ``[out / block_out, in / block_in]`` (rounded up), one per block of outputs x inputs; float32, float16 or bfloat16
    exactly as the checkpoint stores it.
``zero``
    ``uint8``, the shape of ``scale``: the code that means zero. ``None``: ``2 ** (bits - 1)`` everywhere.
``order``
    ``int32 [in]``: column ``i`` of ``q`` multiplies input ``order[i]`` (act-order checkpoints, sorted by group).
    ``None``: the natural order.

``W[o, order[i]] = (q[o, i] - zero[o / block_out, i / block_in]) * scale[o / block_out, i / block_in]``, computed in
float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor


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
    """The sizes of one linear layer, ``y [.., out] = x [.., in] @ W.T + bias``."""

    in_features: int
    out_features: int
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.in_features}→{self.out_features}"


class WeightKind(Enum):
    """How one number of a weight is stored."""

    INT2 = "int2"
    INT3 = "int3"
    INT4 = "int4"
    INT5 = "int5"
    INT6 = "int6"
    INT7 = "int7"
    INT8 = "int8"

    @property
    def bits(self) -> int:
        return int(self.value.removeprefix("int"))

    @classmethod
    def integer(cls, bits: int) -> WeightKind:
        return cls(f"int{bits}")


@dataclass(frozen=True)
class Scheme:
    """What one linear layer's weight means; the key of kernel choice.

    ``block`` is ``(outputs, inputs)`` sharing one scale: a group of 128 is ``(1, 128)``.
    """

    kind: WeightKind
    block: tuple[int, int]
    zero_point: bool = False
    act_order: bool = False

    @property
    def group(self) -> int:
        """Inputs that share one scale."""
        return self.block[1]

    def __str__(self) -> str:
        symmetry = "asymmetric" if self.zero_point else "symmetric"
        outputs, inputs = self.block
        size = f"g{inputs}" if outputs == 1 else f"block {outputs}x{inputs}"
        return f"{self.kind.value} {size} {symmetry}" + (" act-order" if self.act_order else "")


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
        for name, present in (("zero", self.scheme.zero_point), ("order", self.scheme.act_order)):
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

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantWeight:
        """The same weight with every tensor replaced, e.g. moved to another device."""
        moved: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **moved)


def canonical_specs(scheme: Scheme, shape: LinearShape) -> dict[str, tuple[int, ...]]:
    """The shapes of ``q``, ``scale``, ``zero`` and ``order`` in the canonical layout."""
    outputs, inputs = scheme.block
    blocks = (-(-shape.out_features // outputs), -(-shape.in_features // inputs))
    row = -(-shape.in_features * scheme.kind.bits // 8)
    return {"q": (shape.out_features, row), "scale": blocks, "zero": blocks, "order": (shape.in_features,)}


def canonical_bytes(scheme: Scheme, shape: LinearShape, scale_dtype: torch.dtype) -> int:
    """Bytes of a canonical weight, without building it."""
    specs = canonical_specs(scheme, shape)
    codes, blocks = specs["q"][0] * specs["q"][1], specs["scale"][0] * specs["scale"][1]
    order = 4 * shape.in_features if scheme.act_order else 0
    return codes + blocks * (scale_dtype.itemsize + scheme.zero_point) + order


class QuantMethod(ABC):
    """One checkpoint format. Built once per checkpoint, from its configuration; pure: knows no kernel and no module.

    ``headers`` maps the *module tree's* tensor names to what the file holds, so names are already those of the model.
    """

    name: ClassVar[str]

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

    @abstractmethod
    def tensors(self, layer: str, shape: LinearShape) -> dict[str, TensorSpec]:
        """The tensors of a quantized layer on disk, by local name (``qweight``, ...); the bias is not listed."""

    @abstractmethod
    def repack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        """The canonical weight; does not modify its input."""


class LinearKernel(ABC):
    """One way to multiply by a quantized weight."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def summary(self) -> str:
        """What runs, in a few words, e.g. the instruction set found."""

    @abstractmethod
    def refuses(self, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
        """``None``: it can. A sentence: why not."""

    def prepare(self, weight: QuantWeight) -> QuantWeight:
        """This kernel's own arrangement of a canonical weight; called once, after loading."""
        return weight

    @abstractmethod
    def apply(self, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
        """``x [.., in]`` of float32, float16 or bfloat16 times a prepared weight, ``[.., out]`` in the dtype of ``x``."""
