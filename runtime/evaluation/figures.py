"""What a comparison looks like: the histogram of KL, KL by position, the error of every layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from runtime.evaluation.chart import Axis, Panel, figure

if TYPE_CHECKING:
    from runtime.evaluation.compare import Comparison

BINS = 48
SMALLEST = 1e-9
HEIGHT = 260
NAME = 30
"""Characters."""


def comparison_figure(comparison: Comparison) -> str:
    """An SVG of three panels; the last is left out where layers were not compared."""
    panels = [_histogram(comparison), _by_position(comparison)]
    if comparison.layers:
        panels.append(_by_layer(comparison))
    said = f"{comparison.candidate} against {comparison.reference}: mean KL {comparison.mean_kl}"
    return figure(panels, said)


def _histogram(comparison: Comparison) -> Panel:
    exponents = comparison.per_token.clamp(min=SMALLEST).log10()
    low, high = math.floor(exponents.min().item()), math.ceil(exponents.max().item())
    high = max(high, low + 1)
    counts = torch.histc(exponents, BINS, low, high) / len(exponents)
    edges = [10 ** (low + (high - low) * k / BINS) for k in range(BINS + 1)]
    panel = Panel(
        f"{_end(comparison.candidate)} against {_end(comparison.reference)}: mean KL {comparison.mean_kl.value:.3g}",
        Axis(10.0**low, 10.0**high, "KL divergence of a token [nat]", log=True),
        Axis.around([1.12 * counts.max().item()], "share of tokens", zero=True),
    )
    for place, share in enumerate(counts.tolist()):
        if share:
            panel.bar(edges[place], edges[place + 1], share, hint=f"{edges[place]:.1e}: {100 * share:.2f} %")
    for name, value in (("median", comparison.median_kl.value), ("99 %", comparison.kl_99.value)):
        panel.line([(value, panel.y.low), (value, panel.y.high)], colour=1)
        panel.labels([(value, panel.y.high * 0.97, name)])
    return panel


def _end(label: str) -> str:
    """As much of a name as a title has room for twice; paths differ at their end."""
    return label if len(label) <= NAME else f"…{label[1 - NAME :]}"


def _by_position(comparison: Comparison) -> Panel:
    points = list(comparison.kl_by_position)
    panel = Panel(
        "By position in the window: a rise is an error that grows with the context",
        Axis.around([place for place, _ in points], "position of the predicted token"),
        Axis.around([value for _, value in points], "mean KL [nat]", zero=True),
        top=HEIGHT,
    )
    panel.line(points)
    for place, value in points:
        panel.point(place, value, hint=f"from {place}: {value:.3g}")
    return panel


def _by_layer(comparison: Comparison) -> Panel:
    """Layers that agree to the bit have no bar that could be drawn; they are shown as high as the best. Likewise the worst."""
    finite = [layer.sqnr for layer in comparison.layers if math.isfinite(layer.sqnr)] or [0.0]
    count = len(comparison.layers)
    panel = Panel(
        "By layer, each given the reference's input: the lowest is the worst",
        Axis(-0.5, count - 0.5, "decoder layer"),
        Axis.around([*finite, 0.0], "SQNR of its update [dB]", zero=min(finite) >= 0),
        top=2 * HEIGHT,
    )
    worst = min(comparison.layers, key=lambda layer: layer.sqnr)
    for place, layer in enumerate(comparison.layers):
        value = min(max(layer.sqnr, min(finite)), max(finite))
        colour = 1 if layer is worst else 0
        panel.bar(place - 0.4, place + 0.4, value, colour, hint=f"{layer.name}: {layer.sqnr:.1f} dB")
    return panel
