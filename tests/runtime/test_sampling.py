"""Sampling against Transformers' logits processors, and what a seed promises."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.request import Request, SamplingParams
from runtime.sampling import (
    beyond_nucleus,
    filtered_probabilities,
    generator_for,
    invert,
    logprobs_of,
    penalized,
    sample,
)

CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 10**6},
    {"top_p": 0.7},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.5, "min_p": 0.05},
    {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
]


def transformers_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers: LogitsProcessorList = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].double()).softmax(-1)[0]


def test_the_distributions_are_those_of_transformers_in_a_mixed_batch() -> None:
    logits = torch.randn(len(CASES), 300) * 3
    params = [SamplingParams(**case) for case in CASES]
    ours = filtered_probabilities(logits, params)
    for row, settings in enumerate(params):
        torch.testing.assert_close(ours[row], transformers_distribution(logits[row], settings), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vocabulary", [300, 20_000])
def test_a_nucleus_is_that_of_a_full_sort_ties_included(vocabulary: int) -> None:
    """Peaked and flat rows, ones whose nucleus ends in the middle of equals, and one that is all equal."""
    spread = torch.tensor([0.0, 0.1, 1, 3, 10, 3, 3])
    logits = torch.randn(len(spread), vocabulary, dtype=torch.float64) * spread[:, None]
    logits[-2] = logits[-2].round()
    logits[-1] = logits[-1].clamp(max=1.0)
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        probabilities, limit = logits.softmax(-1), torch.full((len(spread), 1), top_p, dtype=torch.float64)
        ordered, index = probabilities.sort(descending=True, stable=True)
        late = ordered.cumsum(-1) - ordered >= limit
        assert torch.equal(beyond_nucleus(probabilities, limit), late.scatter(1, index, late))


def request_with(seed: int | None, **params: Any) -> Request:
    settings = SamplingParams(seed=seed, **params)
    return Request(0, 0, [1], settings, 10, generator_for(settings, 0, random.Random(5)))


def test_a_seed_does_not_depend_on_batch_mates() -> None:
    logits = torch.randn(20, 500)
    alone = request_with(11)
    expected = [sample(row[None], [alone])[0] for row in logits]
    watched, mates = (
        request_with(11),
        [request_with(None), request_with(3, top_p=0.5), request_with(4, temperature=0.0)],
    )
    for step, row in enumerate(logits):
        place = step % 4
        batch = [*mates[:place], watched, *mates[place:]]
        rows = torch.randn(len(batch), 500)
        rows[place] = row
        assert sample(rows, batch)[place] == expected[step]


def test_samples_of_one_request_differ_and_repeat() -> None:
    params = SamplingParams(seed=1, n=2)
    draws = [[generator_for(params, index, random.Random(0)).random() for _ in range(2)] for index in range(2)]
    assert draws[0][0] == draws[0][1] != draws[1][0]


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.2, 0.3, 0.0, 0.4, 0.0], dtype=torch.float64)
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = invert(probabilities.expand(count, -1), uniform)
    frequencies = torch.bincount(drawn, minlength=7) / count
    torch.testing.assert_close(frequencies, probabilities.float(), atol=2 / count, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_distribution_never_give_an_impossible_token(uniform: float) -> None:
    probabilities = torch.tensor([[0.0, 0.1, 0.6, 0.3, 0.0]], dtype=torch.float64)
    assert probabilities[0, invert(probabilities, torch.tensor([uniform], dtype=torch.float64))[0]] > 0


def test_greedy_takes_the_maximum() -> None:
    logits = torch.randn(3, 50)
    assert sample(logits, [request_with(None, temperature=0.0)] * 3) == logits.argmax(-1).tolist()


def test_logprobs_are_of_the_model_and_ranked() -> None:
    logits = torch.randn(2, 40)
    reference = logits.log_softmax(-1)
    rows = logprobs_of(logits, [7, int(logits[1].argmax())], 3)
    assert rows[0].logprob == pytest.approx(reference[0, 7].item())
    assert rows[0].rank == int((reference[0] > reference[0, 7]).sum()) + 1
    assert rows[1].rank == 1
    assert [token for token, _ in rows[0].top] == reference[0].topk(3).indices.tolist()


def test_bias_and_penalties_are_those_of_transformers_in_a_mixed_batch() -> None:
    """Transformers has no presence or frequency penalty; their definition is OpenAI's."""
    logits = torch.randn(4, 50)
    before = logits.clone()
    requests = [
        request_with(None),
        request_with(None, repetition_penalty=1.3, logit_bias={3: -7.5, 4: 100.0}),
        request_with(None, presence_penalty=0.5, frequency_penalty=0.25),
        request_with(None, repetition_penalty=0.5),
    ]
    for request in requests:
        request.prompt, request.output = [5, 6, 7], [7, 8, 8, 9]
    ours = penalized(logits, requests)
    ids = torch.tensor([[5, 6, 7, 7, 8, 8, 9]])
    biased = SequenceBiasLogitsProcessor([[[3], -7.5], [[4], 100.0]])(ids, logits[1:2])
    expected = logits.clone()
    expected[1] = RepetitionPenaltyLogitsProcessor(1.3)(ids, biased)[0]
    expected[2, [7, 9]] -= 0.75
    expected[2, 8] -= 1.0
    expected[3] = RepetitionPenaltyLogitsProcessor(0.5)(ids, logits[3:4].clone())[0]
    torch.testing.assert_close(ours, expected)
    assert torch.equal(logits, before), "log-probabilities are of the model's own logits"


def test_no_end_token_before_the_least_number_of_tokens_as_in_transformers() -> None:
    ends, prompt = [3, 7], [1, 2]
    logits = torch.randn(1, 20)
    logits[0, ends] = 50.0
    for output in ([], [5], [5, 6], [5, 6, 8]):
        params = SamplingParams(min_tokens=2, temperature=0)
        request = Request(0, 0, prompt, params, 8, random.Random(0), frozenset({*ends, 10**6}), output=output)
        oracle = MinNewTokensLengthLogitsProcessor(len(prompt), 2, ends, device="cpu")
        expected = oracle(torch.tensor([prompt + output]), logits.clone())
        assert torch.equal(penalized(logits, [request]), expected)
        assert (sample(expected, [request])[0] in ends) == request.takes_likeliest == (len(output) >= 2)
    for temperature in (0.0, 1.0):  # where every token is an end, one is taken all the same
        params = SamplingParams(min_tokens=2, temperature=temperature)
        request = Request(0, 0, prompt, params, 8, random.Random(0), frozenset(range(20)))
        assert 0 <= sample(penalized(logits, [request]), [request])[0] < 20
