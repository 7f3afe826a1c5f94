"""Every committed checkpoint on a GPU, where there is one: what the CPU computes, and what its writer computes.

python -m pytest -m cuda tests/runtime/test_cuda.py tests/runtime/test_cuda_formats.py
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant.base import WeightKind
from quant.linear import QuantLinear
from quant.reference import dequantize
from runtime import LLM, load_model
from tests.formats import CASES, Case
from tests.quant.test_formats import WITH_LOGITS

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

RELATIVE = 1e-4
"""Of the largest logit: float32 sums in another order, on two devices. A wrong code moves them a thousand times as far."""

IDS = torch.arange(48).view(2, 24) * 10


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert layers
    return layers


def logits(case: Case, device: str, dtype: str, ids: Tensor, weight_only: bool | None) -> Tensor:
    model = load_model(case.folder, device=device, dtype=dtype, weight_only=weight_only)
    for layer in quantized(model).values():
        assert layer.quant_weight is not None
        assert layer.quant_weight.device.type == device
    with torch.inference_mode():
        return model(ids.to(device)).logits.float().cpu()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.checkpoint)
def test_logits_in_float32_are_those_of_the_cpu(case: Case) -> None:
    """Weights alone: a device's rounding moves codes of inputs."""
    on_cpu, on_gpu = (logits(case, device, "float32", IDS, weight_only=True) for device in ("cpu", "cuda"))
    assert (on_gpu - on_cpu).abs().max() < RELATIVE * on_cpu.abs().max()


@pytest.mark.parametrize("case", [case for case in WITH_LOGITS if not case.inputs], ids=lambda case: case.checkpoint)
def test_logits_are_those_of_the_writer(case: Case) -> None:
    reference = load_file(case.reference)
    found = logits(case, "cuda", "float32", reference["input_ids"], weight_only=True)
    assert case.tolerance is not None
    assert (found - reference["logits"].float()).abs().max() < case.tolerance


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.checkpoint)
def test_layers_whose_inputs_are_quantized_compute_what_they_compute_on_the_cpu(case: Case) -> None:
    """Layer by layer, on the same inputs: through a whole model any rounding moves codes, and no bound is tight. One code of
    a row of int8 inputs may still move, where a quotient lies between two."""
    options = {"dtype": "float32", "weight_only": False}
    on_cpu = quantized(load_model(case.folder, device="cpu", kernel="reference", **options))
    on_gpu = quantized(load_model(case.folder, device="cuda", **options))
    executed = [name for name, layer in on_cpu.items() if layer.scheme.activation]
    assert executed or not case.inputs
    for name in executed:
        x = torch.randn(5, on_cpu[name].in_features) * torch.logspace(-2, 1, 5)[:, None]
        expected, found = on_cpu[name](x), on_gpu[name](x.cuda()).cpu()
        allowed = RELATIVE * expected.abs().max()
        if on_cpu[name].scheme.activation.kind is WeightKind.INT8:
            weight = dequantize(on_cpu[name].quant_weight)
            allowed = allowed + x.abs().amax(1, keepdim=True) / 127 * weight.abs().max()
        assert ((found - expected).abs() < allowed).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.checkpoint)
def test_the_engine_scores_as_on_the_cpu(case: Case) -> None:
    """In chunks, over pages, through the kernels and the attention that are chosen there."""
    options = {"dtype": "float32", "kv_cache_dtype": "fp32", "weight_only": True, "skip_tokenizer_init": True}
    scores = [
        LLM(str(case.folder), device=device, max_num_batched_tokens=16, max_total_tokens=256, **options).score(
            IDS.flatten().tolist()
        )
        for device in ("cpu", "cuda")
    ]
    on_cpu, on_gpu = (torch.tensor(score.logprobs[1:], dtype=torch.float64) for score in scores)
    assert (on_gpu - on_cpu).abs().max() < 1e-3
