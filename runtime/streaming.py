"""Quantizing dense weights one by one, as Transformers reads them.

A documented extension point of its loader: an operation at the end of what it does to a stored tensor (renaming, casting,
merging, moving to the device). The tensor that it gets is the last reference to the dense weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from quant.linear import QuantLinear
from runtime.plan import LoadPlan


class Streaming:
    """``feeds`` maps the parameters that are read to the layers that are made of them: their own, and what is tied to it."""

    def __init__(self, plan: LoadPlan, ties: Mapping[str, str]) -> None:
        assert plan.method is not None
        self.plan, self.method = plan, plan.method
        self.error: Exception | None = None
        self.joined = {name for names in plan.siblings for name in names}
        self.feeds: dict[str, list[str]] = {}
        for module in plan.read_quantized:
            weight = f"{module.name}.weight"
            for source in {weight, ties.get(weight, weight)}:
                self.feeds.setdefault(source, []).append(module.name)

    @property
    def bytes_per_weight(self) -> float:
        """In the end, on average; Transformers reserves memory by it."""
        modules = self.plan.read_quantized
        count = sum(module.shape.in_features * module.shape.out_features for module in modules)
        return sum(module.nbytes for module in modules) / count

    def fill(self, model: nn.Module, source: str, weight: Tensor) -> list[str]:
        """Quantize the layers that ``source`` feeds; the names of the weights that they no longer wait for."""
        for name in self.feeds[source]:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantLinear)
            if not layer.repacked:
                layer.weight = self.plan.modules[name].oriented(weight)
                if name in self.joined:
                    layer.repack(self.method)  # its siblings and biases are to come
                else:
                    layer.finish(self.method)
        return [f"{name}.weight" for name in self.feeds[source]]


class QuantizeStreamed(ConversionOps):
    """One use of a :class:`Streaming`, for one stored tensor or several that were one."""

    def __init__(self, streaming: Streaming) -> None:
        self.streaming = streaming

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None, **_: Any
    ) -> dict[str, Any]:
        """What is left for Transformers to put into the model."""
        for source in [name for name in input_dict if name in self.streaming.feeds]:
            value = input_dict[source]
            weight: Tensor = value[0] if isinstance(value, list) else value
            own = isinstance(model.get_submodule(source.rpartition(".")[0]), QuantLinear)
            if own:
                del input_dict[source], value
            try:
                filled = self.streaming.fill(model, source, weight)
            except Exception as error:
                # Transformers would make it a line of a table; it is raised after loading instead.
                self.streaming.error = self.streaming.error or error
                filled = [f"{name}.weight" for name in self.streaming.feeds[source]]
            if missing_keys is not None:
                missing_keys.difference_update(filled)
        return input_dict
