"""What the engine does to a loaded model besides multiplying by quantized weights, which leaves the modelling code as it is:
layers that stay dense are multiplied by C where it is faster than torch, or several at once (:mod:`runtime.fusion`); small
operators are one kernel each (:mod:`runtime.operators`)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from quant.dense import take_over
from quant.kernels import dense
from runtime.fusion import fusion_text, join_dense_siblings
from runtime.operators import replace_operators
from runtime.plan import LoadPlan


def settle(model: nn.Module, plan: LoadPlan, native: bool) -> list[tuple[str, str]]:
    """Do all of it; ``native`` false leaves to torch what torch can do. Returns labels and texts for people."""
    lines = list(_replace(model)) if native else []
    if native and (operators := replace_operators(model, plan.device, plan.dtype)):
        lines.append(("operators", f"one kernel each for {operators}"))
    join_dense_siblings(model, plan)
    if fused := fusion_text(model, plan):
        lines.append(("fused", fused))
    return lines


def _replace(model: nn.Module) -> Iterator[tuple[str, str]]:
    layers = [module for module in model.modules() if type(module) is nn.Linear and dense.takes(module.weight)]
    for layer in layers:
        take_over(layer).native = True
    if layers:
        yield "native", f"{len(layers)} dense linear layers: C for up to {dense.MOST_ROWS} rows, torch for more"
