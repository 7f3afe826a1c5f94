"""The plan for every linear layer: a scheme and a kernel, or why it stays dense; how it is stored, and how large it gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant import kernels
from quant.base import Activation, LinearShape, NoKernel, QuantMethod, Scheme, TensorSpec, WeightKind, blank
from quant.embedding import lookup
from quant.onload.base import OnLoad
from runtime.accounting import DENSE_DTYPES, check_stored
from runtime.errors import LoadError
from runtime.naming import Headers
from runtime.quantization import linear_shape, matrix_shape, refuse_shared, stored_transposed

INPUTS = ("int8",)
"""What ``--activation-quantization`` may ask for."""


@dataclass(frozen=True)
class ModulePlan:
    """One linear layer. ``choice`` ``None`` means dense, and ``reason`` says why; otherwise ``reason`` tells what the
    kernel runs and who was asked before it. ``nbytes`` is the weight's size as the kernel holds it, ``packed_bytes`` without
    what the kernel adds, ``dropped`` the activation quantization that the checkpoint asks for and that is left out.
    ``transposed``: a dense weight of it is ``[in, out]``. ``dequantized``: once loaded it is an ``nn.Linear``. ``packed``: how
    the weight of a module that is no linear layer is stored; it becomes dense. ``rounding``: what quantizes the weight once it
    is loaded dense. ``asked``: the quantization of its inputs was asked for, the checkpoint knows nothing of it."""

    name: str
    shape: LinearShape
    stored: Mapping[str, TensorSpec]
    scheme: Scheme | None
    choice: kernels.Choice | None
    reason: str
    nbytes: int
    packed_bytes: int
    dropped: Activation | None = None
    transposed: bool = False
    dequantized: bool = False
    packed: Scheme | None = None
    rounding: OnLoad | None = None
    asked: bool = False

    @property
    def read_quantized(self) -> bool:
        """Whether it is quantized as soon as it is read."""
        return self.scheme is not None and self.rounding is None

    @property
    def bf16_bytes(self) -> int:
        """Bytes of the same weight in bf16."""
        return 2 * self.shape.in_features * self.shape.out_features

    def oriented(self, weight: Tensor) -> Tensor:
        """``[out, in]``, of a dense weight as it is stored; a part of a stack has a first dimension of 1."""
        matrix = weight.flatten(0, -2)
        return matrix.t() if self.transposed else matrix

    @property
    def kernel(self) -> str:
        """Name of what multiplies."""
        return self.choice.kernel.name if self.choice and not self.dequantized else "torch"


def plan_linears(
    model: nn.Module,
    method: QuantMethod | None,
    headers: Headers,
    device: torch.device,
    dtype: torch.dtype,
    asked: str | None,
    weight_only: bool | None,
    transposed: Collection[str] = (),
    inputs: str | None = None,
) -> dict[str, ModulePlan]:
    """A plan for every ``nn.Linear`` and ``Conv1D``, and for embeddings that are stored quantized. ``transposed``: layers
    whose dense weight is stored ``[in, out]``, beside every ``Conv1D``. ``inputs`` (:data:`INPUTS`): what the inputs of layers
    of integers are rounded to where they would be left alone."""
    if inputs is not None and inputs not in INPUTS:
        raise LoadError(f"--activation-quantization {inputs}: unknown; choose one of {', '.join(INPUTS)}.")
    if inputs is not None and weight_only:
        raise LoadError(
            "--activation-quantization rounds inputs and --weight-only leaves them alone; give one of them."
        )
    plans: dict[str, ModulePlan] = {}
    executes = method is None or method.executes_inputs(device.type)
    left_alone = not executes if weight_only is None else weight_only
    for name, module in model.named_modules():
        written, shape = headers.written.get(name, name), linear_shape(module)
        if shape is None:
            if method and (planned := _plan_dequantized(written, name, module, method, headers, dtype)):
                plans[name] = planned
            continue
        scheme = method.scheme_for(written, shape) if method else None
        if scheme is None or method is None:
            if not shape.lookup:
                plans[name] = _plan_dense(name, shape, model, method, headers, dtype, plans)
            continue
        if not shape.bias and (bias := headers.tensors.get(f"{name}.bias")):
            # auto-gptq stores one, mostly of zeros, for every layer; if it is not zero, it was meant.
            shape = replace(shape, bias=True)
            dtype_stored = bias.dtype if bias.dtype in DENSE_DTYPES else torch.float16
            check_stored(f"{name}.bias", bias, TensorSpec((shape.out_features,), dtype_stored))
        dropped = scheme.activation if left_alone else None
        if dropped is not None:
            scheme = replace(scheme, activation=None)
        rounded = None if inputs is None or dropped is not None else _rounded_inputs(scheme, shape)
        if rounded is not None:
            scheme = replace(scheme, activation=rounded)
        stored = method.tensors(written, shape)
        for local, expected in stored.items() if not isinstance(method, OnLoad) else ():
            check_stored(f"{name}.{local}", headers.tensors.get(f"{name}.{local}"), expected)
        try:
            choice = lookup(scheme, shape, device) if shape.lookup else kernels.choose(scheme, shape, device, asked)
        except NoKernel as error:
            raise NoKernel(f"{name}: {error}") from error
        reason = explained(choice, method.remark(shape) if isinstance(method, OnLoad) else None)
        scale = next((spec.dtype for local, spec in stored.items() if "scale" in local or local == "s"), torch.float32)
        scale = method.scale_dtype if isinstance(method, OnLoad) else scale
        held = kernels.held_bytes(choice.kernel, scheme, shape, scale)
        packed = blank(scheme, shape, scale).nbytes
        turned = stored_transposed(module) or name in transposed
        plans[name] = ModulePlan(
            name, shape, stored, scheme, choice, reason, held, packed, dropped, turned,
            asked=rounded is not None,
        )  # fmt: skip
    if method and method.quantizes_layers and not any(plan.scheme or plan.stored for plan in plans.values()):
        raise LoadError(
            f"quantization_config says {method.summary}, but no linear layer of {type(model).__name__} is stored so. "
            "The checkpoint is dense or damaged: remove quantization_config to load it as it is."
        )
    if inputs is not None and not any(plan.asked for plan in plans.values()):
        raise LoadError(
            f"--activation-quantization {inputs}: no layer has weights of integers and inputs that are left alone. "
            "Leave the option out."
        )
    return plans


def _rounded_inputs(scheme: Scheme, shape: LinearShape) -> Activation | None:
    """int8 under a scale for every group of the weight, so that one large input coarsens few; ``None``: not this layer's."""
    if shape.lookup or scheme.activation is not None or not scheme.kind.is_integer:
        return None
    whole_rows = scheme.flat or scheme.act_order or scheme.group >= shape.in_features
    return Activation(WeightKind.INT8, None if whole_rows else scheme.group)


