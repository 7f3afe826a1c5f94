"""From a plan to a loaded model. The only call of ``from_pretrained`` is here.

Transformers reads the files: renames, merges, ties, device maps and remote code are its own. A quantizer of ours, a
documented extension point, swaps the planned linears on the meta device before, and repacks them one by one after.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant.base import QuantError
from quant.embedding import QuantEmbedding
from quant.linear import QuantLinear, buffer_name, dequantize_packed, hold_packed, set_module
from runtime.checkpoint import Checkpoint
from runtime.errors import LoadError, some
from runtime.fusion import finish_siblings
from runtime.head import quantize_rounded
from runtime.peak import measure_peak, peak_rss
from runtime.plan import LoadPlan, make_plan
from runtime.report import load_report
from runtime.sparse import decompressions
from runtime.streaming import QuantizeStreamed, Streaming

logger = logging.getLogger(__name__)

QUANTIZER = "relinear"


@register_quantization_config(QUANTIZER)
class PlannedQuantization(QuantizationConfigMixin):
    """Carries the plan through ``from_pretrained``, which wants a configuration object."""

    def __init__(self, plan: LoadPlan, quant_method: str = QUANTIZER):
        self.quant_method = quant_method
        self.plan = plan

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANTIZER}


@register_quantizer(QUANTIZER)
class PlannedQuantizer(HfQuantizer):
    """Swaps what the plan says, and repacks it: after loading, or, where dense weights are quantized, as they come."""

    streaming: Streaming | None = None

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        plan: LoadPlan = self.quantization_config.plan
        plan.experts.take_apart(model)
        # Our own report names what was left out and why; Transformers' need not warn of it again.
        unexpected = [rf"^{re.escape(name)}$" for name in plan.account.ignored]
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, *unexpected}
        # A quantized layer has no weight that it could share with the embedding.
        replaced = {f"{module.name}.weight" for module in plan.read_quantized}
        ties: Any = getattr(model, "all_tied_weights_keys", {})
        if plan.on_load:
            self.streaming = Streaming(plan, ties)
        for name in [name for name, source in ties.items() if replaced & {name, source}]:
            del ties[name]
        with torch.device("meta"):
            for module in plan.read_quantized:
                assert module.scheme is not None
                assert module.choice is not None
                meaning = (module.name, module.shape, module.scheme)
                layer = (
                    QuantEmbedding(*meaning, module.stored, plan.dtype)
                    if module.shape.lookup
                    else QuantLinear(*meaning, module.choice.kernel, module.stored, plan.dtype)
                )
                set_module(model, module.name, layer)
                # Some models initialize a linear layer's weight from its parent (GPT-2): there is none, nor anything to do.
                parent = model.get_submodule(module.name.rpartition(".")[0])
                if not [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]:
                    parent._is_hf_initialized = True

        for module in plan.unpacked:
            owner = model.get_submodule(module.name)
            hold_packed(owner, module.stored)
            owner._is_hf_initialized = True  # it has no weight to be made up

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        plan: LoadPlan = self.quantization_config.plan
        method = plan.method
        if self.streaming and self.streaming.error:
            raise self.streaming.error
        finish_siblings(model, plan)
        for module in model.modules():
            if isinstance(module, QuantLinear) and not module.repacked:
                assert method is not None
                module.finish(method)
        for planned in plan.quantized:
            if planned.dequantized:
                layer = model.get_submodule(planned.name)
                assert isinstance(layer, QuantLinear)
                set_module(model, planned.name, layer.dense(plan.dtype))
        for planned in plan.unpacked:
            assert method is not None
            assert planned.packed is not None
            dequantize_packed(
                model.get_submodule(planned.name),
                planned.name,
                method,
                planned.stored,
                planned.packed,
                planned.shape,
                plan.dtype,
            )
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return self.streaming is not None and param_name in self.streaming.feeds

    def get_quantize_ops(self) -> QuantizeStreamed:
        assert self.streaming is not None
        return QuantizeStreamed(self.streaming)

    @property
    def quantized_element_size(self) -> float | None:
        return self.streaming.bytes_per_weight if self.streaming else None

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        # Transformers hands the model over as well from 5.18 on.
        plan: LoadPlan = self.quantization_config.plan
        conversions = plan.experts.conversions(weight_conversions) + decompressions(plan.sparse)
        return list(super().update_weight_conversions(conversions, *model))

    def get_weight_conversions(self) -> list[Any]:
        """Stored names that no buffer can have."""
        plan: LoadPlan = self.quantization_config.plan
        stored = {local for module in (*plan.read_quantized, *plan.unpacked) for local in module.stored}
        dotted = sorted(local for local in stored if buffer_name(local) != local)
        return [WeightRenaming(rf"\.{re.escape(local)}$", f".{buffer_name(local)}") for local in dotted]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


@dataclass(frozen=True)
class LoadedModel:
    """``seconds`` to load; ``peak_rss`` is the largest resident size this process ever had, ``peak_growth`` what loading took
    at its peak on the model's device, without pages of files, in bytes (``None``: the system does not tell)."""

    model: nn.Module
    plan: LoadPlan
    seconds: float
    peak_rss: int
    peak_growth: int | None = None


