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
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime import guard
from runtime.admission import max_new_tokens
from runtime.assembly import assemble
from runtime.config import EngineConfig
from runtime.detokenize import Detokenizer
from runtime.errors import EngineDead, InvalidRequest, Overloaded
from runtime.grammar import GrammarCompiler, Matcher
from runtime.request import Delta, FinishReason, Request, SamplingParams
from runtime.runner import NAN_LOGITS, StepResult
from runtime.sampling import generator_for
from runtime.scheduler import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStats:
    """Counts at one moment. ``free_blocks`` of ``blocks`` are held by nobody; ``preemptions``, the tokens that were looked for
    (``prefix_queries``) and found (``prefix_hits``) in the prefix cache, and the samples that ended because their logits were
    no numbers (``nan_logits``) count from the start."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    preemptions: int
    steps: int
    prefix_queries: int
    prefix_hits: int
    nan_logits: int


class Engine:
    """Loads the model of ``config`` and serves it. Raises :class:`LoadError` if that is not possible as asked."""

    def __init__(self, config: EngineConfig):
        parts = assemble(config)
        self.config = config
        self.loaded, self.layers, self.tokenizer = parts.loaded, parts.layers, parts.tokenizer
        self.size, self.max_model_len, self.vocabulary = parts.size, parts.size.max_model_len, parts.vocabulary
        self.scheduler, self.runner, self.report = parts.scheduler, parts.runner, parts.report
        self.end_tokens, self.sampling_defaults = parts.end_tokens, parts.sampling_defaults
        self.grammars = GrammarCompiler(self.tokenizer, self.vocabulary, self.end_tokens)
        self.steps = self._nan_logits = 0
        self._dead: Exception | None = None
        self._random = random.Random(config.seed)
        self._uids = itertools.count()
        self._live: dict[tuple[int, int], Request] = {}
        self._texts: dict[Request, Detokenizer] = {}
        if config.startup_check:
            guard.check(self)

    # Requests -----------------------------------------------------------------------------------------------------

    def add(self, prompt: str | Sequence[int], params: SamplingParams, matcher: Matcher | None = None) -> int:
        """Queue a prompt, text or token ids; its ``n`` samples share the returned uid. ``matcher`` is the compiled
        ``structured_outputs``, if that has been done already.

        Raises :class:`InvalidRequest` if it can never be served, :class:`Overloaded` if the queue is full,
        :class:`EngineDead` after a failed forward pass.
        """
        self.require_alive()
        self.require_room(params.n)
        ids = self.encode(prompt)
        max_tokens = max_new_tokens(ids, params, self.max_model_len, self.vocabulary, self.tokenizer is not None)
        if params.structured_outputs is not None and matcher is None:
            matcher = self.grammars.compile(params.structured_outputs)
        uid = next(self._uids)
        for index in range(params.n):
            generator = generator_for(params, index, self._random)
            ends = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.end_tokens)
            own = params if index == 0 else replace(params, prompt_logprobs=None)  # the prompt is scored once
            request = Request(uid, index, ids, own, max_tokens, generator, ends)
            request.matcher = matcher.copy() if matcher else None
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

    def require_room(self, samples: int) -> None:
        """Raise :class:`Overloaded` if this many more would exceed ``max_queued_requests``."""
        limit, live = self.config.max_queued_requests, len(self._live)
        if limit is not None and live + samples > self.scheduler.max_running + limit:
            raise Overloaded(
                f"{live} requests run or wait and {samples} more would exceed {self.scheduler.max_running} running and "
                f"{limit} waiting (max_queued_requests). Try again later."
            )

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
            prefix_queries=pool.queries,
            prefix_hits=pool.hits,
            nan_logits=self._nan_logits,
        )

    def step(self) -> list[Delta]:
        """Run one forward pass; what it added to each request. Empty if there is nothing to do."""
        self.require_alive()
        deltas = self._expire()
        if not (plan := self.scheduler.schedule()):
            return deltas
        try:
            result = self.runner.run(plan)
        except Exception as error:
            return deltas + self._die(error)
        self.steps += 1
        deltas += self._commit(plan, result)
        if not self.has_work:
            self.scheduler.pool.check(())
        return deltas

    def flush_cache(self) -> None:
        """Forget every cached prefix; live requests keep what they hold."""
        self.scheduler.pool.forget()

    def _expire(self) -> list[Delta]:
        """End what has waited or run for too long."""
        now, deltas = time.monotonic(), []
        for request in list(self._live.values()):
            age = now - request.arrived
            for name, applies in (("queue_timeout", request.started is None), ("request_timeout", True)):
                limit = getattr(self.config, name)
                if applies and limit is not None and age > limit:
                    deltas.append(
                        self._fail(request, FinishReason.ABORT, f"ended after {age:.1f} s; {name} is {limit:g} s.")
                    )
                    break
        return deltas

    def _fail(self, request: Request, reason: FinishReason, message: str) -> Delta:
        self._forget(request)
        return Delta(request.uid, request.index, finish_reason=reason, error=message)

    def _commit(self, plan: Plan, result: StepResult) -> list[Delta]:
        deltas = []
        for request, message in result.failed.items():
            self._nan_logits += message == NAN_LOGITS
            self.scheduler.pool.forget_tokens(request)  # nobody else may start from what this one left
            deltas.append(self._fail(request, FinishReason.ERROR, message))
        good = [chunk for chunk in plan if chunk.request not in result.failed]
        ended = self.scheduler.commit(good, result.tokens)
        for chunk in good:
            try:
                delta = self._delta(chunk.request, result, ended.get(chunk.request))
            except Exception as error:  # of the tokenizer: this request's, and nobody else's
                logger.error("request %d failed", chunk.request.uid, exc_info=error)
                deltas.append(self._fail(chunk.request, FinishReason.ERROR, f"{type(error).__name__}: {error}"))
                continue
            if delta.token_ids or delta.prompt_logprobs or delta.finish_reason:
                deltas.append(delta)
            if delta.finish_reason:
                self._forget(chunk.request)
        return deltas

    def _delta(self, request: Request, result: StepResult, reason: FinishReason | None) -> Delta:
        delta = Delta(request.uid, request.index, finish_reason=reason, cached_tokens=request.cached)
        delta.queue_seconds = (request.started or request.arrived) - request.arrived
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
        ended_by_token = reason is FinishReason.STOP and token in request.end_tokens
        if not ended_by_token or request.params.include_stop_str_in_output:
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
        return [self._fail(request, FinishReason.ERROR, message) for request in list(self._live.values())]
