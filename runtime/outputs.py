"""What ``LLM`` returns; names and nesting are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from runtime.request import Delta, TokenLogprob


class Logprob(NamedTuple):
    """``rank`` counts from 1, the most likely token; ``decoded_token`` is ``None`` without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One sample. ``logprobs[i]`` maps token ids to what was likely at position ``i``, the chosen token included."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass
class RequestOutput:
    """One prompt and its samples. ``prompt_logprobs[0]`` is ``None``: nothing comes before the first token. The keys and
    values of ``cached_tokens`` of its tokens were still there from an earlier request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def extend(self, delta: Delta, tokenizer: Any = None) -> None:
        """Add what a step gave."""
        output = self.outputs[delta.index]
        output.text += delta.text
        output.token_ids += delta.token_ids
        for row in delta.logprobs:
            output.logprobs = output.logprobs or []
            output.logprobs.append(_logprobs(row, tokenizer))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + row.logprob
        if delta.index == 0:
            self.cached_tokens = delta.cached_tokens or self.cached_tokens
            for row in delta.prompt_logprobs:
                self.prompt_logprobs = self.prompt_logprobs or [None]
                self.prompt_logprobs.append(_logprobs(row, tokenizer))
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason.value
            output.stop_reason = delta.stop_reason
            output.error = delta.error


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a given sequence. ``logprobs[i]`` is of ``token_ids[i]`` given all before it; the first is
    ``None``. ``top[i]`` are the ``(token id, log-probability)`` pairs that were most likely there, best first."""

    token_ids: list[int]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]


def _logprobs(row: TokenLogprob, tokenizer: Any) -> dict[int, Logprob]:
    def entry(token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, tokenizer.decode([token]) if tokenizer is not None else None)

    best = {token: entry(token, logprob, rank) for rank, (token, logprob) in enumerate(row.top, start=1)}
    return {row.token_id: entry(row.token_id, row.logprob, row.rank)} | best
