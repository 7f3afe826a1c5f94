"""The module that takes the place of ``nn.Linear``.

Its life has two halves. Before loading it holds empty tensors named and typed as the checkpoint stores them, so that any
loader that fills a state dict can fill it. :meth:`QuantLinear.finish` then turns them into a kernel's weight, once: after
loading, or, where a dense weight is quantized, as soon as it came. Layers that are to be multiplied at once are repacked one by
one and finished together, by :func:`finish_together`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quant.base import (
    BadCheckpoint,
    LinearKernel,
    LinearShape,
    QuantError,
    QuantMethod,
    QuantWeight,
    Scheme,
    TensorSpec,
)
from quant.onload.base import OnLoad
from quant.reference import dequantize
from quant.siblings import Siblings, joined, joined_bias


class QuantLinear(nn.Module):
    """``y [.., out] = x [.., in] @ W.T + bias`` with a quantized ``W``; ``y`` has the dtype of ``x``."""

    def __init__(
        self,
        name: str,
        shape: LinearShape,
        scheme: Scheme,
        kernel: LinearKernel,
        tensors: Mapping[str, TensorSpec],
        dtype: torch.dtype,
    ):
        super().__init__()
        self.name = name
        self.shape = shape
        self.scheme = scheme
        self.kernel = kernel
        self.in_features = shape.in_features
        self.out_features = shape.out_features
        self._stored = tuple(tensors)
        for local, spec in tensors.items():
            self.register_buffer(buffer_name(local), torch.empty(spec.shape, dtype=spec.dtype))
        bias = nn.Parameter(torch.empty(shape.out_features, dtype=dtype), requires_grad=False) if shape.bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.quant_weight: QuantWeight | None = None
        self.siblings: Siblings | None = None
        self.place = 0  # among them
        self.alone: str | None = None
        """Why it was not joined with layers that it was planned to be joined with."""

    @property
    def repacked(self) -> bool:
        """Whether the stored tensors are gone."""
        return not self._stored

    def finish(self, method: QuantMethod) -> None:
        """Repack the loaded tensors for the kernel and free them. Raises :class:`BadCheckpoint` on values that cannot be."""
        self.repack(method)
        self.prepare()

    def repack(self, method: QuantMethod) -> None:
        """The first half of :meth:`finish`: the weight is canonical."""
        tensors = {local: getattr(self, buffer_name(local)) for local in self._stored}
        weight = repack(self.name, method, tensors, self.scheme, self.shape)
        self.scheme = weight.scheme  # may be simpler than planned: no zero points, no order
        if (
            self.bias is not None and not self.bias.is_meta and not self.bias.any()
        ):  # auto-gptq stores one for every layer
            self.bias = None
        tensors.clear()
        for local in self._stored:
            delattr(self, buffer_name(local))
        self._stored = ()
        self.quant_weight = weight

    def prepare(self) -> None:
        """The second half of :meth:`finish`."""
        assert self.quant_weight is not None
        self.quant_weight = self.kernel.prepare(self.quant_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x) if self.siblings is None else self.siblings.part(self.place, x)

    def multiply(self, x: Tensor) -> Tensor:
        """``x`` times the weight that is here: of this layer, or of all :attr:`siblings` if it is the first of them."""
        assert self.quant_weight is not None, f"{self.name} was not finished after loading"
        return self.kernel.apply(x, self.quant_weight, self.bias)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weight dequantized, of a kernel that leaves the canonical layout as it is."""
        assert self.quant_weight is not None, f"{self.name} was not finished after loading"
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(dequantize(self.quant_weight).to(dtype), requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # Moves follow the module; a change of dtype must not touch codes or scales.
        super()._apply(fn, recurse)
        if self.quant_weight is not None:
            self.quant_weight = self.quant_weight.map(lambda tensor: tensor.to(fn(tensor).device))
        return self

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.scheme}, kernel={self.kernel.name}, bias={self.shape.bias}"


