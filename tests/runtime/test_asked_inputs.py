"""``--activation-quantization int8``: inputs rounded because somebody asked, never otherwise, and the report says who."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.activation import quantize_dequantize
from quant.base import Activation, WeightKind
from quant.linear import QuantLinear
from runtime import LLM, SamplingParams, inspect, load_model
from runtime.errors import LoadError
from runtime.verify import verify
from tests.formats import CHECKPOINTS

IDS = torch.tensor([[5, 17, 40, 3, 88, 21, 9, 60]])
ASKED: dict[str, Any] = {"activation_quantization": "int8"}
PER_TOKEN = Activation(WeightKind.INT8)


def layers_of(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("autoawq--gemm-g128", Activation(WeightKind.INT8, group=128)),
        ("auto-gptq--w4g32-desc", PER_TOKEN),  # groups are not of neighbours
        ("auto-gptq--w3g32-asym", Activation(WeightKind.INT8, group=32)),
        ("compressed-tensors--w3a16-g64-asym", Activation(WeightKind.INT8, group=64)),
    ],
)
def test_inputs_of_every_layer_of_integers_are_rounded(name: str, how: Activation) -> None:
    def rounded(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (quantize_dequantize(inputs[0], how, None, None),)

    options: dict[str, Any] = {"dtype": "float32", "kernel": "reference"}
    found, plain = load_model(CHECKPOINTS / name, **options, **ASKED), load_model(CHECKPOINTS / name, **options)
    assert {layer.scheme.activation for layer in layers_of(found)} == {how}
    assert {layer.scheme.activation for layer in layers_of(plain)} == {None}
    with torch.inference_mode():
        exact = plain(IDS).logits
        for layer in layers_of(plain):
            layer.register_forward_pre_hook(rounded)
        torch.testing.assert_close(found(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (found(IDS).logits - exact).abs().max() > 1e-3, "the test would not notice exact inputs"


def test_the_engine_says_who_asked() -> None:
    llm = LLM("demo", max_total_tokens=64, **ASKED)
    assert (
        "linear layers quantized, as --activation-quantization asks, not the checkpoint: int8 per 128 inputs"
        in llm.report
    )
    assert "--activation-quantization" not in LLM("demo", max_total_tokens=64).report
    (output,) = llm.generate(["import "], SamplingParams(temperature=0, max_tokens=4))
    assert len(output.outputs[0].token_ids) == 4
    assert "int8 per 128 inputs" in str(inspect("demo", **ASKED))


def test_it_is_verified_like_what_a_checkpoint_asks_for() -> None:
    assert verify("demo", **ASKED).passed


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("compressed-tensors--mxfp4a16", ASKED, "no layer has weights of integers and inputs that are left alone"),
        ("llmcompressor--w8a8-int8", ASKED, "no layer has weights of integers and inputs that are left alone"),
        ("autoawq--gemm-g128", {"activation_quantization": "fp8"}, "fp8: unknown; choose one of int8"),
        ("autoawq--gemm-g128", ASKED | {"weight_only": True}, "give one of them"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        inspect(CHECKPOINTS / name, **options)


def test_a_dense_checkpoint_has_no_integers() -> None:
    with pytest.raises(LoadError, match="no layer has weights of integers"):
        inspect("demo-bf16", **ASKED)
    assert "int8 per 128 inputs" in str(inspect("demo-bf16", quantization="int4", **ASKED))
