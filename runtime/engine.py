"""The engine: requests in, deltas out, one step at a time. Single-threaded; owns everything that serves.

    add(prompt, params) -> uid        tokenise, refuse what can never fit, queue
    step() -> [Delta]                 schedule, run one forward pass, commit, turn tokens into text
    abort(uid)                        forget, at any time, in any state

A request that fails ends alone. A forward pass that fails ends them all with an error, and the engine is dead: nobody waits
for an answer that cannot come.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from attention.base import AttentionError
from attention.hf import NAME as ATTENTION
from attention.hf import read_specs
from attention.kv_cache import KVCache
from attention.kv_dtypes import cache_dtype
from attention.positions import batch_dependent_rope
from attention.registry import select
from runtime import guard
from runtime.blocks import BlockPool
from runtime.checkpoint import Checkpoint, locate
from runtime.config import EngineConfig
from runtime.detokenize import Detokenizer
from runtime.errors import EngineDead, InvalidRequest, LoadError
from runtime.loader import load
from runtime.memory import size_cache
from runtime.plan import make_plan
from runtime.report import engine_report
from runtime.request import Delta, FinishReason, Request, SamplingParams
from runtime.runner import Runner, StepResult
from runtime.sampling import generator_for
from runtime.scheduler import Plan, Scheduler

logger = logging.getLogger(__name__)

MAX_BATCHED_TOKENS = 2048


@dataclass(frozen=True)
class EngineStats:
    """Counts at one moment. ``free_blocks`` of ``blocks`` hold nothing; ``preemptions`` count from the start."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    preemptions: int
    steps: int


