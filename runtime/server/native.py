"""SGLang's own ``/generate``, and the small routes beside it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from runtime.errors import InvalidRequest
from runtime.request import Delta, FinishReason, SamplingParams, TokenLogprob
from runtime.server.errors import error_response
from runtime.server.protocol import DetokenizeRequest, GenerateRequest, TokenizeRequest, many_prompts
from runtime.server.service import STREAMED, Service

router = APIRouter()


@router.post("/generate", responses=STREAMED)
async def generate(body: GenerateRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.require_model(body.model)
    params = body.params(service.defaults)
    asked = body.text if body.text is not None else body.input_ids
    texts = many_prompts(asked or [], "text" if body.input_ids is None else "input_ids")
    service.worker.require_room(len(texts) * params.n)
    prompts = [await service.encode(text) for text in texts]
    single = len(prompts) * params.n == 1 and (isinstance(asked, str) or asked is prompts[0])
    writer = NativeWriter(service, body, params, prompts, single)
    stream = await service.submit(prompts, params)
    if body.stream:
        return service.events(stream, writer.chunk, list)
    rows = [
        writer.row(place, sample)
        for place, samples in enumerate(await service.collect(request, stream))
        for sample in samples
    ]
    return JSONResponse(rows[0] if single else rows)


class NativeWriter:
    """Rows of ``text``, ``output_ids`` and ``meta_info``. Streamed rows are cumulative."""

    def __init__(
        self,
        service: Service,
        body: GenerateRequest,
        params: SamplingParams,
        prompts: Sequence[list[int]],
        single: bool,
    ):
        self._engine = service.engine
        self._tokens = service.tokens if service.engine.tokenizer is not None else None
        self._body, self._params, self._prompts, self._single = body, params, prompts, single
        self._ids = self._names(body.rid)
        self._begun = time.monotonic()
        self._sofar: dict[tuple[int, int], Delta] = {}
        self._scored: dict[int, list[TokenLogprob]] = {}

    def _names(self, given: str | list[str] | None) -> list[str]:
        """A name for each sample. Raises :class:`InvalidRequest`."""
        count = len(self._prompts) * self._params.n
        if not isinstance(given, list):
            common = given or uuid.uuid4().hex
            return [common] if self._single else [f"{common}-{index}" for index in range(count)]
        if len(given) != len(self._prompts):
            raise InvalidRequest(f"rid has {len(given)} names for {len(self._prompts)} prompts.")
        if self._params.n == 1:
            return given
        return [f"{name}-{index}" for name in given for index in range(self._params.n)]

    def chunk(self, place: int, delta: Delta) -> list[dict[str, Any]]:
        key = (place, delta.index)
        if key in self._sofar:
            self._sofar[key].merge(delta)
        else:
            self._sofar[key] = delta
        row = self.row(place, self._sofar[key])
        return [row if self._single else {"index": place * self._params.n + delta.index, **row}]

    def row(self, place: int, delta: Delta) -> dict[str, Any]:
        index = place * self._params.n + delta.index
        meta = {
            "id": self._ids[index],
            "finish_reason": finish(delta),
            "prompt_tokens": len(self._prompts[place]),
            "completion_tokens": len(delta.token_ids),
            "cached_tokens": delta.cached_tokens,
            "e2e_latency": time.monotonic() - self._begun,
        }
        if self._body.return_logprob:
            meta |= self._logprobs(place, delta)
        return {"text": delta.text, "output_ids": delta.token_ids, "meta_info": meta}

    def _logprobs(self, place: int, delta: Delta) -> dict[str, Any]:
        start = self._body.logprob_start_len
        prompt = self._prompts[place]
        known: list[Any] = []
        top: list[Any] = []
        if self._params.prompt_logprobs is not None and 0 <= start < len(prompt):
            first = [(None, prompt[0], self._word(prompt[0]))]
            if delta.index == 0:  # the samples of a prompt share it: it is scored with the first of them
                self._scored[place] = delta.prompt_logprobs
            scored = self._scored.get(place, [])
            known = (first + [self._entry(row) for row in scored])[start:]
            top = ([None] + [self._top(row) for row in scored])[start:]
        return {
            "input_token_logprobs": known,
            "output_token_logprobs": [self._entry(row) for row in delta.logprobs],
            "input_top_logprobs": top,
            "output_top_logprobs": [self._top(row) for row in delta.logprobs],
        }

    def _entry(self, row: TokenLogprob) -> tuple[float, int, str | None]:
        return (row.logprob, row.token_id, self._word(row.token_id))

    def _top(self, row: TokenLogprob) -> list[tuple[float, int, str | None]]:
        return [(logprob, token, self._word(token)) for token, logprob in row.top]

    def _word(self, token: int) -> str | None:
        if not self._body.return_text_in_logprobs or self._tokens is None:
            return None
        return self._tokens.text(token)


def finish(delta: Delta) -> dict[str, Any] | None:
    """SGLang's form of a finish reason."""
    if delta.finish_reason is None:
        return None
    if delta.finish_reason is FinishReason.STOP and delta.stop_reason is not None:
        return {"type": "stop", "matched": delta.stop_reason}
    if delta.finish_reason is FinishReason.LENGTH:
        return {"type": "length", "length": len(delta.token_ids)}
    return {"type": delta.finish_reason.value}


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.require_model(body.model)
    text = body.plain()
    if text is None:
        _, tokens = await service.converse(body)
    else:
        tokens = await service.encode(text, special=body.add_special_tokens is not False)
    found: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": service.engine.max_model_len}
    if body.return_token_strs:
        found["token_strs"] = [service.tokens.text(token) for token in tokens]
    return found


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    body.refuse_unknown()
    service.require_model(body.model)
    text = await service.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return {"text": text, "prompt": text}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What lm-eval's ``local-completions`` asks for, to tokenise with the routes above and without files of its own."""
    service: Service = request.app.state.service
    tokenizer = service.tokenizer
    marks = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {"tokenizer_class": type(tokenizer).__name__, "model_max_length": service.engine.max_model_len, **marks}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    return {"object": "list", "data": [_card(service)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.require_model(name)
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "relinear",
        "root": service.worker.config.model,
        "max_model_len": service.engine.max_model_len,
    }


@router.get("/get_model_info")
@router.get("/model_info")
async def model_info(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    engine = service.engine
    plan = engine.loaded.plan
    return {
        "model_path": service.worker.config.model,
        "tokenizer_path": service.worker.config.tokenizer or service.worker.config.model,
        "is_generation": True,
        "model_type": plan.config.model_type,
        "quantization": plan.method.name if plan.method else None,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "weight_bytes": plan.weight_bytes,
        "max_model_len": engine.max_model_len,
        "vocab_size": engine.vocabulary,
    }


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    engine, options = service.engine, service.options
    return {
        "version": package_version(),
        "model": service.name,
        "sampling_defaults": service.defaults,
        "max_total_num_tokens": engine.size.tokens,
        "max_running_requests": engine.config.max_num_seqs,
        "max_queued_requests": engine.config.max_queued_requests,
        "context_length": engine.max_model_len,
        "max_body_bytes": options.max_body_bytes,
        "internal_states": [vars(engine.stats())],  # one a scheduler: SGLang's benchmark reads the first
        "report": engine.report,
    }


@router.get("/version")
async def served_version() -> dict[str, str]:
    return {"version": package_version()}


@router.post("/flush_cache")
async def flush_cache(request: Request) -> dict[str, bool]:
    service: Service = request.app.state.service
    await service.flush_cache()
    return {"success": True}


@router.api_route("/v1/embeddings", methods=["GET", "POST"], include_in_schema=False)
async def embeddings() -> Response:
    return error_response(404, "embeddings are not served: this is a generating model. Use /v1/completions.")


def package_version() -> str:
    try:
        return version("relinear")
    except PackageNotFoundError:
        return "unknown"
