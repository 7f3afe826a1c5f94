"""One short greedy answer before anybody is served: does the loaded model speak at all?

A broken checkpoint or kernel shows itself as NaN, as logits that are all equal, or as one token with certainty, whatever
came before ("!!!!!!!"). Those fail the start. Merely repeating a token does not: small and untrained models do that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import LoadError
from runtime.request import Delta, SamplingParams

if TYPE_CHECKING:
    from runtime.engine import Engine

PROMPT_TOKENS = 8
NEW_TOKENS = 8
CERTAIN = -1e-6
"""Log-probability of a token that leaves nothing to any other."""


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
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
    if errors := [delta.error for delta in deltas if delta.error]:
        raise LoadError(f"{_where(engine)}: the first forward pass failed: {errors[0]}. {ADVICE}")
    judge([delta.logprobs[0].top for delta in deltas if delta.logprobs], _where(engine))


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
