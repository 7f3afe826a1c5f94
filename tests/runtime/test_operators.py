"""What is recognised as a norm, a gated activation or a rotary embedding, and what only looks like one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from runtime.operators import kernels, recognize, replace_operators
from runtime.operators.recognize import Gate, Norm, gate_of, norm_of, rotary_forward
from tests.compiling import builds

ROOT = Path(__file__).parents[2]


def test_every_kernel_in_the_interpreter() -> None:
    """In a process of its own: Triton decides between interpreter and compiler when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/runtime/operators_suite.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_every_kernel_is_compiled_and_spills_nothing(capability: tuple[int, int]) -> None:
    def tensor(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    def launch() -> None:
        kernels.rms_norm(tensor(1, 7, 8192), tensor(8192), Norm("rounded", 1e-6))
        kernels.gated(tensor(1, 7, 14336), tensor(1, 7, 14336), "silu")
        kernels.rotary(tensor(1, 32, 7, 128), tensor(1, 8, 7, 128), tensor(1, 7, 128), tensor(1, 7, 128))

    found = builds(launch, (kernels,), capability)
    assert [each.name for each in found] == ["rms_norm_kernel", "gated_kernel", "rotary_kernel"]
    assert all(each.spills == 0 for each in found), found


class Almost(LlamaRMSNorm):
    """Adds what the formulas do not know: 1 to the weight after rounding; nothing to the variance; an offset."""

    kind = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "one":
            return super().forward(x) + super().forward(x) / self.weight
        if self.kind == "no eps":
            return self.weight * (x.float() * x.float().pow(2).mean(-1, keepdim=True).rsqrt()).to(x.dtype)
        if self.kind == "mean":
            return super().forward(x - x.mean(-1, keepdim=True))
        return super().forward(x)


@pytest.mark.parametrize("kind", ["", "one", "no eps", "mean"])
def test_a_norm_is_what_it_computes(kind: str) -> None:
    norm = Almost(64, eps=1e-5).bfloat16()
    norm.kind = kind
    assert norm_of(norm) == (None if kind else Norm("rounded", 1e-5))
    assert (norm.weight == 1).all(), "the probe has weights of its own"


class Clamped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x).clamp(-1, 1)
        return self.down_proj(self.act_fn(gate) * up)


class Twice(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


def mlp(kind: type[LlamaMLP], activation: str) -> LlamaMLP:
    return kind(SimpleNamespace(hidden_size=8, intermediate_size=16, mlp_bias=False, hidden_act=activation))


@pytest.mark.parametrize(
    ("kind", "activation", "wanted"),
    [
        (LlamaMLP, "silu", Gate("silu", "")),
        (LlamaMLP, "gelu_pytorch_tanh", Gate("gelu_tanh", "")),
        (LlamaMLP, "gelu", None),
        (LlamaMLP, "relu", None),
        (Clamped, "silu", None),
        (Twice, "silu", None),
    ],
)
def test_a_gate_is_what_it_computes(kind: type[LlamaMLP], activation: str, wanted: Gate | None) -> None:
    assert gate_of(mlp(kind, activation)) == wanted


class Joined(nn.Module):
    """One layer for both, the gate first or last."""

    def __init__(self, gate: int) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.gate = nn.Linear(8, 32), nn.Linear(16, 8), gate

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x).chunk(2, -1)
        result: Tensor = self.down_proj(both[1 - self.gate] * F.silu(both[self.gate]))
        return result


def test_a_layer_of_both_has_the_gate_first() -> None:
    assert gate_of(Joined(0)) == Gate("silu", "gate_up_proj")
    assert gate_of(Joined(1)) is None


def rotated(*arguments: Any, **keywords: Any) -> tuple[str, Any, Any]:
    return "ours", arguments, keywords


class Interleaved(LlamaAttention):
    forward = eval(  # the code of LlamaAttention with other names around it
        "type(f)(f.__code__, {**f.__globals__, 'apply_rotary_pos_emb': other}, f.__name__, f.__defaults__, f.__closure__)",
        {"f": LlamaAttention.forward, "other": lambda q, k, cos, sin: (q * cos[:, None], k * sin[:, None])},
    )


def test_a_rotary_embedding_is_what_it_computes() -> None:
    attention = LlamaAttention.__new__(LlamaAttention)
    forward = rotary_forward(attention, rotated)
    assert forward is not None
    original, *rest = forward.__func__.__globals__[recognize.ROTARY](1, 2, sin=3)[1]
    assert original is LlamaAttention.forward.__globals__[recognize.ROTARY]
    assert rest == [1, 2]
    assert rotary_forward(LlamaMLP.__new__(LlamaMLP), rotated) is None
    assert rotary_forward(Interleaved.__new__(Interleaved), rotated) is None


def test_nothing_is_replaced_on_a_gpu_in_float32() -> None:
    norm = nn.ModuleList([LlamaRMSNorm(64)])
    assert replace_operators(norm, torch.device("cuda"), torch.float32) == ""
    assert "forward" not in vars(norm[0])
