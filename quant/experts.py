"""The module that takes the place of a model's experts: a linear layer for every expert and projection.

Transformers keeps the experts of a layer in two parameters with three dimensions; quantized files keep a matrix an expert.
Taken apart into ``nn.Linear`` under the names of the file, experts are planned, swapped and repacked like any other linear
layer, each by itself: one may be dense, have 8 bits or an order of its own. Routing is the block's, before; the gate, its
activation and a norm behind the expert are the code of the model's own experts module.

The contract between block, experts and gate is that of Transformers 5.23 ``integrations/moe.py``
(``use_experts_implementation``); sums are formed as ``grouped_mm_experts_forward`` there forms them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONTRACT = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")
"""Attributes of an experts module that keeps the contract."""


@dataclass(frozen=True)
class Projections:
    """Names of an expert's linear layers. The outputs of ``inward``, one behind the other, are what the gate takes."""

    inward: tuple[str, ...]
    outward: str

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.inward, self.outward)


def keeps_contract(module: nn.Module) -> bool:
    """Whether a module is experts that :class:`QuantExperts` can replace."""
    return all(hasattr(module, name) for name in CONTRACT) and hasattr(module, inward_parameter(module))


def inward_parameter(experts: nn.Module) -> str:
    """The parameter whose product goes into the gate or activation."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


class QuantExperts(nn.Module):
    """``forward(hidden_states [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k])`` gives ``[tokens,
    hidden]`` in the dtype of ``hidden_states``; only experts that a token chose are computed.

    Takes ``dense`` apart: its biases and submodules move here, its three-dimensional parameters are deleted.
    """

    def __init__(self, dense: Any, projections: Projections):
        super().__init__()
        self.projections = projections
        inward, down = getattr(dense, inward_parameter(dense)), dense.down_proj
        self.num_experts = int(down.shape[0])
        across = 1 if dense.is_transposed else 2  # the dimension of the inputs
        hidden, inner = inward.shape[across], down.shape[across]
        width = inward.shape[3 - across] // len(projections.inward)
        sizes = {**dict.fromkeys(projections.inward, (hidden, width)), projections.outward: (inner, hidden)}
        for expert in range(self.num_experts):
            linears = {
                name: nn.Linear(*size, bias=False, device=down.device, dtype=down.dtype) for name, size in sizes.items()
            }
            self.add_module(str(expert), nn.ModuleDict(linears))
        self._biases = (f"{inward_parameter(dense)}_bias", "down_proj_bias") if dense.has_bias else None
        for name in (inward_parameter(dense), "down_proj"):
            delattr(dense, name)
        for name, parameter in dense.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in dense.named_children():
            self.add_module(name, child)
        self._gate: Callable[[Tensor], Tensor] | None = dense._apply_gate if dense.has_gate else None
        # Older releases know no such norm, and their experts none that the flag could tell of.
        self._normalizes = getattr(dense, "has_post_expert_norm", False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen, width = top_k_index.shape[-1], hidden_states.shape[-1]
        # Sorted by expert, every expert's share is one slice. Indices beyond the last expert choose none and come last.
        experts, slots = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=self.num_experts)[: self.num_experts]
        results, start = hidden_states.new_zeros(slots.numel(), width), 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                share = slots[start : start + count]
                results[share] = self._expert(expert, hidden_states[share // chosen])
                start += count
        weighted = results * top_k_weights.reshape(-1, 1)
        return weighted.view(-1, chosen, width).sum(1).to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        linears = self.get_submodule(str(expert))
        assert isinstance(linears, nn.ModuleDict)
        parts = [linears[name](x) for name in self.projections.inward]
        inward = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self._biases:
            inward = inward + getattr(self, self._biases[0])[expert]
        inner = self._gate(inward) if self._gate else self.get_submodule("act_fn")(inward)
        y: Tensor = linears[self.projections.outward](inner)
        if self._biases:
            y = y + getattr(self, self._biases[1])[expert]
        return self.get_submodule("post_expert_norm")(y) if self._normalizes else y

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts of {', '.join(self.projections.names)}"
