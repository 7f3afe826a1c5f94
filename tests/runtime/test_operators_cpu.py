"""Small operators in C against the formulas that they stand for, and in whole models against the models' own code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from runtime.operators import cpu, recognize, replace_operators, replace_with
from runtime.operators.recognize import Norm
from tests.runtime.operators_suite import REPLACED, SIZES

if cpu.SOURCE.refusal is not None:
    pytest.skip(cpu.SOURCE.refusal, allow_module_level=True)

ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-126}
"""What a result may be off however small it is: what the type has no smaller number than, or no normal one."""
EXTREMES = (torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, -1.0, -20.0, 90.0, -88.5, -90.0, 6e4, -6e4, 1e-7, -1e-7)

paths = [
    pytest.param(index, id=path, marks=pytest.mark.skipif(index > cpu.widest(), reason="not on this processor"))
    for index, path in enumerate(cpu.PATHS)
]
every_path = pytest.mark.parametrize("path", paths)
every_type = pytest.mark.parametrize("dtype", ULP, ids=str)


def assert_near(found: Tensor, wanted: Tensor, units: int, slack: Tensor | None = None) -> None:
    """NaN and infinities where they belong, all else within this many units in the last place, and ``slack``."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    infinite = wanted.isinf()
    assert torch.equal(found[infinite], wanted[infinite])
    usual = wanted.isfinite()
    bound = units * (ULP[wanted.dtype] * wanted.double().abs() + SMALLEST[wanted.dtype])
    if slack is not None:
        bound = bound + slack.double().abs()
    assert ((found.double() - wanted.double()).abs() <= bound)[usual].all()


def norm_units(dtype: torch.dtype) -> int:
    """One rounding may go the other way, and another after it; a sum of float32 in another order is more."""
    return 16 if dtype == torch.float32 else 2


@every_path
@every_type
@pytest.mark.parametrize("form", cpu.FORMS)
def test_norms(form: str, dtype: torch.dtype, path: int) -> None:
    norm = Norm(form, 1e-5)
    for size in (1, 7, 96, 577):
        weight = (1 + torch.randn(size) / 4).to(dtype)
        apart = torch.randn(5, 2 * size + 16).to(dtype)[:, 8 : 8 + size]
        heads = torch.randn(1, 5, 3 * size).to(dtype).view(1, 5, 3, size).transpose(1, 2)
        for x in (torch.randn(1, 5, size).to(dtype), apart, apart[0], heads, apart * 1e-3, apart[:0]):
            assert_near(cpu.rms_norm(x, weight, norm, path), recognize.rms_norm(x, weight, norm), norm_units(dtype))


@every_path
@every_type
@pytest.mark.parametrize("form", cpu.FORMS)
def test_norms_of_extreme_rows(form: str, dtype: torch.dtype, path: int) -> None:
    weight = (1 + torch.randn(100) / 4).to(dtype)
    x = torch.randn(len(EXTREMES) + 5, 100).to(dtype)
    x[range(len(EXTREMES)), torch.arange(len(EXTREMES))] = torch.tensor(EXTREMES).to(dtype)
    x[-5:] = torch.tensor([0.0, 1e30, 1e-30, 6e4, 1e-7]).to(dtype)[:, None]
    for eps in (1e-6, 0.0):
        norm = Norm(form, eps)
        assert_near(cpu.rms_norm(x, weight, norm, path), recognize.rms_norm(x, weight, norm), norm_units(dtype))


@every_path
@every_type
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_gated_activations(activation: str, dtype: torch.dtype, path: int) -> None:
    units = 8 if dtype == torch.float32 else 2

    def check(gate: Tensor, up: Tensor) -> None:
        # torch adds 1 to tanh, which of large negative numbers leaves little but roundings: those of float32.
        slack = None if activation == "silu" else ULP[torch.float32] * gate.double() * up.double()
        wanted = recognize.ACTIVATIONS[activation](gate) * up
        assert_near(cpu.gated(gate, up, activation, path), wanted, units, slack)

    gate, up = (torch.randn(1, 7, 2 * 333) * 3).to(dtype).chunk(2, -1)
    check(gate, up)
    check(gate[0], up[0].contiguous())
    check(gate[:0], up[:0])
    edges = torch.tensor(EXTREMES).to(dtype)
    check(edges.repeat_interleave(len(edges))[None], edges.repeat(len(edges))[None])


@every_path
@every_type
def test_rotary_embeddings(dtype: torch.dtype, path: int) -> None:
    for heads, size in ((3, 80), (1, 6)):
        qkv = torch.randn(1, 6, (heads + 2) * size).to(dtype).view(1, 6, heads + 2, size).transpose(1, 2)
        q, k = qkv[:, :heads], qkv[:, heads:]
        q[0, 0, 1, : len(EXTREMES) % size] = torch.tensor(EXTREMES[: len(EXTREMES) % size]).to(dtype)
        angles = torch.randn(1, 6, size)  # of the two halves different ones
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for x, found, wanted in zip(
            (q, k), cpu.rotary(q, k, cos, sin, path), recognize.rotary(q, k, cos, sin), strict=True
        ):
            if dtype == torch.float32:  # one product is not rounded before it is added
                assert_near(found, wanted, 1, ULP[dtype] * (x.abs() + x.abs().roll(size // 2, -1)))
            else:
                assert torch.equal(found.nan_to_num(9), wanted.nan_to_num(9))
            assert found.transpose(1, 2).is_contiguous()


def test_many_rows_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, norm = torch.randn(700, 192).bfloat16(), Norm("late", 1e-6)
    weight = torch.randn(192).bfloat16()
    angles = torch.randn(1, 700, 64).bfloat16()
    q, k = torch.randn(1, 9, 700, 64).bfloat16(), torch.randn(1, 3, 700, 64).bfloat16()

    def results() -> list[Tensor]:
        return [cpu.rms_norm(x, weight, norm), cpu.gated(x, x, "silu"), *cpu.rotary(q, k, angles, angles)]

    alone = results()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(map(torch.equal, results(), alone))


@pytest.mark.parametrize("config", REPLACED, ids=lambda config: config.model_type)
@torch.inference_mode()
def test_models_compute_what_they_computed(config: type) -> None:
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 3e-2)):
        model = AutoModelForCausalLM.from_config(config(**SIZES)).to(dtype).eval()
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 5)  # so that layers matter, and a wrong one shows
        ids = torch.randint(64, (1, 12))
        wanted = model(ids).logits.float()
        assert sorted(replace_with(cpu, model).split(", ")) == sorted(REPLACED[config].split(", "))
        found = model(ids).logits.float()
        difference = (found - wanted).norm() / wanted.norm()
        assert difference < most, difference


def test_no_compiler_leaves_the_modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(next(iter(REPLACED))(**SIZES))
    device = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr("runtime.operators.kernels_of", lambda device: None)
        assert replace_operators(model, device, torch.float32) == ""
    assert replace_operators(model, device, torch.float64) == ""
    assert not any("forward" in vars(module) for module in model.modules())
