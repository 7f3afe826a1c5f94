"""Which layers the engine multiplies at once, and that its answers are those of the tree that it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attention.hf import NAME, record_layers
from attention.inputs import SharedInputs
from quant.dense import DenseLinear
from quant.linear import QuantLinear
from runtime import LLM, SamplingParams
from tests.awq_writer import write_awq
from tests.tiny_models import VOCABULARY, tiny_model

PROMPTS = [[(7 * place + 3 * i * i) % VOCABULARY for i in range(length)] for place, length in enumerate((11, 3, 40))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
QKV, GATE_UP = "q_proj + k_proj + v_proj", "gate_proj + up_proj"


def answers(path: str, **options: Any) -> tuple[LLM, list[Any]]:
    llm = LLM(path, skip_tokenizer_init=True, **options)
    return llm, [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("path", ["demo", "demo-bf16"])
def test_the_same_answers_as_unfused(path: str) -> None:
    fused, ours = answers(path)
    plain, theirs = answers(path, fuse=False)
    assert f"8 x {QKV}; 8 x {GATE_UP}" in fused.engine.report
    assert QKV not in plain.engine.report
    kind = QuantLinear if path == "demo" else DenseLinear
    joined = [m for m in fused.engine.loaded.model.modules() if isinstance(m, kind) and m.siblings is not None]
    assert len(joined) == 8 * 5
    if path == "demo":
        assert ours == theirs  # to the last bit
    else:
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]


def test_dense_layers_are_left_to_torch_if_asked() -> None:
    heads: dict[bool, Any] = {}
    for native in (True, False):
        llm, heads[native] = answers("demo", native=native)
        head = llm.engine.loaded.model.get_output_embeddings()
        assert isinstance(head, DenseLinear) == native
        assert ("1 dense linear layers: C" in llm.engine.report) == native
        assert head.weight is llm.engine.loaded.model.get_input_embeddings().weight  # nothing is kept twice
    assert [tokens for tokens, _ in heads[True]] == [tokens for tokens, _ in heads[False]]


def test_quantized_while_loading_with_biases(tmp_path: Path) -> None:
    """Layers come one by one, their biases later."""
    model = tiny_model("qwen2", hidden_size=64, intermediate_size=96)
    model.save_pretrained(tmp_path)
    options = {"quantization": "int4", "quantization_config": {"group_size": 32}, "dtype": "float32"}
    fused, ours = answers(str(tmp_path), **options)
    _, theirs = answers(str(tmp_path), fuse=False, **options)
    assert QKV in fused.engine.report
    assert ours == theirs


def test_only_layers_of_one_kind(tmp_path: Path) -> None:
    """k_proj stays dense in the file, and what is left is joined."""
    write_awq(
        tiny_model("llama", hidden_size=64, intermediate_size=96),
        tmp_path,
        group=32,
        dense=("lm_head", "model.layers.0.self_attn.k_proj"),
    )
    fused, ours = answers(str(tmp_path), dtype="float32")
    _, theirs = answers(str(tmp_path), dtype="float32", fuse=False)
    assert "1 x q_proj + v_proj;" in fused.engine.report
    assert ours == theirs


class Writing(nn.Module):
    """Three layers, and a change of their input in between; or a view of what they give."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view = view
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        a, b = self.a(x), self.b(x)
        x.mul_(2)
        return (a.view(-1) if self.view else a.flatten()) + b.flatten() + self.c(x).flatten()


def test_an_input_that_is_written_to_is_another_one() -> None:
    model = Writing(view=False).to("meta")
    inputs = SharedInputs(model)
    with torch.no_grad(), inputs.watched():
        model(torch.empty(2, 8, device="meta"))
    assert inputs.siblings == [("a", "b")]


def test_code_that_cannot_take_slices_has_no_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = SharedInputs(model := Writing(view=True).to("meta"))
    with torch.no_grad(), inputs.watched(), pytest.raises(RuntimeError):
        model(torch.empty(2, 8, device="meta"))

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM._from_config(config, attn_implementation=NAME)
    assert len(record_layers(llama, siblings=True).siblings) == 2
    activation = llama.model.layers[0].mlp.act_fn
    monkeypatch.setattr(activation, "forward", lambda x: x.view(-1).view(x.shape))
    assert record_layers(llama, siblings=True).siblings == []
