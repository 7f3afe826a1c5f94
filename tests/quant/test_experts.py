"""Experts taken apart compute what Transformers' own experts module computes, and nothing for experts that nobody chose."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from quant.experts import Projections, QuantExperts, inward_parameter, keeps_contract

SPLIT, JOINED, UNGATED = Projections(("a", "b"), "c"), Projections(("ab",), "c"), Projections(("a",), "c")
CLASSES: dict[str, tuple[Any, str, dict[str, Any], Projections]] = {
    "gate and up apart": (MixtralExperts, "mixtral", {"num_local_experts": 5}, SPLIT),
    "gate and up as one": (MixtralExperts, "mixtral", {"num_local_experts": 5}, JOINED),
    "transposed, interleaved, biases": (GptOssExperts, "gpt_oss", {"num_local_experts": 5}, JOINED),
    "no gate": (NemotronHExperts, "nemotron_h", {"n_routed_experts": 5, "moe_intermediate_size": 12}, UNGATED),
}


@pytest.fixture(params=CLASSES)
def dense(request: pytest.FixtureRequest) -> tuple[nn.Module, Projections]:
    kind, model_type, sizes, projections = CLASSES[request.param]
    config = AutoConfig.for_model(model_type, hidden_size=16, intermediate_size=12, **sizes)
    config._experts_implementation = "grouped_mm"
    experts = kind(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    assert keeps_contract(experts)
    return experts, projections


def taken_apart(dense: nn.Module, projections: Projections) -> QuantExperts:
    """The same experts, with the weights of ``dense`` in their linear layers."""
    apart = QuantExperts(copy.deepcopy(dense), projections)
    for expert in range(apart.num_experts):
        inward, outward = getattr(dense, inward_parameter(dense))[expert], dense.down_proj[expert]
        if dense.is_transposed:
            inward, outward = inward.t(), outward.t()
        linears = apart.get_submodule(str(expert))
        for name, part in zip(projections.inward, inward.chunk(len(projections.inward)), strict=True):
            linears[name].weight.data = part.detach()
        linears[projections.outward].weight.data = outward.detach()
    return apart


def routed(experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(len(experts), 16), experts, torch.rand(experts.shape)


@torch.no_grad()
def test_the_result_is_that_of_the_experts_module(dense: tuple[nn.Module, Projections]) -> None:
    apart = taken_apart(*dense)
    for tokens in (1, 7):
        call = routed(torch.rand(tokens, 5).argsort(1)[:, :2])
        torch.testing.assert_close(apart(*call), dense[0](*call), rtol=1e-5, atol=1e-5)
    assert apart(*routed(torch.zeros(0, 2, dtype=torch.int64))).shape == (0, 16)


@torch.no_grad()
def test_a_token_does_not_depend_on_its_neighbours(dense: tuple[nn.Module, Projections]) -> None:
    apart = taken_apart(*dense)
    hidden, experts, weights = routed(torch.rand(6, 5).argsort(1)[:, :2])
    together = apart(hidden, experts, weights)
    alone = [apart(hidden[t : t + 1], experts[t : t + 1], weights[t : t + 1]) for t in range(6)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_chosen_experts_are_computed(dense: tuple[nn.Module, Projections]) -> None:
    """An index beyond the last expert chooses none, as where experts are spread over devices."""
    apart, rows = taken_apart(*dense), dict.fromkeys(range(5), 0)
    for expert in rows:
        layer = apart.get_submodule(f"{expert}.{dense[1].outward}")
        layer.register_forward_hook(lambda _, inputs, __, e=expert: rows.update({e: rows[e] + len(inputs[0])}))
    hidden, experts, weights = routed(torch.tensor([[1, 3], [3, 5], [3, 1]]))
    found = apart(hidden, experts, weights)
    assert rows == {0: 0, 1: 2, 2: 0, 3: 3, 4: 0}
    only = apart(hidden[1:2], experts[1:2, :1], weights[1:2, :1])
    torch.testing.assert_close(found[1:2], only, rtol=1e-5, atol=1e-5)


def test_the_parameters_are_gone_and_the_dtype_is_that_of_the_inputs(dense: tuple[nn.Module, Projections]) -> None:
    apart = taken_apart(*dense).to(torch.bfloat16)
    assert all(parameter.ndim < 3 for parameter in apart.parameters())
    hidden, experts, weights = routed(torch.tensor([[1, 3]]))
    assert apart(hidden.bfloat16(), experts, weights).dtype == torch.bfloat16
