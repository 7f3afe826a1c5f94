"""Fields of OpenAI, SGLang and vLLM that are no parameters here: what changes nothing about an answer is accepted, what would
change it is refused with what to do instead. Nothing is accepted and ignored that asks for something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "verbosity", "request_id", "rid", "session_id", "conversation_id", "log_metrics", "no_logs",
        "spaces_between_special_tokens",
    }
)  # fmt: skip
"""Change nothing about an answer given here."""

NO_TENSORS = "tensors are not accepted from requests"
NO_CODE = "code is not accepted from requests"
TEXT_ONLY = "text only"
ONE_SERVER = "one server serves each request, from its prompt to its end"
NO_IDS = "ids are returned by /generate, and by /tokenize"

REFUSED: Mapping[str, str] = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": TEXT_ONLY,
    "modalities": TEXT_ONLY,
    "moderation": "nothing is moderated here",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "this server fetches nothing",
    "suffix": "filling in the middle is not supported",
    "chat_template": "templates are chosen by the operator (--chat-template)",
    "documents": "put them into messages",
    "lora_path": "adapters are not supported",
    "image_data": TEXT_ONLY,
    "audio_data": TEXT_ONLY,
    "video_data": TEXT_ONLY,
    "media_io_kwargs": TEXT_ONLY,
    "mm_processor_kwargs": TEXT_ONLY,
    "input_embeds": NO_TENSORS,
    "prompt_embeds": NO_TENSORS,
    "custom_logit_processor": NO_CODE,
    "custom_params": NO_CODE,
    "logits_processors": NO_CODE,
    "vllm_xargs": NO_CODE,
    "token_ids_logprob": "top_logprobs_num gives the likeliest tokens",
    "logprob_token_ids": "top_logprobs gives the likeliest tokens",
    "prompt_logprobs": "use echo with logprobs, on /v1/completions",
    "echo": "it is for /v1/completions",
    "add_special_tokens": "the chat template writes them",
    "truncate_prompt_tokens": "shorten the prompt",
    "truncation_side": "shorten the prompt",
    "allowed_token_ids": "use logit_bias, or structured_outputs",
    "bad_words": "use logit_bias",
    "stop_regex": "use stop",
    "structural_tag": "use tools, or structured_outputs",
    "json_schema": "use response_format",
    "use_beam_search": "tokens are sampled, not searched",
    "length_penalty": "tokens are sampled, not searched",
    "watermarking": "tokens are not marked",
    "repetition_detection": "use repetition_penalty or frequency_penalty",
    "priority": "requests are served first come, first served",
    "stream_interval": "pieces are sent as they come, at most 60 a second",
    "include_reasoning": "thoughts are in reasoning_content, which need not be read",
    "stream_reasoning": "thoughts are streamed as they come",
    "thinking_token_budget": "use max_tokens",
    "max_thinking_tokens": "use max_tokens",
    "require_reasoning": "pass what the model's template knows in chat_template_kwargs",
    "extra_key": "use cache_salt",
    "custom_labels": "metrics have the labels that they have",
    "session_params": "send the whole prompt; its cached prefix is found",
    "return_token_ids": NO_IDS,
    "return_tokens_as_token_ids": NO_IDS,
    "return_prompt_token_ids": NO_IDS,
    "return_token_offsets": NO_IDS,
    "return_prompt_text": "use echo, on /v1/completions",
    "return_cached_tokens_details": "usage has the number of cached tokens",
    "return_hidden_states": "only log-probabilities are returned",
    "return_entropy": "only log-probabilities are returned",
    "return_routed_experts": "experts are not reported",
    "routed_experts_start_len": "experts are not reported",
    "routed_experts_prompt_start": "experts are not reported",
    **dict.fromkeys(
        ("kv_transfer_params", "ec_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"), ONE_SERVER
    ),
    **dict.fromkeys(("data_parallel_rank", "routed_dp_rank"), ONE_SERVER),
    **{f"guided_{form}": f"use structured_outputs with {form}" for form in ("json", "regex", "choice", "grammar")},
    "guided_decoding_backend": "grammars are llguidance's",
    "guided_whitespace_pattern": "put it into the grammar",
}
"""Would change the answer, and why they cannot be served."""

EMPTY: tuple[Any, ...] = (None, [], {}, False, 0, "", "none", ["text"])
"""Values that ask for nothing, whatever the field; but for these, which ask for what is done anyway:"""
AS_IT_IS: Mapping[str, Any] = {
    "length_penalty": 1, "stream_interval": 1, "include_reasoning": True, "stream_reasoning": True,
}  # fmt: skip


def refusal(name: str, value: Any) -> str | None:
    """Why a field cannot be served; ``None`` if it is nobody else's field, or asks for nothing."""
    neutral = (None, AS_IT_IS[name]) if name in AS_IT_IS else EMPTY
    return None if value in neutral else REFUSED.get(name)
