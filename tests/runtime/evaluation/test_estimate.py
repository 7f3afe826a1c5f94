"""Standard errors say how far a number is from the truth, also where tokens of a window are alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runtime.evaluation.estimate import Estimate, mean, quantile, ratio, root_mean_square

WINDOWS, LENGTH = 40, 25


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens that share half of their variance with their window."""
    shared = torch.randn(WINDOWS, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(WINDOWS, LENGTH, generator=generator, dtype=torch.float64)
    return (shared + own + 3).flatten(), torch.arange(WINDOWS).repeat_interleave(LENGTH)


@pytest.mark.parametrize(
    "estimate",
    [mean, root_mean_square, lambda x, c: quantile(x, 0.5, c), lambda x, c: quantile(x, 0.9, c)],
    ids=["mean", "rms", "median", "90 %"],
)
def test_standard_errors_are_the_spread_of_repeated_draws(estimate: Callable[[Tensor, Tensor], Estimate]) -> None:
    generator = torch.Generator().manual_seed(1)
    found = [estimate(*draw(generator)) for _ in range(300)]
    spread = torch.tensor([one.value for one in found]).std().item()
    errors = torch.tensor([one.standard_error for one in found])
    assert errors.mean().item() == pytest.approx(spread, rel=0.12)


def test_tokens_of_a_window_are_not_taken_as_independent() -> None:
    values, clusters = draw(torch.Generator().manual_seed(2))
    independent = values.std() / len(values) ** 0.5
    found = mean(values, clusters).standard_error
    assert found is not None
    assert found > 2 * independent


def test_a_ratio_weights_windows_by_their_size() -> None:
    top, bottom = torch.tensor([1.0, 1.0, 4.0]), torch.tensor([1.0, 3.0, 4.0])
    assert ratio(top, bottom, torch.tensor([0, 0, 1])).value == 0.75
    assert ratio(2 * bottom, bottom, torch.tensor([0, 0, 1])).standard_error == 0


def test_one_window_has_no_standard_error() -> None:
    found = mean(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]))
    assert found == Estimate(1.5, None)
    assert "?" in str(found)


def test_windows_of_one_size_are_a_sample_of_their_means() -> None:
    values, clusters = torch.tensor([1.0, 3.0, 4.0, 6.0, 2.0, 8.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    means = torch.tensor([2.0, 5.0, 5.0])
    assert mean(values, clusters).standard_error == pytest.approx(means.std().item() / 3**0.5)
