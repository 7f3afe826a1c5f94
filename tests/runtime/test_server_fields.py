"""Every field that OpenAI's, vLLM's and SGLang's clients send: used, harmless, or refused by name with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from runtime.errors import InvalidRequest
from runtime.request import SamplingParams
from runtime.server.errors import describe
from runtime.server.foreign_fields import AS_IT_IS, HARMLESS, REFUSED
from runtime.server.protocol import ChatRequest, CompletionRequest, GenerateRequest, NativeSampling, OpenAI

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
TEXT: dict[str, Any] = {"prompt": "x"}
USED = """
frequency_penalty logit_bias logprobs max_tokens n presence_penalty response_format seed stop stream stream_options temperature
top_p top_k min_p repetition_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
structured_outputs cache_salt regex ebnf no_stop_trim model
"""
VLLM = """
thinking_token_budget include_reasoning use_beam_search watermarking length_penalty spaces_between_special_tokens
truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words documents chat_template
media_io_kwargs mm_processor_kwargs priority request_id session_id return_tokens_as_token_ids return_token_ids
routed_experts_prompt_start return_token_offsets return_prompt_text kv_transfer_params ec_transfer_params vllm_xargs
repetition_detection stream_interval prompt_embeds user suffix guided_json guided_regex guided_choice guided_grammar
"""
SGLANG = """
return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details lora_path session_params
custom_params custom_logit_processor stop_regex stream_reasoning bootstrap_host bootstrap_port bootstrap_room routed_dp_rank
data_parallel_rank rid extra_key custom_labels max_thinking_tokens json_schema
"""
GENERATE = """
session_id input_embeds image_data audio_data video_data token_ids_logprob log_metrics return_hidden_states
return_routed_experts modalities session_params lora_path custom_logit_processor bootstrap_host routed_dp_rank conversation_id
require_reasoning priority extra_key no_logs custom_labels return_entropy return_prompt_token_ids
"""


def known(model: type[Any]) -> set[str]:
    return {*model.model_fields, *HARMLESS, *REFUSED}


def test_no_field_is_unknown() -> None:
    assert set(ChatParams.__annotations__) <= known(ChatRequest)
    assert set(CompletionParams.__annotations__) <= known(CompletionRequest)
    assert {*USED.split()} <= set(OpenAI.model_fields) | {"logprobs"}
    for model in (ChatRequest, CompletionRequest):
        assert {*VLLM.split(), *SGLANG.split()} <= known(model)
    assert set(GENERATE.split()) <= known(GenerateRequest)
    assert {"stop_regex", "structural_tag", "custom_params"} <= known(NativeSampling)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_asks_for_something_else_is_refused_by_name(name: str) -> None:
    model, body = (CompletionRequest, TEXT) if name not in CompletionRequest.model_fields else (ChatRequest, CHAT)
    asks = False if name in AS_IT_IS else ["x"]
    with pytest.raises(InvalidRequest, match=rf"{name} cannot be served: \w.*\.$"):
        model.model_validate({**body, name: asks}).params({})
    for nothing in (None, AS_IT_IS.get(name, [])):
        model.model_validate({**body, name: nothing}).params({})


@pytest.mark.parametrize("name", sorted(HARMLESS - {"rid"}))
def test_a_harmless_field_changes_nothing(name: str) -> None:
    plain = CompletionRequest.model_validate(TEXT).params({})
    assert CompletionRequest.model_validate({**TEXT, name: "x"}).params({}) == plain
    GenerateRequest.model_validate({"text": "x", name: "x"}).params({})


@pytest.mark.parametrize(("name", "meant"), [("temprature", "temperature"), ("top-k", "top_k"), ("echos", "echo")])
def test_a_misspelt_field_is_corrected(name: str, meant: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is not a known field. Did you mean {meant}"):
        CompletionRequest.model_validate({**TEXT, name: 1}).params({})


def native(**sampling: Any) -> SamplingParams:
    return GenerateRequest.model_validate({"text": "x", "sampling_params": sampling}).params({})


def test_sglangs_spellings() -> None:
    params = native(min_new_tokens=3, sampling_seed=5, max_new_tokens=9, no_stop_trim=True)
    assert (params.min_tokens, params.seed, params.max_tokens) == (3, 5, 9)
    assert params.include_stop_str_in_output
    salted = GenerateRequest.model_validate({"text": "x", "cache_salt": "s"}).params({})
    assert (salted.cache_salt, salted.max_tokens) == ("s", 128)


@pytest.mark.parametrize("token", ["a", "-1", "1_0", "\u0663", "9" * 5000, ""])
def test_a_bias_is_for_token_ids(token: str) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias: keys are token ids"):
        CompletionRequest.model_validate({**TEXT, "logit_bias": {token: 1}}).params({})


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("logit_bias: keys are token ids, not 'a'.", "logit_bias"),
        ("prompt is empty.", "prompt"),
        ("max_tokens must be 0 or more, not -1", "max_tokens"),
        ("99999 is not a token id of this model (0 to 4095).", None),
        ("the prompt is empty: it has no token.", None),
    ],
)
def test_an_error_names_its_field(message: str, param: str | None) -> None:
    assert describe(InvalidRequest(message)) == (400, message, None, param)


def test_what_asks_for_nothing_is_no_mistake() -> None:
    assert ChatRequest.model_validate({**CHAT, "top_logprobs": 0}).params({}).logprobs is None
    with pytest.raises(InvalidRequest, match="top_logprobs needs logprobs"):
        ChatRequest.model_validate({**CHAT, "top_logprobs": 2}).params({})
    assert ChatRequest.model_validate({**CHAT, "max_tokens": 5, "max_completion_tokens": 7}).params({}).max_tokens == 7
    assert CompletionRequest.model_validate({**TEXT, "logit_bias": {"5": 10**6}}).params({}).logit_bias == {5: 100}
