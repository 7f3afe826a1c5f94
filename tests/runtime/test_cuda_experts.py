"""Quantized experts, and models quantized while they load, on a GPU, where there is one: what the CPU computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.linear import QuantLinear
from runtime import LLM, SamplingParams, load_model
from tests.families import FAMILIES
from tests.moe_writer import MODELS, SIZES, moe_model, write_moe, write_mxfp4
from tests.runtime.test_experts import OSS
from tests.runtime.test_onload import LAYERS, WAYS
from tests.tiny_models import VOCABULARY, tiny_model

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

RELATIVE = 1e-4
"""Of the largest logit: float32 sums in another order, on two devices. A wrong code moves them a thousand times as far."""

IDS = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(0))
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def logits(folder: Path, device: str, **options: Any) -> Tensor:
    model = load_model(folder, device=device, dtype="float32", weight_only=True, **options)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers
    for layer in layers:
        assert layer.quant_weight is not None
        assert layer.quant_weight.device.type == device
    with torch.inference_mode():
        return model(IDS.to(device)).logits.float().cpu()


def assert_as_on_the_cpu(folder: Path, **options: Any) -> None:
    on_cpu, on_gpu = (logits(folder, device, **options) for device in ("cpu", "cuda"))
    assert (on_gpu - on_cpu).abs().max() < RELATIVE * on_cpu.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_every_format(family: str, tmp_path: Path) -> None:
    write_moe(moe_model("qwen3_moe"), tmp_path, FAMILIES[family])
    assert_as_on_the_cpu(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_experts_of_every_architecture(name: str, tmp_path: Path) -> None:
    write_moe(moe_model(name), tmp_path, FAMILIES["fp8-block"])
    assert_as_on_the_cpu(tmp_path)


@pytest.mark.parametrize("family", ["awq", "fp8-block", "mxfp4"])
def test_the_engine_serves_experts_as_on_the_cpu(family: str, tmp_path: Path) -> None:
    """By graphs where the model allows it; of mxfp4, gpt-oss' stacks."""
    if family == "mxfp4":
        write_mxfp4(tiny_model("gpt_oss", **SIZES, **OSS), tmp_path)
    else:
        write_moe(moe_model("qwen3_moe"), tmp_path, FAMILIES[family])
    options = {"dtype": "float32", "weight_only": True, "skip_tokenizer_init": True, "max_num_batched_tokens": 8}
    prompts = [IDS[0].tolist(), IDS[1, :5].tolist(), [7]]
    answers = [
        [
            output.outputs[0].token_ids
            for output in LLM(str(tmp_path), device=device, **options).generate(prompts, GREEDY)
        ]
        for device in ("cpu", "cuda")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize(("name", "options"), WAYS)
def test_what_is_quantized_while_it_loads(model: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if name == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    tiny_model(model).save_pretrained(tmp_path)
    assert_as_on_the_cpu(tmp_path, quantization=name, quantization_config=options)