class Engine:
    """Loads the model of ``config`` and serves it. Raises :class:`LoadError` if that is not possible as asked."""

    def __init__(self, config: EngineConfig):
        self.config = config
        checkpoint = Checkpoint.open(config.model, config.revision, code=config.trust_remote_code)
        plan = make_plan(
            checkpoint,
            dtype=config.dtype,
            device=config.device,
            quantization=config.quantization,
            kernel=config.kernel,
            trust_remote_code=config.trust_remote_code,
        )
        plan.require_complete()
        try:
            specs = read_specs(plan.config, plan.trust_remote_code)
            selection = select(specs, plan.device, config.attention_backend)
            kv_dtype = cache_dtype(config.kv_cache_dtype, plan.dtype)
        except AttentionError as error:
            raise LoadError(f"{checkpoint.folder}: {error}") from error
        self.tokenizer = None if config.skip_tokenizer_init else _load_tokenizer(config, checkpoint)
        self.loaded = load(plan, ATTENTION)
        context = _context(plan.config)
        self.size = size_cache(config, KVCache.bytes_per_token(specs, kv_dtype), context, plan.device)
        cache = KVCache(specs, self.size.blocks, self.size.block_size, kv_dtype, plan.device)
        self.max_model_len = _limit_by_rope(plan.config, config.max_model_len, self.size.max_model_len)
        self.vocabulary = int(cast(Any, self.loaded.model).get_input_embeddings().num_embeddings)
        self.end_tokens = _end_tokens(self.loaded.model, self.tokenizer)
        self.scheduler = Scheduler(
            BlockPool(self.size.blocks, self.size.block_size),
            config.max_num_batched_tokens or MAX_BATCHED_TOKENS,
            config.max_num_seqs,
        )
        self.runner = Runner(self.loaded.model, specs, selection.backend, cache)
        self.report = engine_report(self.loaded, specs, selection, self.size, kv_dtype, self.max_model_len)
        self.steps = 0
        self._dead: Exception | None = None
        self._random = random.Random(config.seed)
        self._uids = itertools.count()
        self._live: dict[tuple[int, int], Request] = {}
        self._texts: dict[Request, Detokenizer] = {}
        if config.startup_check:
            guard.check(self)

    # Requests -----------------------------------------------------------------------------------------------------

    def add(self, prompt: str | Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt, text or token ids; its ``n`` samples share the returned uid.

        Raises :class:`InvalidRequest` if it can never be served, :class:`EngineDead` after a failed forward pass.
        """
        self.require_alive()
        ids = self.encode(prompt)
        max_tokens = self._admit(ids, params)
        uid = next(self._uids)
        for index in range(params.n):
            generator = generator_for(params, index, self._random)
            end_tokens = frozenset(params.stop_token_ids or ())
            if not params.ignore_eos:
                end_tokens |= self.end_tokens
            own = params if index == 0 else replace(params, prompt_logprobs=None)  # the prompt is scored once
            request = Request(uid, index, ids, own, max_tokens, generator, end_tokens)
            self._live[uid, index] = request
            if self.tokenizer is not None:
                self._texts[request] = Detokenizer(
                    self.tokenizer,
                    ids,
                    params.stop_strings,
                    keep_stop=params.include_stop_str_in_output,
                    skip_special_tokens=params.skip_special_tokens,
                )
            self.scheduler.add(request)
        return uid

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt. Raises :class:`InvalidRequest` on anything that is not a prompt of this model."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest("a text prompt needs a tokenizer, and skip_tokenizer_init is set; send token ids.")
            try:
                ids = list(self.tokenizer(prompt)["input_ids"])
            except (TypeError, ValueError, UnicodeError) as error:
                raise InvalidRequest(f"the prompt cannot be tokenised: {error}") from error
        else:
            ids = list(prompt)
        if not ids:
            raise InvalidRequest("the prompt is empty: it has no token.")
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocabulary:
                raise InvalidRequest(f"{token!r} is not a token id of this model (0 to {self.vocabulary - 1}).")
        return ids

    def _admit(self, ids: list[int], params: SamplingParams) -> int:
        """The most tokens the request may generate; refuses one that could wait for ever."""
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and skip_tokenizer_init is set; use stop_token_ids.")
        room = self.max_model_len - len(ids)
        least = 1 if params.max_tokens is None else params.max_tokens
        if room < least:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens and asks for {least} more, but the longest sequence is "
                f"{self.max_model_len} tokens (max_model_len). Shorten the prompt or lower max_tokens"
                f"{f' to {room}' if room > 0 else ''}."
            )
        if max(params.stop_token_ids or (), default=0) >= self.vocabulary:
            raise InvalidRequest(f"stop_token_ids must be below {self.vocabulary}, the size of the vocabulary.")
        if params.max_tokens == 0 and (params.prompt_logprobs is None or params.n > 1):
            raise InvalidRequest("max_tokens 0 only scores the prompt: it needs prompt_logprobs, and n = 1.")
        return room if params.max_tokens is None else params.max_tokens

    def request(self, uid: int, index: int = 0) -> Request:
        """A live request."""
        return self._live[uid, index]

    def abort(self, uid: int) -> bool:
        """Forget all samples of a request and free their blocks. ``False`` if it had already ended."""
        requests = [request for request in self._live.values() if request.uid == uid]
        for request in requests:
            self._forget(request)
        return bool(requests)

    def _forget(self, request: Request) -> None:
        self.scheduler.remove(request)
        self._live.pop((request.uid, request.index), None)
        self._texts.pop(request, None)

    # Steps --------------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def require_alive(self) -> None:
        """Raise :class:`EngineDead`, with the cause, if a forward pass failed."""
        if self._dead is not None:
            raise EngineDead(f"the engine stopped: {type(self._dead).__name__}: {self._dead}") from self._dead

    def stats(self) -> EngineStats:
        pool = self.scheduler.pool
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks=pool.count,
            free_blocks=pool.free,
            preemptions=self.scheduler.preemptions,
            steps=self.steps,
        )

    def step(self) -> list[Delta]:
        """Run one forward pass; what it added to each request. Empty if there is nothing to do."""
        self.require_alive()
        plan = self.scheduler.schedule()
        if not plan:
            return []
        try:
            result = self.runner.run(plan)
        except Exception as error:
            return self._die(error)
        self.steps += 1
        deltas = self._commit(plan, result)
        if not self.has_work:
            self.scheduler.pool.check(())
        return deltas

    def _commit(self, plan: Plan, result: StepResult) -> list[Delta]:
        deltas = []
        for request, message in result.failed.items():
            self._forget(request)
            deltas.append(Delta(request.uid, request.index, finish_reason=FinishReason.ERROR, error=message))
        good = [chunk for chunk in plan if chunk.request not in result.failed]
        ended = self.scheduler.commit(good, result.tokens)
        for chunk in good:
            delta = self._delta(chunk.request, result, ended.get(chunk.request))
            if delta.token_ids or delta.prompt_logprobs or delta.finish_reason:
                deltas.append(delta)
            if delta.finish_reason:
                self._forget(chunk.request)
        return deltas

    def _delta(self, request: Request, result: StepResult, reason: FinishReason | None) -> Delta:
        delta = Delta(request.uid, request.index, finish_reason=reason)
        delta.prompt_logprobs = result.prompt_logprobs.get(request, [])
        request.scored += len(delta.prompt_logprobs)
        if request not in result.tokens:
            return delta
        token = result.tokens[request]
        delta.token_ids = [token]
        if request in result.logprobs:
            delta.logprobs = [result.logprobs[request]]
        if reason is FinishReason.STOP and token in (request.params.stop_token_ids or ()):
            delta.stop_reason = token
        text = self._texts.get(request)
        if text is None:
            return delta
        if reason is not FinishReason.STOP or request.params.include_stop_str_in_output:
            delta.text = text.feed(token, may_stop=len(request.output) > request.params.min_tokens)
        if text.matched is not None:
            delta.finish_reason, delta.stop_reason = FinishReason.STOP, text.matched
        elif reason is not None:
            delta.text += text.flush()
        return delta

    def _die(self, error: Exception) -> list[Delta]:
        logger.error("the forward pass failed; the engine stops", exc_info=error)
        self._dead = error
        message = f"the engine stopped: {type(error).__name__}: {error}"
        requests = list(self._live.values())
        for request in requests:
            self._forget(request)
        return [Delta(r.uid, r.index, finish_reason=FinishReason.ERROR, error=message) for r in requests]


def _load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    folder = (
        locate(config.tokenizer, weights=False, code=config.trust_remote_code)
        if config.tokenizer
        else checkpoint.folder
    )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise LoadError(
            f"{folder}: no usable tokenizer ({error}). Name one with --tokenizer-path (tokenizer=...), or work with token "
            "ids: --skip-tokenizer-init (skip_tokenizer_init=True)."
        ) from error


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids after which nothing follows: of the generation configuration, else of the model's, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    tokens = {*listed, getattr(tokenizer, "eos_token_id", None)}
    return frozenset(token for token in tokens if token is not None)


def _context(config: Any) -> int | None:
    """The longest sequence the model was made for, if its configuration says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _limit_by_rope(config: Any, asked: int | None, length: int) -> int:
    """Models whose rotary factors depend on the longest sequence of a *batch* are served where they do not."""
    reason = batch_dependent_rope(config)
    if reason is None:
        return length
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    limit = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
    if asked is not None and asked > limit:
        raise LoadError(
            f"max_model_len {asked}: {reason}; sequences beyond {limit} tokens are not supported for this model."
        )
    return min(length, limit)
