"""Means and quantiles over tokens, each with a standard error.

Tokens of one window are not independent: a hard passage is hard for many tokens in a row. So the standard errors are
*clustered by window*: the window is the unit that is drawn, and only what differs between windows counts. They say how much
the number would change on other text of the same kind, not how far two runs on the same text may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, ``None`` where a single window does not tell."""

    value: float
    standard_error: float | None

    def map(self, function: Callable[[float], float], slope: float) -> Estimate:
        """A function of the number; ``slope`` is its derivative there (the delta method)."""
        error = None if self.standard_error is None else abs(slope) * self.standard_error
        return Estimate(function(self.value), error)

    def data(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.standard_error}

    def __str__(self) -> str:
        error = "?" if self.standard_error is None else f"{self.standard_error:.2g}"
        return f"{self.value:.5g} ± {error}"


def ratio(numerator: Tensor, denominator: Tensor, clusters: Tensor) -> Estimate:
    """Sum over sum. Both ``[tokens]``, ``clusters [tokens]`` the window of each.

    Source: the linearised variance of a ratio under cluster sampling, e.g. Cochran, Sampling Techniques, 6.3.
    """
    numerator, denominator = numerator.double(), denominator.double()
    total = denominator.sum()
    value = numerator.sum() / total
    count = int(clusters.max()) + 1
    residuals = torch.zeros(count, dtype=torch.float64).index_add_(0, clusters, numerator - value * denominator)
    if count < 2:
        return Estimate(value.item(), None)
    return Estimate(value.item(), (count / (count - 1) * residuals.square().sum()).sqrt().item() / total.item())


def mean(values: Tensor, clusters: Tensor) -> Estimate:
    return ratio(values, torch.ones_like(values), clusters)


def root_mean_square(values: Tensor, clusters: Tensor) -> Estimate:
    square = mean(values.double().square(), clusters)
    return square.map(math.sqrt, 0.5 / math.sqrt(square.value) if square.value else 0.0)


def quantile(values: Tensor, share: float, clusters: Tensor) -> Estimate:
    """The value below which ``share`` of the tokens lie. Its standard error is half the distance between the quantiles at
    the ends of one standard error of that share (Woodruff 1952)."""
    ordered = values.double().sort().values

    def at(part: float) -> float:
        place = min(max(part, 0.0), 1.0) * (len(ordered) - 1)
        low, high = ordered[math.floor(place)].item(), ordered[math.ceil(place)].item()
        return low + (high - low) * (place - math.floor(place))

    value = at(share)
    error = mean((values.double() <= value).double(), clusters).standard_error
    return Estimate(value, None if error is None else (at(share + error) - at(share - error)) / 2)
