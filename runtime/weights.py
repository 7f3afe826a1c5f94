"""The tensors of a planned checkpoint, read one at a time and not kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor

from quant.base import QuantError, QuantWeight
from quant.onload.base import OnLoad
from runtime.errors import LoadError
from runtime.linear_plan import ModulePlan
from runtime.naming import Headers, rename_headers
from runtime.plan import LoadPlan
from runtime.skeleton import build_meta_model


@dataclass(frozen=True)
class StoredWeights:
    """``headers``: what is stored, and its name in the file; ``files``: that name -> the file; ``ties``: parameters that share
    another's tensor -> that one."""

    plan: LoadPlan
    headers: Headers
    files: Mapping[str, Path]
    ties: Mapping[str, str]

    @classmethod
    def of(cls, plan: LoadPlan) -> Self:
        """Where everything is that a plan will read. Raises :class:`LoadError` for a layer that is not stored by itself."""
        model = build_meta_model(plan.config, plan.dtype, plan.trust_remote_code)
        plan.experts.take_apart(model)
        files: dict[str, Path] = {}
        for path in plan.checkpoint.files:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        ties = dict(getattr(model, "all_tied_weights_keys", {}))
        weights = cls(plan, rename_headers(plan.checkpoint, model, plan.experts), files, ties)
        for module in plan.read_quantized:
            for local in module.stored:
                weights.source(f"{module.name}.{local}")
        return weights

    def source(self, name: str) -> str:
        """What is read for ``name`` of the model's tree: itself, or what it is tied to."""
        for candidate in (name, self.ties.get(name, name)):
            if candidate in self.headers.sources:
                return candidate
        raise LoadError(
            f"{name} is made of several stored tensors while loading, which can be served and not verified layer by layer. "
            "`relinear eval diff` compares the model with the original as a whole."
        )

    def tensor(self, name: str) -> Tensor:
        """The tensor that will be ``name`` in the model's tree."""
        stored, place = self.headers.sources[name], self.headers.places.get(name)
        with safe_open(self.files[stored], "pt") as file:
            found: Tensor = file.get_tensor(stored) if place is None else file.get_slice(stored)[place : place + 1]
            return found.to(self.plan.device)

    def quantized(self, module: ModulePlan) -> QuantWeight:
        """The canonical weight of a quantized layer. Raises :class:`LoadError` if its values cannot be."""
        method = module.rounding or self.plan.method
        assert method is not None
        assert module.scheme is not None
        stored = ["weight"] if module.rounding else module.stored
        tensors = {local: self.tensor(self.source(f"{module.name}.{local}")) for local in stored}
        if isinstance(method, OnLoad):  # as loading hands it over
            tensors["weight"] = module.oriented(tensors["weight"].to(self.plan.dtype))
        try:
            return method.repack(tensors, module.scheme, module.shape)
        except QuantError as error:
            raise LoadError(f"{module.name}: {error}") from error

    def bias(self, module: ModulePlan) -> Tensor | None:
        """The bias of a layer, ``[out]``, in the model's dtype."""
        return self.tensor(f"{module.name}.bias").to(self.plan.dtype) if module.shape.bias else None

    def damage(self) -> Iterator[str]:
        """What is wrong with stored values by themselves, tensor by tensor: NaN and infinity, where they are numbers."""
        method = self.plan.method
        opaque = {
            f"{module.name}.{local}"
            for module in self.plan.read_quantized
            for local in (method.opaque if method else ())
        }
        for name in self.headers.sources:
            if name in opaque or name in self.plan.account.ignored:
                continue
            values = self.tensor(name)
            if not values.is_floating_point():
                continue
            broken = values.numel() - int(torch.isfinite(values.float()).sum())
            if broken:
                yield f"{name}: {broken} of {values.numel()} values are NaN or infinite. The file is damaged."