def load(plan: LoadPlan, attn_implementation: str | None = None) -> LoadedModel:
    """Read the weights. ``attn_implementation`` is Transformers' name of the attention function; ``None`` is its choice.

    Raises :class:`LoadError`; a model that is returned has every parameter from the checkpoint.
    """
    plan.require_complete()
    started = time.perf_counter()
    config = plan.config
    config.transformers_weights = plan.checkpoint.weights  # the file that was checked, whatever config.json names
    if plan.method is not None and not plan.on_load:
        config.quantization_config = {"quant_method": QUANTIZER, "plan": plan}
    try:
        with _progress(sys.stderr.isatty()), measure_peak(plan.device) as peak:
            model, info = AutoModelForCausalLM.from_pretrained(
                plan.checkpoint.folder,
                config=config,
                quantization_config=PlannedQuantization(plan) if plan.on_load else None,
                dtype=plan.dtype,
                device_map=None if plan.device.type == "cpu" else {"": plan.device},
                attn_implementation=attn_implementation,
                trust_remote_code=plan.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
            _check_report(plan, model, info)
            quantize_rounded(model, plan)
    except QuantError as error:
        raise LoadError(f"{plan.checkpoint.folder}: {error}") from error
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise LoadError(f"{plan.checkpoint.folder}: Transformers could not load it: {error}") from error
    for carrier in (config, model.config):  # it would be saved, and name a file that is not there
        vars(carrier).pop("transformers_weights", None)
    model.eval()
    return LoadedModel(model, plan, time.perf_counter() - started, peak_rss(), peak.growth)


def load_model(
    path: str | Path,
    *,
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    kernel: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attn_implementation: str | None = None,
    weight_only: bool | None = None,
    lm_head_quantization: str | None = None,
    activation_quantization: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """The plain Transformers model of a checkpoint, with quantized linears: ``model(input_ids).logits`` and
    ``model.generate`` work as usual, no engine is involved.

    ``path`` is a folder, a Hub repository or ``demo`` / ``demo-bf16``. ``quantization`` confirms the format of a quantized
    checkpoint, or names what a dense one is quantized to while it loads (``fp8``, ``int4``, ``bitsandbytes``, ...:
    :data:`quant.onload.NAMES`), with the options of :class:`quant.onload.options.Options` in ``quantization_config``.
    ``kernel`` chooses what multiplies, ``weight_only`` says whether the quantization of inputs that a checkpoint may ask
    for is left out (``None``: as the format's own library does on this device), ``lm_head_quantization`` what a dense output
    head is rounded to (``int8``), ``activation_quantization`` what the inputs of integer layers are rounded to that the
    checkpoint leaves alone (``int8``: faster, less exact). Raises :class:`LoadError`.
    """
    checkpoint = Checkpoint.open(path, revision, code=trust_remote_code)
    plan = make_plan(
        checkpoint,
        dtype=dtype,
        device=device,
        quantization=quantization,
        quantization_config=quantization_config,
        kernel=kernel,
        weight_only=weight_only,
        lm_head_quantization=lm_head_quantization,
        activation_quantization=activation_quantization,
        trust_remote_code=trust_remote_code,
    )
    loaded = load(plan, attn_implementation)
    logger.info("%s", load_report(loaded))
    return loaded.model


@contextmanager
def _progress(wanted: bool) -> Iterator[None]:
    """Transformers' progress bar only where somebody can see it move."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not wanted:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _check_report(plan: LoadPlan, model: nn.Module, info: dict[str, Any]) -> None:
    """What the plan promised is what Transformers did: the headers were right and no parameter was made up."""
    unexpected = set(info["unexpected_keys"]) - set(plan.account.ignored)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    for what, names in (
        ("parameters were not found", info["missing_keys"]),
        ("stored tensors were not used", unexpected),
        ("tensors had another shape", info["mismatched_keys"]),
        ("errors", info["error_msgs"]),
        ("parameters were never filled", left),
    ):
        if names:
            raise LoadError(f"{plan.checkpoint.folder}: while loading, {len(names)} {what}: {some(names)}.")
