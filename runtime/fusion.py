"""Which linear layers are multiplied at once: those that are given the same input and are of one kind.

:mod:`attention.inputs` found out what is given the same input. Layers of one kind have the same scheme but for the outputs that
share a scale, and the same kernel, or are all dense. :mod:`quant.siblings` says how they are multiplied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from quant.dense import join_dense, take_over
from quant.linear import QuantLinear, finish_together
from runtime.plan import LoadPlan, ModulePlan

Groups = tuple[tuple[str, ...], ...]


def plan_siblings(plan: LoadPlan, shared: Iterable[Sequence[str]]) -> Groups:
    """The names of layers to be multiplied at once, of those that share an input."""
    groups: list[tuple[str, ...]] = []
    for names in shared:
        kinds: dict[Any, list[str]] = {}
        for name in names:
            if (module := plan.modules.get(name)) and (kind := _kind(module)) is not None:
                kinds.setdefault(kind, []).append(name)
        groups += [tuple(group) for group in kinds.values() if len(group) > 1]
    return tuple(groups)


def _kind(module: ModulePlan) -> Any:
    """Equal for layers that may be joined; ``None``: with no other one."""
    if module.scheme is None or module.choice is None:
        return "dense" if module.nbytes and not module.transposed else None  # a shared weight stays where it is
    if not module.choice.kernel.joins or module.dequantized:
        return None
    return module.choice.kernel, replace(module.scheme, block=(1, module.scheme.group))


def finish_siblings(model: nn.Module, plan: LoadPlan) -> None:
    """Join the quantized layers of the plan, once every tensor is there."""
    for names in plan.siblings:
        layers = [layer for name in names if isinstance(layer := model.get_submodule(name), QuantLinear)]
        for layer in layers:
            if not layer.repacked:
                assert plan.method is not None
                layer.repack(plan.method)
        if layers:
            finish_together(layers)


def join_dense_siblings(model: nn.Module, plan: LoadPlan) -> None:
    """Join the dense layers of the plan, as far as nobody else has their parameters too."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for names in plan.siblings:
        modules = [model.get_submodule(name) for name in names]
        layers = [module for module in modules if isinstance(module, nn.Linear)]
        if layers and all(owners[id(layer.weight)] == 1 for layer in layers):
            join_dense([take_over(layer) for layer in layers])


def fusion_text(model: nn.Module, plan: LoadPlan) -> str:
    """What was joined, for people; layers that differ only in their numbers are told once."""
    done, alone = Counter[str](), Counter[str]()
    for names in plan.siblings:
        first: Any = model.get_submodule(names[0])
        parent = names[0].rpartition(".")[0]
        text = " + ".join(name.removeprefix(f"{parent}.") for name in names)
        if getattr(first, "siblings", None) is not None:
            done[text] += 1
        else:
            why = getattr(first, "alone", None) or "a weight belongs to others too"
            alone[f"{text} stay apart: {why}"] += 1
    joined = [f"{count} x {text}" for text, count in done.items()]
    return "; ".join(joined + [f"{count} x {text}" for text, count in alone.items()])
