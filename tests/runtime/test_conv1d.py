"""GPT-2's ``Conv1D``, a linear layer whose dense weight is ``[in, out]``, in quantized checkpoints (GPTQ:
``test_loader_gptq.py``; quantized while loading: ``test_onload.py``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quant.linear import QuantLinear
from quant.reference import dequantize
from runtime import LLM, SamplingParams, inspect, load_model
from tests.awq_writer import write_awq
from tests.tiny_models import tiny_model

IDS = torch.arange(12).reshape(1, 12)


def test_awq_through_the_model_and_the_engine(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    write_awq(model, tmp_path)
    assert len(inspect(tmp_path).plan.quantized) == 12
    with torch.inference_mode():
        expected = model(IDS).logits
        logits = load_model(tmp_path, dtype="float32")(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    llm = LLM(tmp_path, dtype="float32", skip_tokenizer_init=True, max_total_tokens=256, startup_check=False)
    found = llm.generate([IDS[0].tolist()], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    assert found[0].outputs[0].token_ids == [int(expected[0, -1].argmax())]


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_bitsandbytes_as_transformers_writes_it(options: dict[str, bool | str], tmp_path: Path) -> None:
    """It stores ``[out, in]``, unlike the dense weight. Written, then loaded by both."""
    dense, stored = tmp_path / "dense", tmp_path / "stored"
    tiny_model("gpt2", hidden_size=64, n_embd=64).save_pretrained(dense)  # bitsandbytes fails on a CPU with 32 inputs
    written = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitsAndBytesConfig(**options))
    written.save_pretrained(stored)
    ours = load_model(stored, dtype="float32", kernel="reference")
    now = load_model(
        dense, dtype="float32", kernel="reference", quantization="bitsandbytes", quantization_config=options
    )
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 12
    for name, layer in layers.items():
        theirs = written.get_submodule(name).weight
        if "load_in_4bit" in options:
            expected = dequantize_4bit(theirs.data, theirs.quant_state)
        else:
            expected = theirs.data.float() * (theirs.SCB[:, None] / 127)
        assert layer.quant_weight is not None
        assert torch.equal(dequantize(layer.quant_weight), expected)
        assert torch.equal(dequantize(now.get_submodule(name).quant_weight), expected)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.equal(now(IDS).logits, ours(IDS).logits)
