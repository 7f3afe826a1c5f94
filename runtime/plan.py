"""What loading a checkpoint will do, decided before any weight is read.

The tensor headers are matched against the model's own tree (built on the meta device): every linear layer gets a scheme
and a kernel, or a reason why it stays dense; every stored tensor gets an owner; every parameter gets a source. What
cannot work is refused here, not after minutes of loading. ``relinear inspect`` prints this and stops.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from quant import kernels
from quant.base import NoKernel, QuantError, QuantMethod
from quant.kv_scales import KV_SCALES
from quant.onload.base import OnLoad
from runtime.accounting import Account, balance
from runtime.checkpoint import Checkpoint, tensor_bytes
from runtime.errors import LoadError, some
from runtime.expert_plan import ExpertPlan, plan_experts
from runtime.head import plan_head
from runtime.linear_plan import ModulePlan, plan_linears
from runtime.naming import rename_headers
from runtime.quantization import resolve_method
from runtime.skeleton import build_meta_model, read_model_config, resolve_device, resolve_dtype

WORKING_BYTES = 32 << 20
"""What quantizing a part of a layer takes beside it (:data:`quant.onload.base.WEIGHTS_AT_ONCE`)."""

ABSORBED = "dequantized: latents are kept in place of keys and values, and attention multiplies by this weight itself"
"""Why a linear layer is dense in the engine that is quantized elsewhere (:mod:`attention.latent`)."""


@dataclass(frozen=True)
class LoadPlan:
    """Everything that is known before weights are read. ``config`` is Transformers', without its quantization part;
    ``other_bytes`` are the loaded bytes of everything that is no linear layer, ``unmatched`` the entries of the
    quantization configuration that name no module of the model and none of the file, ``remarks`` what people should know,
    ``kv_scales`` the stored scales of keys and values: name in the model's tree -> name in the file, ``siblings`` the layers
    that will be multiplied at once."""

    checkpoint: Checkpoint
    config: Any
    dtype: torch.dtype
    dtype_note: str
    device: torch.device
    trust_remote_code: bool
    method: QuantMethod | None
    experts: ExpertPlan
    modules: Mapping[str, ModulePlan]
    other_bytes: int
    account: Account
    unmatched: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    kv_scales: Mapping[str, str] = field(default_factory=dict)
    siblings: tuple[tuple[str, ...], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadPlan:
        return self  # Transformers copies the configuration that carries the plan; nobody writes to it

    @property
    def quantized(self) -> list[ModulePlan]:
        return [module for module in self.modules.values() if module.scheme is not None]

    @property
    def read_quantized(self) -> list[ModulePlan]:
        return [module for module in self.modules.values() if module.read_quantized]

    @property
    def sparse(self) -> list[ModulePlan]:
        """Dense layers that are stored without their zeros."""
        dense = (module for module in self.modules.values() if not module.read_quantized and module.packed is None)
        return [module for module in dense if module.stored]

    @property
    def unpacked(self) -> list[ModulePlan]:
        """Modules that are no linear layers and whose weight is stored quantized."""
        return [module for module in self.modules.values() if module.packed]

    @property
    def scaled_together(self) -> int:
        """Layers whose inputs have one scale for all tokens that are computed together."""
        return _scaled_together(self.modules)

    @property
    def on_load(self) -> bool:
        """The checkpoint is dense and quantized while it loads."""
        return isinstance(self.method, OnLoad)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the loaded model."""
        return sum(module.nbytes for module in self.modules.values()) + self.other_bytes

    @property
    def bf16_bytes(self) -> int:
        """Bytes of the same model, dense, in bf16."""
        linears = sum(module.bf16_bytes for module in self.modules.values() if module.nbytes)
        return linears + self.other_bytes * 2 // self.dtype.itemsize

    @property
    def peak_bytes(self) -> int:
        """Largest memory during loading: every layer as stored or as its kernel holds it, whichever is larger, and, beside
        them, the layer that is being repacked, whose codes take a byte each while they change order. Quantized while
        loading: everything as it is in the end, and one layer. A head that is quantized after that is there twice."""
        largest = max((module.bf16_bytes for module in self.read_quantized), default=0)
        twice = sum(m.bf16_bytes * self.dtype.itemsize // 2 for m in self.quantized if m.rounding)
        if self.on_load:
            for stack in self.experts.stacks.values():  # all experts of a layer come at once
                largest = max(
                    largest, sum(self.modules[part.removesuffix(".weight")].bf16_bytes for part in stack.parts)
                )
            return self.weight_bytes + max(twice, largest * self.dtype.itemsize // 2) + WORKING_BYTES
        stored = (
            sum(tensor_bytes(spec) for spec in module.stored.values()) - module.nbytes for module in self.read_quantized
        )
        return self.weight_bytes + sum(more for more in stored if more > 0) + max(twice, largest)

    def dequantizing(self, names: Collection[str], reason: str) -> Self:
        """The same, but the linear layers of these names are dense once they are loaded."""
        modules = dict(self.modules)
        for name in names:
            module = modules[name]
            if module.scheme is None:
                continue
            modules[name] = replace(
                module,
                scheme=replace(module.scheme, activation=None),
                choice=kernels.choose(module.scheme, module.shape, self.device, "reference"),
                reason=reason,
                nbytes=module.bf16_bytes * self.dtype.itemsize // 2,
                packed_bytes=module.bf16_bytes * self.dtype.itemsize // 2,
                dropped=module.scheme.activation or module.dropped,
                dequantized=True,
            )
        return replace(self, modules=modules)

    def require_complete(self) -> None:
        """Raise :class:`LoadError` if a stored tensor has no owner or a parameter no source."""
        folder, unclaimed, missing = self.checkpoint.folder, self.account.unclaimed, self.account.missing
        if unclaimed:
            raise LoadError(
                f"{folder}: {len(unclaimed)} stored tensors belong to no module of this model: {some(unclaimed)}. "
                "Loading without them would compute something else than the checkpoint says. "
                "`relinear inspect` lists them all."
            )
        if missing:
            raise LoadError(
                f"{folder}: {len(missing)} parameters of the model are stored nowhere: {some(missing)}. "
                "The checkpoint is incomplete; fetch it again."
            )


def make_plan(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    kernel: str | None = None,
    weight_only: bool | None = None,
    lm_head_quantization: str | None = None,
    activation_quantization: str | None = None,
    trust_remote_code: bool = False,
) -> LoadPlan:
    """The plan for a checkpoint on a device.

    ``quantization`` confirms the format of a quantized checkpoint; with the options in ``quantization_config`` it says what a
    dense one is quantized to. ``kernel`` chooses the kernel; neither affects the other. ``weight_only`` true leaves the
    inputs of layers alone where the checkpoint wants them quantized, false never does; ``None`` does
    what the format's own library does on this device. ``lm_head_quantization`` (:data:`runtime.head.WAYS`) says what a dense
    output head is rounded to, ``activation_quantization`` what the inputs of integer layers are rounded to that the checkpoint
    leaves alone. Raises :class:`LoadError`; tensors without owner or source are
    left to :meth:`LoadPlan.require_complete`.
    """
    place = resolve_device(device)
    config = read_model_config(checkpoint, trust_remote_code)
    precision, note = resolve_dtype(dtype, checkpoint, place)
    model = build_meta_model(config, precision, trust_remote_code)
    experts = plan_experts(
        checkpoint, model, on_load=not checkpoint.quantization and bool(quantization or quantization_config)
    )
    experts.take_apart(model)
    headers = rename_headers(checkpoint, model, experts)
    try:
        named = {**headers.tensors, **headers.aliases}  # configurations name experts as the file does
        method = resolve_method(checkpoint, named, model, precision, quantization, quantization_config)
        if kernel is not None and method is None and lm_head_quantization is None:
            kernels.create(kernel)
            raise NoKernel(
                f"--kernel {kernel} multiplies by quantized weights, and this checkpoint has none. Leave it out."
            )
        modules = plan_linears(
            model, method, headers, place, precision, kernel, weight_only, experts.transposed, activation_quantization
        )
    except QuantError as error:
        raise LoadError(f"{checkpoint.folder}: {error}") from error
    on_load = isinstance(method, OnLoad)
    quantized = {name: {*module.stored, "bias"} for name, module in modules.items() if module.stored and not on_load}
    account = balance(checkpoint, model, headers, quantized, method.ignored if method else lambda name: None)
    other = _other_bytes(model, modules, precision)
    if lm_head_quantization is not None:
        try:
            head = plan_head(model, modules, precision, place, lm_head_quantization, kernel)
        except QuantError as error:
            raise LoadError(f"{checkpoint.folder}: {error}") from error
        modules = {**modules, head.name: head}
    stored = {name.rpartition(".")[0] for name in (*headers.tensors, *checkpoint.tensors)}
    names = {name for name, _ in model.named_modules()} | stored
    unmatched = tuple(method.unmatched(names - {""})) if method else ()
    remarks = _remarks(modules)
    kv_scales = {name: headers.sources[name] for name in account.ignored if KV_SCALES.search(name)}
    return LoadPlan(
        checkpoint, config, precision, note, place, trust_remote_code, method, experts, modules, other, account, unmatched,
        remarks, kv_scales,
    )  # fmt: skip


def _other_bytes(model: nn.Module, modules: Mapping[str, ModulePlan], dtype: torch.dtype) -> int:
    """Loaded bytes of embeddings, norms, biases and the like; tied parameters are counted once."""
    linears = {f"{name}.weight" for name in modules}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return sum(
        tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize
        for name, tensor in model.state_dict().items()
        if name not in linears and name not in tied
    )


def _scaled_together(modules: Mapping[str, ModulePlan]) -> int:
    schemes = [module.scheme for module in modules.values()]
    return sum(scheme is not None and scheme.activation is not None and scheme.activation.whole for scheme in schemes)


def _remarks(modules: Mapping[str, ModulePlan]) -> tuple[str, ...]:
    count = _scaled_together(modules)
    if not count:
        return ()
    return (
        f"{count} linear layers quantize their inputs under one scale for all tokens that are computed together, as the "
        "checkpoint says (dynamic, strategy tensor): an answer may depend on what is in its batch; --weight-only leaves "
        "inputs alone",
    )
