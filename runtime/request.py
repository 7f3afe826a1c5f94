"""What a client asks for and what it gets back, step by step. Knows no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
from typing import Any, NamedTuple

from runtime.errors import InvalidRequest

MAX_SAMPLES = 128
MAX_STOP_STRINGS = 64
MAX_LOGPROBS = 1024


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequest(message)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Validates itself; names are vLLM's.

    ``temperature`` 0 is greedy. ``top_k`` 0 or -1, ``top_p`` 1 and ``min_p`` 0 switch that filter off. ``seed`` makes the
    random numbers of this request independent of what else is being generated. Before ``min_tokens`` an end token does not
    end the answer. ``max_tokens=None`` goes to the end of the
    context; 0 only scores the prompt (with ``prompt_logprobs``). ``logprobs=k`` reports the ``k`` most likely tokens and
    the chosen one, of the *model's* distribution, before temperature and filters.

    Raises :class:`InvalidRequest` naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 128
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = self._items("stop", (str,))
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", self._items("stop_token_ids", ()))
        for name in ("n", "top_k", "min_tokens"):
            self._integer(name)
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name)
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            _require(
                isinstance(value, Real) and not isinstance(value, bool) and value == value,
                f"{name} must be a number, not {value!r}",
            )
        _require(1 <= self.n <= MAX_SAMPLES, f"n must be 1 to {MAX_SAMPLES}, not {self.n}")
        _require(0 <= self.temperature <= 100, f"temperature must be 0 to 100, not {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        _require(self.top_k >= -1, f"top_k must be -1 or 0 (off) or positive, not {self.top_k}")
        _require(0 <= self.min_p <= 1, f"min_p must be 0 to 1, not {self.min_p}")
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, f"seed must fit 64 bits, not {self.seed}")
        _require(
            self.max_tokens is None or self.max_tokens >= 0, f"max_tokens must be 0 or more, not {self.max_tokens}"
        )
        _require(self.min_tokens >= 0, f"min_tokens must be 0 or more, not {self.min_tokens}")
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(count is None or 0 <= count <= MAX_LOGPROBS, f"{name} must be 0 to {MAX_LOGPROBS}, not {count}")
        _require(
            all(isinstance(text, str) and text for text in stop) and len(stop) <= MAX_STOP_STRINGS,
            f"stop must be at most {MAX_STOP_STRINGS} non-empty strings, not {self.stop!r}",
        )
        _require(
            all(
                isinstance(token, int) and not isinstance(token, bool) and token >= 0
                for token in self.stop_token_ids or ()
            ),
            f"stop_token_ids must be token ids, not {self.stop_token_ids!r}",
        )

    def _items(self, name: str, single: tuple[type, ...]) -> tuple[Any, ...]:
        """The values of a field that takes a sequence, or one value of a type in ``single``."""
        value = getattr(self, name)
        if isinstance(value, single):
            return (value,)
        _require(value is None or isinstance(value, Sequence | Set), f"{name} must be a list, not {value!r}")
        return tuple(value or ())

    def _integer(self, name: str) -> None:
        value = getattr(self, name)
        _require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an integer, not {value!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class FinishReason(Enum):
    """Why a request ended; the values are those of the OpenAI API, but ``error``."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenLogprob(NamedTuple):
    """The log-probability of a token, its rank (1 is the most likely) and the best tokens at its position."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Request:
    """One sequence on its way through the engine. ``index`` tells the ``n`` samples of one prompt apart.

    ``computed`` tokens from the left have their keys and values in ``blocks``; a preempted request starts at 0 again.
    ``scored`` prompt tokens have had their log-probabilities reported, which a preemption does not take back.
    """

    uid: int
    index: int
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    generator: random.Random
    end_tokens: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    computed: int = 0
    scored: int = 0
    blocks: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    def ids(self, start: int, stop: int) -> list[int]:
        """Token ids ``start`` to ``stop`` of prompt and output together."""
        split = len(self.prompt)
        if start >= split:
            return self.output[start - split : stop - split]
        return self.prompt[start:stop] + self.output[: max(0, stop - split)]

    @property
    def scores_prompt(self) -> bool:
        return self.params.prompt_logprobs is not None

    def ended_by(self, token: int) -> FinishReason | None:
        """Whether ``token``, already the last of ``output``, ends the request."""
        enough = len(self.output) > self.params.min_tokens
        if token in self.end_tokens and enough:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.output) >= self.max_tokens else None


@dataclass
class Delta:
    """What one step added to one request."""

    uid: int
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