def finish_together(layers: Sequence[QuantLinear]) -> None:
    """Prepare repacked layers, which are given the same input, as :class:`Siblings`: the first has the weight and the bias of
    all. Where that cannot be, each is prepared by itself and knows why."""
    first = layers[0]
    weight = joined([layer.quant_weight for layer in layers if layer.quant_weight is not None])
    refusal = weight if isinstance(weight, str) else first.kernel.refuses(weight.scheme, weight.shape, weight.device)
    if isinstance(weight, str) or refusal is not None:
        for layer in layers:
            layer.prepare()
            layer.alone = refusal
        return
    sizes = [layer.out_features for layer in layers]
    bias = joined_bias([layer.bias for layer in layers], sizes)
    siblings = Siblings(first.multiply, sizes)
    for place, layer in enumerate(layers):
        layer.siblings, layer.place = siblings, place
        layer.quant_weight = layer.bias = None
    first.quant_weight = weight
    first.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    first.prepare()


def quantize_linear(name: str, dense: nn.Linear, way: OnLoad, kernel: LinearKernel) -> QuantLinear:
    """A dense layer, rounded; the layer itself is left as it is. Raises :class:`BadCheckpoint` on values that cannot be."""
    shape = LinearShape(dense.in_features, dense.out_features, dense.bias is not None)
    weight = dense.weight.detach()
    with torch.device("meta"):
        layer = QuantLinear(name, shape, way.scheme(shape), kernel, way.tensors(name, shape), weight.dtype)
    layer.weight = weight
    layer.bias = dense.bias
    layer.finish(way)
    return layer


def repack(
    name: str, method: QuantMethod, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape
) -> QuantWeight:
    """The canonical weight of the layer ``name``. Raises :class:`QuantError`, naming it, on values that cannot be."""
    for local, tensor in tensors.items():
        if local not in method.opaque and tensor.is_floating_point() and (broken := _not_finite(tensor)):
            raise BadCheckpoint(
                f"{name}.{local}: {broken} of {tensor.numel()} values are NaN or infinite. The file is damaged."
            )
    try:
        weight = method.repack(tensors, scheme, shape)
    except QuantError as error:
        raise type(error)(f"{name}: {error}") from error
    for what, scale, right in (
        ("inputs", weight.input_scale, lambda scale: scale > 0),
        ("weights", weight.global_scale, torch.isfinite),  # of zeros alone it is zero
    ):
        if scale is not None and not bool((scale.isfinite() & right(scale)).all()):
            raise BadCheckpoint(
                f"{name}: the scale of all its {what} comes to {scale.item():g}. The file is damaged, or the layer was never "
                "calibrated" + ("; --weight-only leaves inputs alone." if what == "inputs" else ".")
            )
    return weight


def hold_packed(module: nn.Module, tensors: Mapping[str, TensorSpec]) -> None:
    """Make room for what is stored instead of the ``weight`` of a module, on the meta device."""
    del module.weight
    for local, spec in tensors.items():
        module.register_buffer(buffer_name(local), torch.empty(spec.shape, dtype=spec.dtype, device="meta"))


def dequantize_packed(
    module: nn.Module,
    name: str,
    method: QuantMethod,
    stored: Iterable[str],
    scheme: Scheme,
    shape: LinearShape,
    dtype: torch.dtype,
) -> None:
    """Turn what :func:`hold_packed` made room for, now loaded, into the ``weight`` of the module."""
    tensors = {local: module.get_buffer(buffer_name(local)) for local in stored}
    weight = dequantize(repack(name, method, tensors, scheme, shape)).to(dtype)
    for local in tensors:
        delattr(module, buffer_name(local))
    module.weight = nn.Parameter(weight, requires_grad=False)


def _not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch asks no 8-bit float
    if wide.numel() and all(bound.isfinite() for bound in torch.aminmax(wide)):  # NaN is both; one pass, nothing stored
        return 0
    return tensor.numel() - int(torch.isfinite(wide).sum())


def buffer_name(local: str) -> str:
    """The buffer that holds a stored tensor until it is repacked; torch wants no dots in it (``weight.absmax``)."""
    return local.replace(".", "_")


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is in the tree."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
