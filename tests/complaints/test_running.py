"""Speed, memory and unclear errors (complaints 23 to 28): the situations, and what happens in them here."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from quant import kernels
from quant.base import Activation, LinearShape, QuantMethod, Scheme, WeightKind
from quant.kernels.cpu import CpuKernel
from quant.linear import QuantLinear
from runtime import LoadError, inspect, load_model
from runtime.checkpoint import Checkpoint, tensor_bytes
from runtime.loader import load
from runtime.plan import make_plan
from tests.complaints.test_silent import CHECKPOINTS
from tests.runtime.test_loader import AWQ


def test_many_rows_are_multiplied_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = load_model(AWQ, dtype="float32").get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, QuantLinear)
    if not isinstance(layer.kernel, CpuKernel):
        pytest.skip("no C compiler")
    dense: list[int] = []
    real = CpuKernel._by_panels
    monkeypatch.setattr(CpuKernel, "_by_panels", lambda self, x, *rest: dense.append(len(x)) or real(self, x, *rest))
    for rows in (1, 8, 4096):
        layer(torch.randn(rows, layer.in_features))
    assert dense == [4096]


def test_one_layer_at_a_time_is_repacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all quantized layers hold, before and after each of them is repacked, is never more than what is stored."""
    plan = make_plan(Checkpoint.open(AWQ))
    layers: list[QuantLinear] = []
    held: list[int] = []
    build, finish = QuantLinear.__init__, QuantLinear.finish

    def building(layer: QuantLinear, *arguments: Any) -> None:
        build(layer, *arguments)
        layers.append(layer)

    def finishing(layer: QuantLinear, method: QuantMethod) -> None:
        for step in (lambda: None, lambda: finish(layer, method)):
            step()
            buffers = sum(buffer.nbytes for each in layers for buffer in each.buffers())
            held.append(buffers + sum(each.quant_weight.nbytes for each in layers if each.quant_weight))

    monkeypatch.setattr(QuantLinear, "__init__", building)
    monkeypatch.setattr(QuantLinear, "finish", finishing)
    load(plan)
    stored = sum(tensor_bytes(spec) for module in plan.quantized for spec in module.stored.values())
    assert len(held) == 2 * len(plan.quantized)
    assert max(held) < 1.05 * stored  # a kernel may pad
    assert plan.peak_bytes < 0.75 * plan.bf16_bytes


FLOAT_INPUTS, INT_INPUTS = Activation(WeightKind.FP8), Activation(WeightKind.INT8, threshold=6.0)


@pytest.mark.parametrize("kind", WeightKind)
def test_every_scheme_has_a_kernel_and_every_refusal_a_sentence(kind: WeightKind) -> None:
    shape, device = LinearShape(256, 24), torch.device("cpu")
    for block, inputs in product(((1, 32), (1, 256), (24, 256), (128, 128)), (None, FLOAT_INPUTS, INT_INPUTS)):
        choice = kernels.choose(Scheme(kind, block, activation=inputs), shape, device)
        assert choice.kernel.refuses(Scheme(kind, block, activation=inputs), shape, device) is None
        assert all(len(why.split()) > 3 for why in choice.refusals.values())


@pytest.mark.parametrize(
    ("name", "spellings", "other"),
    [
        ("auto-round--auto_round-sym", ("auto-round", "auto_round", "autoround"), "gptq"),
        ("gptqmodel--gptq-w2-sym", ("gptq", "gptq_marlin", "marlin"), "auto-round"),
        ("transformers-fp8--block128", ("fp8",), "gguf"),
        ("modelopt--fp8-pb-wo", ("modelopt", "modelopt_fp8"), "fp8"),
    ],
)
def test_names_of_one_format_do_not_clash(name: str, spellings: tuple[str, ...], other: str) -> None:
    for spelling in spellings:
        assert inspect(CHECKPOINTS / name, quantization=spelling).plan.method is not None
    with pytest.raises(LoadError, match=rf"--quantization {other}.*({spellings[0]}|known: .*{spellings[0]})"):
        inspect(CHECKPOINTS / name, quantization=other)
