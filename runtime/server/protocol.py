"""What clients may send. Names are OpenAI's and SGLang's; every field is used, known to be harmless, or refused by name.

Types are checked here, values by :class:`SamplingParams`, which says what is possible.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from runtime.errors import InvalidRequest
from runtime.request import SamplingParams
from runtime.server.body import Body
from runtime.server.conversation import MAX_MESSAGES, Conversation, Message

MAX_PROMPTS = 256
RequestName = Annotated[str, Field(max_length=256)]


class Sampling(Body):
    """Fields that completions, chat and ``/generate`` share; ``None`` means the server's default."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    regex: str | None = None
    ebnf: str | None = None

    def given(self) -> dict[str, Any]:
        """The sampling parameters that were sent, by their names in :class:`SamplingParams`."""
        values = {name: getattr(self, name) for name in Sampling.model_fields if name not in ("regex", "ebnf")}
        if self.logit_bias is not None:
            values["logit_bias"] = _bias(self.logit_bias)
        values["structured_outputs"] = self.form()
        return {name: value for name, value in values.items() if value is not None}

    def form(self) -> dict[str, Any] | None:
        """What the answer has to conform to."""
        return one_form({"regex": self.regex, "grammar": self.ebnf})


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing is padded, and nobody needs it to be
    continuous_usage_stats: bool | None = None


class OpenAI(Sampling):
    """Fields that both OpenAI routes share."""

    model: str | None = Field(None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    cache_salt: str | None = Field(None, max_length=256)

    def given(self) -> dict[str, Any]:
        values = super().given()
        values["include_stop_str_in_output"] = bool(self.include_stop_str_in_output or self.no_stop_trim)
        values["cache_salt"] = self.cache_salt
        return values

    def form(self) -> dict[str, Any] | None:
        return one_form(
            {"regex": self.regex, "grammar": self.ebnf},
            self.structured_outputs or {},
            _response_format(self.response_format),
        )


class CompletionRequest(OpenAI):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        self.refuse_unknown()
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequest(f"best_of must equal n ({self.n or 1}), not {self.best_of}: all samples are returned.")
        if self.echo and self.stream and self.logprobs is not None:
            raise InvalidRequest("echo with logprobs cannot be streamed; leave out stream.")
        scored = (self.logprobs or 0) if (self.echo and self.logprobs is not None) or self.max_tokens == 0 else None
        return SamplingParams(
            **{**defaults, **self.given()},
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=scored,
        )


class ChatRequest(Conversation, OpenAI):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    separate_reasoning: bool | None = None

    def form(self) -> dict[str, Any] | None:
        return one_form(super().form() or {}, self.tool_use.form() or {})

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        self.refuse_unknown()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.")
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return SamplingParams(
            **{**defaults, **self.given()},
            max_tokens=most,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class NativeSampling(Sampling):
    max_new_tokens: int | None = 128
    min_new_tokens: int | None = None
    sampling_seed: int | None = None
    no_stop_trim: bool | None = None
    json_schema: str | None = None

    def given(self) -> dict[str, Any]:
        theirs = {"min_tokens": self.min_new_tokens, "seed": self.sampling_seed}
        return super().given() | {name: value for name, value in theirs.items() if value is not None}

    def form(self) -> dict[str, Any] | None:
        return one_form({"regex": self.regex, "grammar": self.ebnf, "json": self.json_schema})


class GenerateRequest(Body):
    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: NativeSampling | None = None
    stream: bool = False
    model: str | None = Field(None, max_length=1024)
    rid: RequestName | list[RequestName] | None = None
    cache_salt: str | None = Field(None, max_length=256)
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = Field(0, ge=0, le=20)
    return_text_in_logprobs: bool = False

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        self.refuse_unknown()
        if (self.text is None) == (self.input_ids is None):
            raise InvalidRequest("exactly one of text and input_ids is needed.")
        wanted = self.sampling_params or NativeSampling()
        wanted.refuse_unknown()
        scored = (self.return_logprob and self.logprob_start_len >= 0) or wanted.max_new_tokens == 0
        return SamplingParams(
            **{**defaults, **wanted.given()},
            max_tokens=wanted.max_new_tokens,
            include_stop_str_in_output=bool(wanted.no_stop_trim),
            cache_salt=self.cache_salt,
            logprobs=self.top_logprobs_num if self.return_logprob else None,
            prompt_logprobs=self.top_logprobs_num if scored else None,
        )


class TokenizeRequest(Conversation):
    """A text, or a conversation, which a chat template makes one."""

    prompt: str | None = None
    text: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    model: str | None = Field(None, max_length=1024)

    def plain(self) -> str | None:
        """The text; ``None`` if it is a conversation. Raises :class:`InvalidRequest`."""
        self.refuse_unknown()
        given = [name for name in ("prompt", "text", "messages") if getattr(self, name) not in (None, [])]
        if len(given) != 1:
            raise InvalidRequest(f"one of prompt, text and messages is needed, not {' and '.join(given) or 'none'}.")
        if self.messages and self.add_special_tokens:
            raise InvalidRequest("add_special_tokens cannot be served with messages: the chat template writes them.")
        if self.messages:
            return None
        for name in Conversation.model_fields:
            if getattr(self, name):
                raise InvalidRequest(f"{name} needs messages.")
        return self.prompt if self.text is None else self.text


class DetokenizeRequest(Body):
    tokens: list[int] = Field(max_length=1_000_000)
    skip_special_tokens: bool = False
    model: str | None = None


def many_prompts(value: str | list[str] | list[int] | list[list[int]], field: str) -> list[str | list[int]]:
    """The prompts of a field that may hold one or several. Raises :class:`InvalidRequest`."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequest(f"{field} is empty.")
    if isinstance(value[0], int):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"{field} has {len(value)} prompts; at most {MAX_PROMPTS} in one request.")
    return list(value)


def one_form(*sources: Mapping[str, Any]) -> dict[str, Any] | None:
    """The one form of an answer that these ask for. Raises :class:`InvalidRequest`."""
    forms = [(name, value) for source in sources for name, value in source.items() if value is not None]
    if len(forms) > 1:
        names = ", ".join(sorted(name for name, _ in forms))
        raise InvalidRequest(f"an answer can have one form; {names} were asked for (a demanded tool call is json).")
    return dict(forms) or None


def _response_format(value: Mapping[str, Any] | None) -> dict[str, Any]:
    kind = (value or {}).get("type", "text")
    if value is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    schema = value.get("json_schema")
    if kind != "json_schema" or not isinstance(schema, dict) or schema.get("schema") is None:
        raise InvalidRequest(
            "response_format must be {'type': 'text'}, {'type': 'json_object'} or "
            "{'type': 'json_schema', 'json_schema': {'name': ..., 'schema': {...}}}."
        )
    return {"json": schema["schema"]}


def _bias(values: Mapping[str, float]) -> dict[int, float]:
    for token in values:
        if re.fullmatch(r"[0-9]{1,18}", token) is None:  # int() knows more: signs, underscores, digits of other scripts
            raise InvalidRequest(f"logit_bias: keys are token ids, not {token[:64]!r}.")
    return {int(token): max(-100.0, min(100.0, value)) for token, value in values.items()}
