"""Small operators in Triton against the formulas that they stand for, and in whole models against the models' own code.

On a machine without a GPU in Triton's interpreter, which has to be asked for before Triton is imported: test_operators does
that. On one with a GPU: ``make test-cuda``.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Olmo2Config, Phi3Config, Qwen3Config
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from runtime.operators import kernels, recognize, replace_with
from runtime.operators.recognize import Norm

pytestmark = pytest.mark.cuda
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative distance of neighbouring numbers; the interpreter rounds bfloat16 towards zero, which is one more."""


def random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, device=DEVICE).to(dtype)


def assert_near(found: Tensor, wanted: Tensor, terms: Tensor | None = None) -> None:
    """Three roundings of the result, or of what it is the sum of."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    bound = 3 * ULP[wanted.dtype] * (wanted if terms is None else terms).float().abs() + 1e-6
    assert ((found.float() - wanted.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("form", ["rounded", "late", "one_plus"])
def test_norms(form: str, dtype: torch.dtype) -> None:
    norm = Norm(form, 1e-5)
    weight = 1 + random(96, dtype=dtype) / 4
    apart = random(5, 200, dtype=dtype)[:, 8:104]
    heads = random(1, 5, 3 * 96, dtype=dtype).view(1, 5, 3, 96).transpose(1, 2)
    for x in (random(1, 5, 96, dtype=dtype), apart, heads, apart * 1e-3):
        assert_near(kernels.rms_norm(x, weight, norm), recognize.rms_norm(x, weight, norm))


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("activation", recognize.ACTIVATIONS)
def test_gated_activations(activation: str, dtype: torch.dtype) -> None:
    both = random(1, 7, 2 * 1100, dtype=dtype) * 3
    gate, up = both.chunk(2, -1)
    wanted = recognize.ACTIVATIONS[activation](gate) * up
    assert_near(kernels.gated(gate, up, activation), wanted)
    assert_near(kernels.gated(gate[0], up[0].contiguous(), activation), wanted[0])


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_rotary_embeddings(dtype: torch.dtype) -> None:
    qkv = random(1, 6, (6 + 2) * 80, dtype=dtype).view(1, 6, 8, 80).transpose(1, 2)
    q, k = qkv[:, :6], qkv[:, 6:]
    angles = torch.randn(1, 6, 40, device=DEVICE)
    cos, sin = (torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin()))
    found, wanted = kernels.rotary(q, k, cos, sin), recognize.rotary(q, k, cos, sin)
    for x, each, other in zip((q, k), found, wanted, strict=True):
        assert_near(each, other, terms=x.abs() + x.abs().roll(40, -1))


SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
REPLACED = {
    LlamaConfig: "5 norms, 2 gated activations, 2 rotary embeddings",
    Gemma2Config: "9 norms, 2 gated activations, 2 rotary embeddings",
    Qwen3Config: "9 norms, 2 gated activations, 2 rotary embeddings",
    Phi3Config: "5 norms, 2 gated activations, 2 rotary embeddings",
    Olmo2Config: "9 norms, 2 gated activations, 2 rotary embeddings",
}


@pytest.mark.parametrize("config", REPLACED, ids=lambda config: config.model_type)
@torch.inference_mode()
def test_models_compute_what_they_computed(config: type) -> None:
    model = AutoModelForCausalLM.from_config(config(**SIZES)).to(DEVICE, torch.float16).eval()
    for name, parameter in model.named_parameters():
        parameter.mul_(1 if "norm" in name else 5)  # so that layers matter, and a wrong one shows
    ids = torch.randint(64, (1, 12), device=DEVICE)
    wanted = model(ids).logits.float()
    assert sorted(replace_with(kernels, model).split(", ")) == sorted(REPLACED[config].split(", "))
    difference = (model(ids).logits.float() - wanted).norm() / wanted.norm()
    assert difference < 5e-3, difference


@torch.inference_mode()
def test_a_norm_that_is_given_a_gate_uses_it() -> None:
    norm = Zamba2RMSNormGated(64, group_size=64).to(DEVICE, torch.float16)
    x, gate = random(3, 64, dtype=torch.float16), random(3, 64, dtype=torch.float16)
    plain, gated = norm(x), norm(x, gate)
    assert replace_with(kernels, torch.nn.ModuleList([norm])) == "1 norms"
    assert_near(norm(x), plain)
    assert torch.equal(norm(x, gate), gated)
    assert torch.equal(norm(x, gate=gate), gated)
