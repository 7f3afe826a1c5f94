"""One forward pass: a plan becomes tensors, the model runs, logits become token ids.

All chunks are packed into one row ``[1, T]``. The model is Transformers' own and unchanged; its attention finds the batch
in a context variable (:mod:`attention.hf`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from attention.hf import forward_batch
from attention.kv_cache import KVCache
from attention.states import Segment, StateCache
from runtime.factors import Factors
from runtime.grammar import GrammarError
from runtime.graphs import Capture, DecodeGraphs, Logits
from runtime.request import Request, TokenLogprob
from runtime.sampling import logprobs_of, penalized, sample
from runtime.scheduler import Plan

NAN_LOGITS = "the model's logits are NaN or infinite"


@dataclass
class StepResult:
    """What one forward pass gave: a token and perhaps log-probabilities for each request that reached its end,
    log-probabilities of prompt tokens, and the requests that failed by themselves: logits not finite, a grammar stuck."""

    tokens: dict[Request, int] = field(default_factory=dict)
    logprobs: dict[Request, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[TokenLogprob]] = field(default_factory=dict)
    failed: dict[Request, str] = field(default_factory=dict)


class Runner:
    """Owns the KV cache, the states of recurrent layers and the model; knows nothing of queues or text."""

    def __init__(
        self,
        model: nn.Module,
        specs: list[AttentionSpec],
        backend: AttentionBackend,
        cache: KVCache,
        states: StateCache | None = None,
        factors: Factors | None = None,
    ):
        self.model = model
        self.specs = specs
        self.backend = backend
        self.cache = cache
        self.states = states
        self.factors = factors
        self.device = next(model.parameters()).device
        self.graphs: DecodeGraphs | None = None
        self._keeps_logits = bool(cast(Any, model)._supports_logits_to_keep())

    @torch.inference_mode()
    def capture(self, capture: Capture, sizes: Sequence[int], longest: int) -> None:
        """Run decoding steps of up to the largest of ``sizes`` sequences, none longer than ``longest`` tokens, by what
        ``capture`` makes of them. The last block of the cache must be nobody's."""
        self.graphs = DecodeGraphs(
            lambda ids, positions, batches, keep: self._forward(ids, positions, batches, keep),
            capture,
            sizes,
            block_size=self.cache.block_size,
            groups=len(self.cache.layout.reaches),
            scratch=self.cache.blocks - 1,
            blocks=-(-longest // self.cache.block_size),
            device=self.device,
        )

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Run the chunks of a plan; keys and values are written, a token is sampled where a chunk reaches the end."""
        rows = self._wanted_rows(plan)
        # Of one token each, chunks give a row each, or none: only then is every row of a graph wanted.
        if self.graphs and self.graphs.fits(plan) and len(rows) == len(plan):
            return self._read(rows, self.graphs.run(plan))
        ids, positions, batches = self._pack(plan)
        keep = torch.tensor([row for _, row, _ in rows] or [0], device=self.device)
        return self._read(rows, self._forward(ids, positions, batches, keep, self._segments(plan), self._lengths(plan)))

    def _pack(self, plan: Plan) -> tuple[Tensor, Tensor, list[AttentionBatch]]:
        batches = [
            AttentionBatch.pack(
                queries=[chunk.size for chunk in plan],
                kv_lens=[chunk.stop for chunk in plan],
                tables=[chunk.request.blocks[group] for chunk in plan],
                block_size=self.cache.block_size,
                device=self.device,
            )
            for group in range(len(self.cache.layout.reaches))
        ]
        ids = [token for chunk in plan for token in chunk.request.ids(chunk.start, chunk.stop)]
        return torch.tensor([ids], device=self.device), batches[0].positions()[None], batches

    def _segments(self, plan: Plan) -> list[Segment]:
        """Where the states of each sequence are, if the model keeps any."""
        segments: list[Segment] = []
        first = 0
        for chunk in plan if self.states else ():
            assert chunk.request.slot is not None
            segments.append(Segment(chunk.request.slot, first, chunk.size, fresh=chunk.start == 0))
            first += chunk.size
        return segments

    def _lengths(self, plan: Plan) -> list[int]:
        """For the rotary embedding, the length of the sequence of each token, if that matters."""
        if self.factors is None:
            return []
        return [n for chunk in plan for n in self.factors.lengths(chunk.request, chunk.start, chunk.stop)]

    @staticmethod
    def _wanted_rows(plan: Plan) -> list[tuple[Request, int, int | None]]:
        """``(request, row, token)`` of every row whose logits are read; ``token`` is the prompt token to score there,
        ``None`` where a new token is sampled."""
        rows: list[tuple[Request, int, int | None]] = []
        first = 0
        for chunk in plan:
            request = chunk.request
            if request.scores_prompt:
                last = min(chunk.stop, len(request.prompt) - 1)
                for position in range(max(chunk.start, request.scored), last):
                    rows.append((request, first + position - chunk.start, request.prompt[position + 1]))
            if chunk.samples:
                rows.append((request, first + chunk.size - 1, None))
            first += chunk.size
        return rows

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        batches: list[AttentionBatch],
        keep: Tensor,
        segments: Sequence[Segment] = (),
        lengths: Sequence[int] = (),
    ) -> Logits:
        """Logits of the rows ``keep``. Waits for nothing on the host, unless the model does."""
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        with forward_batch(batches, self.cache, self.backend, self.specs, self.states, segments, lengths):
            logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, **options).logits[0]
        return Logits.of(logits if self._keeps_logits else logits[keep])

    @staticmethod
    def _read(rows: list[tuple[Request, int, int | None]], read: Logits) -> StepResult:
        result = StepResult()
        if not rows:
            return result
        likeliest, finite = read.verdict.tolist()
        for (request, _, _), good in zip(rows, finite, strict=True):
            if not good:
                result.failed[request] = NAN_LOGITS
        if all(token is None and request.takes_likeliest for request, _, token in rows):
            result.tokens = {r: best for (r, _, _), best in zip(rows, likeliest, strict=True) if r not in result.failed}
            return result
        logits = read.values
        allowed = _allowed_tokens([r for r, _, token in rows if token is None], logits.shape[-1], result.failed)
        sampled = [i for i, (r, _, token) in enumerate(rows) if token is None and r not in result.failed]
        if sampled:
            requests = [rows[i][0] for i in sampled]
            scores = penalized(logits[sampled], requests)
            for row, request in enumerate(requests):
                if request in allowed:
                    scores[row].masked_fill_(~allowed[request].to(scores.device), -torch.inf)
            tokens = sample(scores, requests)
            result.tokens = dict(zip(requests, tokens, strict=True))
            for i, request, token in zip(sampled, requests, tokens, strict=True):
                if request.params.logprobs is not None:
                    result.logprobs[request] = logprobs_of(logits[i : i + 1], [token], request.params.logprobs)[0]
        for request in {r for r, _, token in rows if token is not None and r not in result.failed}:
            scored = [(i, token) for i, (r, _, token) in enumerate(rows) if r is request and token is not None]
            index, tokens_there = zip(*scored, strict=True)
            count = request.params.prompt_logprobs or 0
            result.prompt_logprobs[request] = logprobs_of(logits[list(index)], tokens_there, count)
        return result


def _allowed_tokens(requests: list[Request], vocabulary: int, failed: dict[Request, str]) -> dict[Request, Tensor]:
    """What the grammars allow next; requests whose grammar cannot say are added to ``failed``."""
    allowed: dict[Request, Tensor] = {}
    for request in requests:
        if request.matcher is not None and request not in failed:
            try:
                allowed[request] = request.matcher.allowed(vocabulary)
            except GrammarError as error:
                failed[request] = str(error)
    return allowed
