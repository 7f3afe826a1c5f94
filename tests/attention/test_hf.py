"""Unmodified Transformers models over our pages, against each sequence alone through eager attention."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from attention import (
    NAME,
    AttentionBatch,
    AttentionError,
    AttentionSpec,
    KVCache,
    UnsupportedAttention,
    forward_batch,
    hf,
    length_dependent_rope,
    read_specs,
    record_specs,
)
from attention.reference import ReferenceBackend
from tests.attention.serving import Step, alone, relative_error, serve
from tests.tiny_models import ARCHITECTURES, CHUNK, VOCABULARY, WINDOW, tiny_config, tiny_model

TOLERANCE = 2e-4
BITE = 1e-3

LENGTHS = [11, 13, 1, 7]
PROMPTS = [random.Random(length).choices(range(3, VOCABULARY), k=length) for length in LENGTHS]
PACKED: list[Step] = [dict(enumerate(LENGTHS))]
MIXED: list[Step] = [{1: 6, 0: 4}, {0: 1, 3: 5, 1: 5}, {2: 1, 3: 1, 0: 1, 1: 1}, {0: 5, 3: 1}, {1: 1}]


class Forgetful(ReferenceBackend):
    """Forgets one thing that the specs ask for."""

    def __init__(self, forgotten: str) -> None:
        self.forgotten: dict[str, Any] = {forgotten: False if forgotten == "sinks" else None}

    def forward(self, call: int, spec: AttentionSpec, *rest: Any) -> Tensor:
        *rest, sinks = rest
        return super().forward(
            call, replace(spec, **self.forgotten), *rest, None if "sinks" in self.forgotten else sinks
        )


@cache
def specs_of(name: str) -> list[AttentionSpec]:
    return read_specs(tiny_config(name))


@cache
def alone_logits(name: str) -> list[Tensor]:
    eager = tiny_model(name, "eager")
    return [alone(eager, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_each_sequence_alone(name: str) -> None:
    model = tiny_model(name, NAME)
    for steps in (PACKED, MIXED):
        for got, wanted in zip(serve(model, specs_of(name), PROMPTS, steps), alone_logits(name), strict=True):
            assert relative_error(got, wanted) < TOLERANCE


OPTIONS = [
    ("mistral", "window"),
    ("qwen2_moe", "window"),
    ("gemma2", "window"),
    ("gemma2", "softcap"),
    ("gemma3", "window"),
    ("cohere2", "window"),
    ("gpt_oss", "window"),
    ("gpt_oss", "sinks"),
    ("phimoe", "window"),
    ("llama4", "chunk"),
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_forgetting_an_option_would_be_noticed(name: str, option: str) -> None:
    logits = serve(tiny_model(name, NAME), specs_of(name), PROMPTS, PACKED, Forgetful(option))
    assert max(map(relative_error, logits, alone_logits(name))) > BITE


def test_every_option_of_every_architecture_is_forgotten_above() -> None:
    options = ("window", "chunk", "softcap", "sinks")
    asked = {(name, o) for name in ARCHITECTURES for spec in specs_of(name) for o in options if getattr(spec, o)}
    assert asked == set(OPTIONS)


def test_sequences_would_leak_into_each_other_if_they_were_one() -> None:
    joined = PROMPTS[0] + PROMPTS[1]
    (logits,) = serve(tiny_model("llama", NAME), specs_of("llama"), [joined], [{0: len(joined)}])
    assert relative_error(logits[len(PROMPTS[0]) :], alone_logits("llama")[1]) > BITE


def test_llama4_scales_queries_by_position_and_not_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.serving.tempers_rows", lambda module: False)
    logits = serve(tiny_model("llama4", NAME), specs_of("llama4"), PROMPTS, MIXED)
    assert max(map(relative_error, logits, alone_logits("llama4"))) > BITE


# What a recording says ------------------------------------------------------------------------------------------------


def test_specs_come_in_call_order_with_what_each_layer_asks() -> None:
    sliding = AttentionSpec(4, 2, 8, 8, scale=5**-0.5, window=WINDOW, softcap=0.7)
    assert read_specs(tiny_config("gemma2")) == [sliding, replace(sliding, window=None), sliding]


def test_dimensions_are_those_of_the_tensors_not_of_the_config() -> None:
    (spec,) = set(read_specs(tiny_config("deepseek_v3")))
    assert spec == AttentionSpec(4, 1, 16 + 4, 16, scale=12**-0.5, latent=True)


def test_windows_and_chunks_that_only_a_mask_carries_are_found() -> None:
    assert {spec.window for spec in read_specs(tiny_config("phimoe"))} == {WINDOW}
    assert [spec.window for spec in read_specs(tiny_config("qwen2_moe"))] == [WINDOW, None, WINDOW]
    assert [spec.chunk for spec in read_specs(tiny_config("llama4"))] == [CHUNK, None, CHUNK]


def test_a_window_in_the_config_that_no_layer_uses_is_not_a_window() -> None:
    config = tiny_config("qwen2", use_sliding_window=False, sliding_window=WINDOW)
    assert {spec.window for spec in read_specs(config)} == {None}


def test_two_calls_in_one_layer_are_two_specs() -> None:
    assert len(read_specs(tiny_config("diffllama"))) == 2 * 3


def test_reading_leaves_the_config_as_it_was() -> None:
    config = tiny_config("llama", quantization_config={"quant_method": "awq", "bits": 4})
    before = config.to_dict()
    read_specs(config)
    assert config.to_dict() == before
    assert config._attn_implementation != NAME


@pytest.mark.parametrize("name", ["mixtral", "phi3", "gpt2"])
def test_recording_leaves_a_model_as_it_was(name: str) -> None:
    """Not on the meta device and in training mode, with stubbed parts: experts, long-context rotary, padding check."""
    model = tiny_model(name, NAME).train()
    next(model.modules()).eval()
    instance = {path: dict(module.__dict__) for path, module in model.named_modules()}
    tensors = {key: tensor.clone() for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
    record_specs(model)
    for path, module in model.named_modules():
        assert module.__dict__.keys() == instance[path].keys()
        assert module.training == instance[path]["training"]
        assert getattr(module, "rope_type", None) == instance[path].get("rope_type")
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, tensors[key])


def test_no_mask_function_is_registered_after_a_recording() -> None:
    read_specs(tiny_config("llama"))
    assert NAME not in hf.AttentionMaskInterface._global_mapping


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}


def test_long_rotary_embeddings_are_recorded_and_named() -> None:
    config = tiny_config("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    assert len(read_specs(config)) == 3
    assert length_dependent_rope(config) == ("longrope", 16)
    dynamic = tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert len(read_specs(dynamic)) == 3
    assert length_dependent_rope(dynamic) == ("dynamic", 128)
    assert length_dependent_rope(tiny_config("llama-tied-rope3")) is None
    assert length_dependent_rope(tiny_config("gemma3")) is None
    assert length_dependent_rope(tiny_config("gpt2")) is None


# Refusals before any weight is read -----------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("mamba", {}, "2 of its layers keep a recurrent state"),
        # Its states are in its modules; caches of Transformers 5.17 do not know of them, and its calls are too few.
        ("recurrent_gemma", {}, r"LinearAttentionLayer\), which is not kept per sequence|has attention of its own"),
        ("bert", {}, r"bert\.encoder\.layer\.0\.attention\.self \(BertSelfAttention\): it is not causal"),
        ("llama", {"is_causal": False}, r"model\.layers\.0\.self_attn .*: it is not causal"),
        ("falcon", {"alibi": True}, "falcon: its attention has classes of its own"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "takes no position_ids"),
        ("bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, "takes no position_ids"),
        ("roberta", {"is_decoder": True}, "count from its padding index"),
        ("codegen", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, "has attention of its own"),
        ("doge", {}, r"model\.layers\.0\.self_attn .*brings an attention mask of its own"),
    ],
)
def test_models_that_would_be_wrong_are_refused(model_type: str, options: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(model_type, **{**SMALL, **options})
    with pytest.raises(UnsupportedAttention, match=reason):
        read_specs(config)


def test_fewer_calls_than_layers_are_refused() -> None:
    model = tiny_model("llama", NAME)
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedAttention, match="its 5 layers call the attention function only 3 times"):
        record_specs(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"invented": 1}, "argument 'invented' is not supported"),
        ({"sliding_window": 4}, "it is told a window of 4, but its mask has None"),
    ],
)
def test_a_layer_that_asks_for_more_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    model = tiny_model("llama", NAME)
    layer = model.model.layers[1].self_attn
    layer.forward = partial(layer.forward, **options)
    with pytest.raises(UnsupportedAttention, match=rf"LlamaForCausalLM: model\.layers\.1\.self_attn .*: {reason}"):
        record_specs(model)


def counting(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    torch.arange(hidden_states.shape[1])
    return attend_as_llama(self, hidden_states, *args, **kwargs)


def copying(self: nn.Module, *args: Any, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    mask = None if attention_mask is None else attention_mask.clone()
    return attend_as_llama(self, *args, attention_mask=mask, **kwargs)


attend_as_llama = LlamaAttention.forward


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (counting, "it numbers the tokens of a forward by itself"),
        (copying, "it makes or changes its attention mask by itself"),
    ],
)
def test_attention_that_counts_or_masks_by_itself_is_refused(
    forward: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(UnsupportedAttention, match=rf"model\.layers\.0\.self_attn .*: {reason}"):
        read_specs(tiny_config("llama"))


def test_whatever_fails_without_data_is_chained() -> None:
    model = tiny_model("llama", NAME)
    model.model.norm.forward = None
    with pytest.raises(UnsupportedAttention, match="a forward without data failed") as raised:
        record_specs(model)
    assert isinstance(raised.value.__cause__, TypeError)


# Refusals of single calls ---------------------------------------------------------------------------------------------


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama", NAME)


def batch_of(count: int) -> AttentionBatch:
    return AttentionBatch.pack([count], [count], [list(range(count))], 1)


def call(module: nn.Module, **options: Any) -> Tensor:
    """One attention call of 3 tokens, as the spec of the tiny llama has it."""
    specs = specs_of("llama")[:1]
    rows = options.pop("rows", 1)
    q, k, v = torch.ones(rows, 4, 3, 8), torch.ones(rows, 2, 3, 8), torch.ones(rows, 2, 3, 8)
    with forward_batch(batch_of(3), KVCache(specs, 3, 1, torch.float32, "cpu"), ReferenceBackend(), specs):
        out, weights = hf.attention(
            module, q, k, v, options.pop("attention_mask", None), **{"scaling": 8**-0.5, **options}
        )
    assert weights is None
    return out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"invented": 1}, "argument 'invented' is not supported: nothing here knows its meaning"),
        ({"position_bias": torch.ones(1)}, "argument 'position_bias' is not supported: a bias is added"),
        ({"indices": torch.ones(1)}, "argument 'indices' is not supported: an indexer selects the keys"),
        ({"block_indices": torch.ones(1)}, "argument 'block_indices' is not supported: an indexer selects blocks"),
        ({"output_attentions": True}, "argument 'output_attentions' is not supported"),
        ({"is_causal": False}, "it is not causal"),
        ({"dropout": 0.1}, "dropout is 0.1: the model is in training mode"),
        ({"rows": 2}, "a batch of 2, but sequences must be packed"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "it brings an attention mask"),
    ],
)
def test_a_call_that_asks_for_more_is_refused(llama: PreTrainedModel, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedAttention, match=rf"attention call 0 \(LlamaAttention, layer 1\): {reason}"):
        call(llama.model.layers[1].self_attn, **options)


def test_a_module_that_is_not_causal_is_refused(llama: PreTrainedModel) -> None:
    module = llama.model.layers[0].self_attn
    module.is_causal = False
    with pytest.raises(UnsupportedAttention, match="it is not causal"):
        call(module)


def test_harmless_and_absent_arguments_pass(llama: PreTrainedModel) -> None:
    out = call(
        llama.model.layers[0].self_attn,
        position_ids=torch.arange(3),
        use_cache=False,
        is_causal=True,
        output_attentions=False,
        sliding_window=None,
        invented=None,
    )
    assert out.shape == (1, 3, 4, 8)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    "options",
    [{"sliding_window": 4}, {"softcap": 30.0}, {"scaling": 0.5}, {"s_aux": torch.ones(4)}],
    ids=lambda o: next(iter(o)),
)
def test_a_call_that_differs_from_the_recorded_one_is_an_error(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    with pytest.raises(
        AttentionError, match=r"attention call 0 \(LlamaAttention, layer 0\): it is .*, but .* was recorded"
    ):
        call(llama.model.layers[0].self_attn, **options)


# The forward as a whole -----------------------------------------------------------------------------------------------


def test_outside_of_a_batch_the_error_says_what_to_do(llama: PreTrainedModel) -> None:
    with pytest.raises(AttentionError, match=r"load it with load_model\(\.\.\., attn_implementation='sdpa'\)"):
        llama(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("recorded", "reason"), [(2, "the recorded forward made only 2 calls"), (4, "made 3 attention calls")]
)
def test_another_number_of_calls_than_recorded_is_an_error(llama: PreTrainedModel, recorded: int, reason: str) -> None:
    specs = (specs_of("llama") * 2)[:recorded]
    with pytest.raises(AttentionError, match=reason):
        serve(llama, specs, [PROMPTS[0]], [{0: 11}])


def test_another_number_of_tokens_than_in_the_batch_is_an_error(llama: PreTrainedModel) -> None:
    specs = specs_of("llama")
    cache = KVCache(specs, 8, 1, torch.float32, "cpu")
    with (
        pytest.raises(AttentionError, match="4 tokens came, the batch describes 3"),
        forward_batch(batch_of(3), cache, ReferenceBackend(), specs),
    ):
        llama(torch.ones(1, 4, dtype=torch.long), use_cache=False)


def test_a_failing_forward_fails_with_its_own_error_and_leaves_nothing_behind(llama: PreTrainedModel) -> None:
    specs = specs_of("llama")
    cache = KVCache(specs, 8, 1, torch.float32, "cpu")
    with pytest.raises(ZeroDivisionError), forward_batch(batch_of(3), cache, ReferenceBackend(), specs):
        raise ZeroDivisionError
    assert hf._current.get() is None
