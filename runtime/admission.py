"""Whether a request can ever be served by this model and cache."""

from __future__ import annotations

from runtime.errors import InvalidRequest
from runtime.request import SamplingParams


def max_new_tokens(
    ids: list[int], params: SamplingParams, max_model_len: int, vocabulary: int, has_tokenizer: bool
) -> int:
    """The most tokens the request may generate. Raises :class:`InvalidRequest` for one that could wait for ever."""
    if params.stop_strings and not has_tokenizer:
        raise InvalidRequest("stop strings need a tokenizer, and skip_tokenizer_init is set; use stop_token_ids.")
    room = max_model_len - len(ids)
    least = 1 if params.max_tokens is None else params.max_tokens
    if room < least:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens and asks for {least} more, but the longest sequence is "
            f"{max_model_len} tokens (max_model_len). Shorten the prompt or lower max_tokens"
            f"{f' to {room}' if room > 0 else ''}."
        )
    for name in ("stop_token_ids", "logit_bias"):
        if max(getattr(params, name) or (), default=0) >= vocabulary:
            raise InvalidRequest(f"{name} must be below {vocabulary}, the size of the vocabulary.")
    if params.structured_outputs is not None and not has_tokenizer:
        raise InvalidRequest("structured_outputs need a tokenizer, and skip_tokenizer_init is set.")
    if params.max_tokens == 0 and (params.prompt_logprobs is None or params.n > 1):
        raise InvalidRequest("max_tokens 0 only scores the prompt: it needs prompt_logprobs, and n = 1.")
    return room if params.max_tokens is None else params.max_tokens
