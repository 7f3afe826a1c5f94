"""One short greedy answer before anybody is served: does the loaded model speak at all?

A broken checkpoint or kernel shows itself as NaN, as logits that are all equal, or as one token with certainty, whatever
came before ("!!!!!!!"). Those fail the start. Merely repeating a token does not: small and untrained models do that.

Code that a checkpoint brings can do what no recording of its attention calls shows: count positions by itself, or mix tokens
outside of attention, where sequences are not kept apart. So its answer is computed a second time, all at once and beside
another sequence, and has to be as likely as it was token by token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attention.checks import brought_by_checkpoint
from runtime.errors import LoadError
from runtime.request import Delta, SamplingParams

if TYPE_CHECKING:
    from runtime.engine import Engine

PROMPT_TOKENS = 8
NEW_TOKENS = 8
CERTAIN = -1e-6
"""Log-probability of a token that leaves nothing to any other."""
APART, APART_IN_FLOAT32 = 0.25, 0.02
"""Mean differences of log-probabilities that rounding does not make: of dense models it makes a tenth and a thousandth."""


def check(engine: Engine) -> None:
    """Raise :class:`LoadError` if the model's first words show that it cannot be right."""
    room = engine.max_model_len
    step = max(1, engine.vocabulary // (PROMPT_TOKENS + 1))
    prompt = [step * (i + 1) % engine.vocabulary for i in range(max(1, min(PROMPT_TOKENS, room - 1)))]
    count = min(NEW_TOKENS, room - len(prompt))
    if count < 1:
        return
    params = SamplingParams(temperature=0, max_tokens=count, logprobs=2, ignore_eos=True, skip_special_tokens=False)
    engine.add(prompt, params)
    deltas = _run(engine)
    judge([delta.logprobs[0].top for delta in deltas if delta.logprobs], _where(engine))
    if brought_by_checkpoint(engine.loaded.model):
        _require_same_again(engine, prompt, deltas)


def _run(engine: Engine) -> list[Delta]:
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
    if errors := [delta.error for delta in deltas if delta.error]:
        raise LoadError(f"{_where(engine)}: the first forward pass failed: {errors[0]}. {ADVICE}")
    return deltas


def _require_same_again(engine: Engine, prompt: list[int], deltas: list[Delta]) -> None:
    """Score what was generated after ``prompt`` beside another sequence, which comes first."""
    answer = [token for delta in deltas for token in delta.token_ids]
    before = [scored.logprob for delta in deltas for scored in delta.logprobs]
    engine.add(prompt[::-1], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    uid = engine.add(prompt + answer, SamplingParams(max_tokens=0, prompt_logprobs=0))
    scored = [token.logprob for delta in _run(engine) if delta.uid == uid for token in delta.prompt_logprobs]
    after = scored[-len(answer) :]
    apart = sum(abs(one - other) for one, other in zip(before, after, strict=True)) / len(answer)
    if not apart < (APART_IN_FLOAT32 if engine.loaded.plan.dtype == torch.float32 else APART):
        raise LoadError(
            f"{_where(engine)}: the checkpoint's own code computes a sequence differently beside another one: the "
            f"log-probabilities of {len(answer)} tokens are {apart:.2g} apart in the mean. It must take positions from "
            "position_ids, and nothing but the attention function may look at other tokens. startup_check=False serves it "
            "anyway."
        )


def judge(best: list[tuple[tuple[int, float], ...]], where: str) -> None:
    """``best``: the two most likely ``(token, logprob)`` of each generated position."""
    if all(len(top) == 2 and top[0][1] == top[1][1] for top in best):
        raise LoadError(f"{where}: every token is equally likely, at every position. {ADVICE}")
    tokens = {top[0][0] for top in best}
    if len(best) > 1 and len(tokens) == 1 and all(top[0][1] > CERTAIN for top in best):
        raise LoadError(
            f"{where}: the model answers token {tokens.pop()} with certainty, whatever comes before. {ADVICE}"
        )


def _where(engine: Engine) -> str:
    return str(engine.loaded.plan.checkpoint.folder)


ADVICE = (
    "The checkpoint is damaged, or a kernel is wrong here: try --kernel reference, then --dtype float32. "
    "startup_check=False serves it anyway."
)