def explained(choice: kernels.Choice, remark: str | None = None) -> str:
    """What runs, and why nothing else does."""
    refusals = [f"{other} refused: {why}" for other, why in choice.refusals.items()]
    return "; ".join([choice.kernel.summary, *([remark] if remark else []), *refusals])


def _plan_dequantized(
    written: str, name: str, module: nn.Module, method: QuantMethod, headers: Headers, dtype: torch.dtype
) -> ModulePlan | None:
    """A matrix of a module that is no linear layer, if it is stored quantized: no kernel can take the place of its code."""
    shape, weight = matrix_shape(module), headers.tensors.get(f"{name}.weight")
    if shape is None or isinstance(method, OnLoad) or (weight and weight.dtype in DENSE_DTYPES):
        return None
    scheme = method.scheme_for(written, shape)
    if scheme is None:
        return None
    stored = method.tensors(written, shape)
    for local, expected in stored.items():
        check_stored(f"{name}.{local}", headers.tensors.get(f"{name}.{local}"), expected)
    kind = replace(scheme, activation=None)
    reason = f"stored as {kind}, dequantized while loading: {type(module).__name__} is no linear layer"
    size = shape.in_features * shape.out_features * dtype.itemsize
    return ModulePlan(
        name, shape, stored, None, None, reason, size, size, dropped=scheme.activation,
        packed=kind,
    )  # fmt: skip


def _plan_dense(
    name: str,
    shape: LinearShape,
    model: nn.Module,
    method: QuantMethod | None,
    headers: Headers,
    dtype: torch.dtype,
    before: Mapping[str, ModulePlan],
) -> ModulePlan:
    """A linear layer that stays dense: it may share a weight of ``before``, or be stored without its zeros."""
    source = getattr(model, "all_tied_weights_keys", {}).get(f"{name}.weight")
    owner = before.get(source.removesuffix(".weight")) if source else None
    if owner is not None and owner.shape.lookup:  # planned, so it is quantized
        if f"{name}.weight" not in headers.tensors:
            refuse_shared(name, owner.name)
        source = None
    written = headers.written.get(name, name)
    reason = method.dense_reason(written) if method else "the checkpoint is not quantized"
    stored = method.sparse(written, shape) if method else {}
    for local, expected in stored.items():
        check_stored(f"{name}.{local}", headers.tensors.get(f"{name}.{local}"), expected)
    size = 0 if source else shape.in_features * shape.out_features * dtype.itemsize
    reason = f"shares the weight of {source}" if source else reason
    return ModulePlan(name, shape, stored, None, None, reason, size, size)
