"""What a client asks for and what it gets back, step by step. Knows no torch."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from runtime.grammar import Matcher

MAX_SAMPLES = 128
MAX_STOP_STRINGS = 64
MAX_LOGPROBS = 1024
MAX_BIASED_TOKENS = 1024


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequest(message)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Validates itself; names are vLLM's.

    ``temperature`` 0 is greedy. ``top_k`` 0 or -1, ``top_p`` 1 and ``min_p`` 0 switch that filter off. ``seed`` makes the
    random numbers of this request independent of what else is being generated. Before ``min_tokens`` no end token is
    chosen, nor does a stop string end the answer. ``max_tokens=None`` goes to the end of the context; 0 only scores the
    prompt (with ``prompt_logprobs``). ``logprobs=k`` reports the ``k`` most likely tokens and
    the chosen one, of the *model's* distribution, before penalties, temperature and filters.

    ``repetition_penalty`` divides (positive) or multiplies (negative) the logits of tokens that stand in prompt or answer;
    ``presence_penalty`` and ``frequency_penalty`` are subtracted once, or as often as the token stands in the answer.
    ``logit_bias`` maps token ids to what is added, -100 to 100. ``structured_outputs`` has one of the keys ``json`` (a
    schema), ``json_object`` (true), ``regex``, ``choice`` (strings) and ``grammar`` (Lark, or
    GBNF as llama.cpp writes it): the answer conforms to it.
    ``cache_salt`` shares cached prefixes only with requests of the same salt.

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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: Mapping[str, Any] | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        stop = self._items("stop", (str,))
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", self._items("stop_token_ids", ()))
        for name in ("n", "top_k", "min_tokens"):
            self._integer(name)
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name)
        for name in ("temperature", "top_p", "min_p", *PENALTIES):
            _require(_is_number(getattr(self, name)), f"{name} must be a number, not {getattr(self, name)!r}")
        self._check_penalties()
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

    def _check_penalties(self) -> None:
        _require(
            0 < self.repetition_penalty <= 100,
            f"repetition_penalty must be above 0 and at most 100, not {self.repetition_penalty}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, f"{name} must be -2 to 2, not {getattr(self, name)}")
        bias = self.logit_bias or {}
        _require(
            len(bias) <= MAX_BIASED_TOKENS,
            f"logit_bias must have at most {MAX_BIASED_TOKENS} tokens, not {len(bias)}",
        )
        for token, value in bias.items():
            _require(
                isinstance(token, int) and token >= 0 and _is_number(value) and -100 <= value <= 100,
                f"logit_bias must map token ids to -100 to 100, not {token!r} to {value!r}",
            )

    def _integer(self, name: str) -> None:
        value = getattr(self, name)
        _require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an integer, not {value!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def biased(self) -> bool:
        """Whether anything changes the logits before they are compared."""
        return bool(self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

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

    ``computed`` tokens from the left have their keys and values in ``blocks``, a table for each group of layers; a preempted
    request starts at 0 again.
    ``scored`` prompt tokens have had their log-probabilities reported, which a preemption does not take back. The first
    ``cached`` tokens were found in the cache on first admission, at the time ``started``. ``chain`` identifies the full
    blocks in the prefix cache. ``slot`` is where recurrent layers keep its state while it runs. ``factors`` names the
    rotary factors of what is computed (:mod:`runtime.factors`).
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
    blocks: list[list[int]] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)
    cached: int = 0
    slot: int | None = None
    factors: int = 0
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    matcher: Matcher | None = None

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

    @property
    def takes_likeliest(self) -> bool:
        """Whether its next token is simply the likeliest, and nothing more is asked about it."""
        params = self.params
        plain = params.greedy and not params.biased and params.logprobs is None
        return plain and self.matcher is None and not self.must_go_on

    @property
    def must_go_on(self) -> bool:
        """Whether its next token may be no end token, ``min_tokens`` not being there. A grammar knows its own end."""
        return len(self.output) < self.params.min_tokens and self.matcher is None

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token; the reason if it ends the request."""
        self.output.append(token)
        if self.matcher is not None and self.matcher.accept(token):
            return FinishReason.STOP
        return self.ended_by(token)

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
    cached_tokens: int = 0
    queue_seconds: float = 0.0

    def merge(self, later: Delta) -> None:
        """Add what a later step gave the same request."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason, self.stop_reason, self.error = later.finish_reason, later.stop_reason, later.error
