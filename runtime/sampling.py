"""From logits to token ids: one batched function, a random generator per request.

Order and meaning are those of Transformers' logits processors: logit bias, penalties, then temperature, top-k, top-p, min-p,
each on what the one before left. One uniform number per sampled token, drawn from the request's own generator, picks the
token by inverting the cumulative distribution; so a seed draws the same numbers whatever else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.request import Request, SamplingParams, TokenLogprob

CANDIDATES = 4096
"""Tokens among which a nucleus is looked for before all are sorted, which takes several times as long."""


def generator_for(params: SamplingParams, index: int, fallback: random.Random) -> random.Random:
    """The generator of sample ``index`` of a request: seeded by its own seed, or from the engine's generator."""
    seed = fallback.getrandbits(63) if params.seed is None else params.seed
    return random.Random(f"{seed}/{index}")


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """One token for each row of ``logits [rows, vocabulary]`` (float32, finite)."""
    tokens = logits.argmax(-1)
    drawn = [row for row, request in enumerate(requests) if not request.params.greedy]
    if drawn:
        params = [requests[row].params for row in drawn]
        probabilities = filtered_probabilities(logits[drawn], params)
        uniform = torch.tensor([requests[row].generator.random() for row in drawn], dtype=torch.float64)
        tokens[drawn] = invert(probabilities, uniform.to(logits.device))
    return tokens.tolist()


def penalized(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Logits with every request's bias and penalties, and end tokens only where it may end; a copy if that changes any."""
    rows = [row for row, request in enumerate(requests) if request.params.biased or request.must_go_on]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        request, scores = requests[row], logits[row]
        params = request.params
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias), device=logits.device)
            scores[tokens] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        if params.repetition_penalty != 1:
            tokens = torch.tensor(list({*request.prompt, *request.output}), device=logits.device)
            seen, penalty = scores[tokens], params.repetition_penalty
            scores[tokens] = torch.where(seen < 0, seen * penalty, seen / penalty)
        if request.output and (params.presence_penalty or params.frequency_penalty):
            tokens, counts = torch.tensor(request.output, device=logits.device).unique(return_counts=True)
            scores[tokens] -= params.presence_penalty + params.frequency_penalty * counts
        if request.must_go_on:
            scores[[token for token in request.end_tokens if token < len(scores)]] = -torch.inf
    return logits


def filtered_probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The distribution each row is drawn from, ``float64 [rows, vocabulary]``; filtered tokens have probability 0."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scores = logits.double() / column([max(p.temperature, 1e-6) for p in params])
    vocabulary = scores.shape[-1]
    top_k = [min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params]
    limited = [row for row, k in enumerate(top_k) if k < vocabulary]
    if limited:
        best = scores[limited].topk(max(top_k[row] for row in limited)).values
        last = torch.tensor([top_k[row] - 1 for row in limited], device=logits.device)
        threshold = best.gather(1, last[:, None])
        scores[limited] = scores[limited].masked_fill(scores[limited] < threshold, -torch.inf)
    nucleus = [row for row, p in enumerate(params) if p.top_p < 1]
    if nucleus:
        chosen = scores[nucleus]
        dropped = beyond_nucleus(chosen.softmax(-1), column([params[row].top_p for row in nucleus]))
        scores[nucleus] = chosen.masked_fill_(dropped, -torch.inf)
    probabilities = scores.softmax(-1)
    floor = column([p.min_p for p in params]) * probabilities.amax(-1, keepdim=True)
    probabilities = probabilities.masked_fill(probabilities < floor, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def beyond_nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens of ``probabilities [rows, vocabulary]`` nucleus sampling drops: one stays while the mass before it is below
    ``top_p [rows, 1]``, so the most likely one always does; of equally likely ones those with lower ids come first."""
    vocabulary = probabilities.shape[-1]
    count = min(CANDIDATES, vocabulary)
    index = probabilities.topk(count, sorted=False).indices.sort(-1).values
    ordered, place = probabilities.gather(1, index).sort(descending=True, stable=True)
    late = ordered.cumsum(-1) - ordered >= top_p
    dropped = torch.ones_like(probabilities, dtype=torch.bool).scatter(1, index.gather(1, place), late)
    # Sorting everything keeps the same ones, if the candidates hold all that are as likely as the last one kept.
    unsure = ordered.masked_fill(late, torch.inf).amin(-1) <= ordered[:, -1]
    if count < vocabulary and bool(unsure.any()):
        ordered, index = probabilities[unsure].sort(descending=True, stable=True)
        late = ordered.cumsum(-1) - ordered >= top_p[unsure]
        dropped[unsure] = late.scatter(1, index, late)
    return dropped


def invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token whose slice of the cumulative distribution holds ``uniform [rows]``; never one of probability 0."""
    cumulative = probabilities.cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    # Rounding at the upper end could point past the last token that is possible.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(token, last)


def logprobs_of(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """For each row of ``logits [rows, vocabulary]``: the log-probability of its token, its rank from 1, and the ``count``
    best."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    best = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1) if count else None
    rows = []
    for row, token in enumerate(tokens):
        top = tuple(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)) if best else ()
        rows.append(TokenLogprob(token, chosen[row, 0].item(), int(ranks[row]), top))
    return rows
