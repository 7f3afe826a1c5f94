"""``/v1/completions`` and ``/v1/chat/completions``: how OpenAI's clients want answers to look."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.errors import InvalidRequest
from runtime.request import Delta, SamplingParams, TokenLogprob
from runtime.server.protocol import ChatRequest, CompletionRequest, OpenAI, many_prompts
from runtime.server.reply import Piece, ReplyParser
from runtime.server.service import STREAMED, Service

router = APIRouter()


@router.post("/v1/completions", responses=STREAMED)
async def completions(body: CompletionRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.require_model(body.model)
    params = body.params(service.defaults)
    texts = many_prompts(body.prompt, "prompt")
    service.worker.require_room(len(texts) * params.n)
    special = body.add_special_tokens is not False
    prompts = [await service.encode(text, special=special) for text in texts]
    return await _answer(request, service, TextWriter(service, body, params, prompts))


@router.post("/v1/chat/completions", responses=STREAMED)
async def chat(body: ChatRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.require_model(body.model)
    params = body.params(service.defaults)
    service.worker.require_room(params.n)
    use, form = body.tool_use, await service.reply_format()
    if use.tools and use.forced is None and not form.reads_calls:
        raise InvalidRequest(
            "tools with tool_choice 'auto' cannot be served: how this model writes calls is not known. "
            "Start the server with --tool-call-parser, or demand a call with tool_choice 'required'."
        )
    text, prompt = await service.converse(body)
    separate = body.separate_reasoning is not False
    if form.marked(use, separate_reasoning=separate):
        params = replace(params, skip_special_tokens=False)

    def new_parser() -> ReplyParser:
        return form.parser(use, text, separate_reasoning=separate)

    return await _answer(request, service, ChatWriter(service, body, params, [prompt], new_parser))


async def _answer(request: Request, service: Service, writer: Writer) -> Response:
    stream = await service.submit(writer.prompts, writer.params)
    if writer.body.stream:
        return service.events(stream, writer.chunk, writer.last)
    return JSONResponse(writer.whole(await service.collect(request, stream)))


class Writer:
    """Answers in one of the two shapes; counts what the usage reports."""

    prefix = ""
    object = ""
    chunk_object = ""

    def __init__(self, service: Service, body: OpenAI, params: SamplingParams, prompts: Sequence[list[int]]):
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream: true.")
        self.body = body
        self.params = params
        self.prompts = prompts
        self._tokenizer = service.tokenizer
        self._tokens = service.tokens
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or service.name,
        }
        self._generated = 0
        self._cached: dict[int, int] = {}
        self._begun: set[int] = set()

    def whole(self, answers: list[list[Delta]]) -> dict[str, Any]:
        choices = []
        for place, samples in enumerate(answers):
            for delta in samples:
                self._count(place, delta)
                choices.append(self._finished(place, delta))
        return {**self._head, "object": self.object, "choices": choices, "usage": self._usage()}

    def chunk(self, place: int, delta: Delta) -> list[dict[str, Any]]:
        self._count(place, delta)
        return [
            {**self._head, "object": self.chunk_object, "choices": [choice], **self._usage_so_far()}
            for choice in self._partial(place, delta)
        ]

    def last(self) -> list[dict[str, Any]]:
        if not self._wants_usage():
            return []
        return [{**self._head, "object": self.chunk_object, "choices": [], "usage": self._usage()}]

    def _finished(self, place: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _partial(self, place: int, delta: Delta) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _choice(self, place: int, delta: Delta) -> dict[str, Any]:
        reason = delta.finish_reason.value if delta.finish_reason else None
        return {"index": self._index(place, delta), "finish_reason": reason, "stop_reason": delta.stop_reason}

    def _index(self, place: int, delta: Delta) -> int:
        return place * self.params.n + delta.index

    def _count(self, place: int, delta: Delta) -> None:
        self._generated += len(delta.token_ids)
        self._cached[place] = max(self._cached.get(place, 0), delta.cached_tokens if delta.index == 0 else 0)

    def _wants_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _usage_so_far(self) -> dict[str, Any]:
        """What a piece says of it: OpenAI's clients want it null before the end, vLLM's may ask for it."""
        if self.body.stream_options is not None and self.body.stream_options.continuous_usage_stats:
            return {"usage": self._usage()}
        return {"usage": None} if self._wants_usage() else {}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


class ChatWriter(Writer):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        service: Service,
        body: OpenAI,
        params: SamplingParams,
        prompts: Sequence[list[int]],
        new_parser: Callable[[], ReplyParser],
    ):
        super().__init__(service, body, params, prompts)
        self._parsers: defaultdict[int, ReplyParser] = defaultdict(new_parser)
        self._called: set[int] = set()

    def _finished(self, place: int, delta: Delta) -> dict[str, Any]:
        piece = self._read(place, delta)
        message: dict[str, Any] = {"role": "assistant", "content": piece.content, "refusal": None}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        if piece.calls:
            message["content"] = piece.content or None
            message["tool_calls"] = [call.whole() for call in piece.calls]
        return {**self._choice(place, delta), "message": message, "logprobs": self._logprobs(delta)}

    def _read(self, place: int, delta: Delta) -> Piece:
        index = self._index(place, delta)
        piece = self._parsers[index].feed(delta.text, last=delta.finish_reason is not None)
        if piece.calls:
            self._called.add(index)
        return piece

    def _choice(self, place: int, delta: Delta) -> dict[str, Any]:
        choice = super()._choice(place, delta)
        called = choice["index"] in self._called and choice["finish_reason"] == "stop"
        return {**choice, "finish_reason": "tool_calls"} if called else choice

    def _partial(self, place: int, delta: Delta) -> list[dict[str, Any]]:
        index, choices = self._index(place, delta), []
        said = self._read(place, delta)
        if index not in self._begun:
            self._begun.add(index)
            first = {"role": "assistant", "content": ""}
            choices.append({"index": index, "delta": first, "logprobs": None, "finish_reason": None})
        piece: dict[str, Any] = {"content": said.content} if said.content else {}
        if said.reasoning:
            piece["reasoning_content"] = said.reasoning
        if said.calls:
            piece["tool_calls"] = [call.delta() for call in said.calls]
        if piece or delta.logprobs or delta.finish_reason:
            choices.append({**self._choice(place, delta), "delta": piece, "logprobs": self._logprobs(delta)})
        return choices

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self.params.logprobs is None:
            return None
        rows = [
            {**self._entry(row.token_id, row.logprob), "top_logprobs": [self._entry(*pair) for pair in row.top]}
            for row in delta.logprobs
        ]
        return {"content": rows, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        known = self._tokens.spelling(token)
        return {"token": self._tokens.text(token), "logprob": logprob, "bytes": None if known is None else list(known)}


class TextWriter(Writer):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    body: CompletionRequest

    def __init__(self, service: Service, body: OpenAI, params: SamplingParams, prompts: Sequence[list[int]]):
        super().__init__(service, body, params, prompts)
        self._offsets: dict[int, int] = {}
        self._scored: dict[int, list[TokenLogprob]] = {}

    def _finished(self, place: int, delta: Delta) -> dict[str, Any]:
        text = (self._echo(place) if self.body.echo else "") + delta.text
        choice = {**self._choice(place, delta), "text": text, "logprobs": self._logprobs(place, delta)}
        return choice

    def _partial(self, place: int, delta: Delta) -> list[dict[str, Any]]:
        index = self._index(place, delta)
        text = delta.text
        if self.body.echo and index not in self._begun:
            text = self._echo(place) + text
        self._begun.add(index)
        if not (text or delta.logprobs or delta.finish_reason):
            return []
        return [{**self._choice(place, delta), "text": text, "logprobs": self._logprobs(place, delta)}]

    def _echo(self, place: int) -> str:
        asked = self.body.prompt
        if isinstance(asked, str):
            return asked
        if isinstance(asked[place], str):
            return str(asked[place])
        return str(self._tokenizer.decode(self.prompts[place], clean_up_tokenization_spaces=False))

    def _logprobs(self, place: int, delta: Delta) -> dict[str, Any] | None:
        if self.params.logprobs is None:
            return None
        rows: list[TokenLogprob | None] = list(delta.logprobs)
        tokens = [row.token_id for row in delta.logprobs]
        if self.body.echo:
            # The samples of a prompt share it: it is scored with the first of them.
            rows = [None, *self._scored.setdefault(place, delta.prompt_logprobs), *rows]
            tokens = [*self.prompts[place], *tokens]
        names = [self._tokens.name(token) for token in tokens]
        index = self._index(place, delta)
        end = self._offsets.get(index, -self._unseen(place))
        ends = list(accumulate(map(len, names), initial=end))
        self._offsets[index] = ends.pop()
        offsets = [max(0, offset) for offset in ends]
        return {
            "tokens": names,
            "token_logprobs": [row and row.logprob for row in rows],
            "top_logprobs": [row and self._best(row) for row in rows],
            "text_offset": offsets,
        }

    def _unseen(self, place: int) -> int:
        """Characters in the names of tokens before an echoed text, which the tokenizer put there."""
        if not self.body.echo:
            return 0
        text, unseen = self._echo(place), 0
        for token in self.prompts[place]:
            name = self._tokens.name(token)
            if token not in self._tokenizer.all_special_ids or text.startswith(name):
                break
            unseen += len(name)
        return unseen

    def _best(self, row: TokenLogprob) -> dict[str, float]:
        """The best tokens and the one that stands there, which clients look up."""
        return {self._tokens.name(token): logprob for token, logprob in (*row.top, (row.token_id, row.logprob))}
