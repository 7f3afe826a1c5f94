"""What a measured server looks like: throughput and latency against the number of requests at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.evaluation.chart import Axis, Panel, figure

HEIGHT = 260
WIDTH = 720
CONCURRENCY = "max_concurrency"
PANELS = (
    ("Throughput", "tokens a second", {"": "output_throughput"}),
    ("Time to the first token", "milliseconds", {"median": "median_ttft_ms", "99 %": "p99_ttft_ms"}),
    ("Time per token after the first", "milliseconds", {"median": "median_tpot_ms", "99 %": "p99_tpot_ms"}),
)

Results = Sequence[Mapping[str, Any]]
"""Of one server, by ``relinear bench serving``, one a concurrency."""


def serving_figure(results: Results) -> str:
    """An SVG of three panels: throughput, time to the first token, time per token; medians and what 99 % stay below."""
    return _figure([{kind: (results, key) for kind, key in shown.items()} for _, _, shown in PANELS])


def comparison_figure(servers: Mapping[str, Results]) -> str:
    """The same of several servers by name, without the 99 %."""
    return _figure(
        [{server: (rows, next(iter(shown.values()))) for server, rows in servers.items()} for _, _, shown in PANELS]
    )


def _figure(panels: Sequence[Mapping[str, tuple[Results, str]]]) -> str:
    drawn = []
    for place, ((title, unit, _), curves) in enumerate(zip(PANELS, panels, strict=True)):
        curves_at = {
            name: [(row[CONCURRENCY], row[key]) for row in rows if row[key] is not None]
            for name, (rows, key) in curves.items()
        }
        drawn.append(curve_panel(title, curves_at, "requests at a time", unit, place * HEIGHT))
    return figure(drawn, "Throughput and latency against the number of requests at a time")


def curve_panel(
    title: str, curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, top: float = 0
) -> Panel:
    """Named curves over a logarithmic axis that is marked where they have points."""
    x_axis = Axis.marked([x for points in curves.values() for x, _ in points], across)
    y_axis = Axis.around([1.06 * y for points in curves.values() for _, y in points], up, zero=True)
    panel = Panel(title, x_axis, y_axis, top=top, width=WIDTH, height=HEIGHT)
    for colour, (name, points) in enumerate(curves.items()):
        panel.curve(points, colour, name)
    panel.legend([(colour, name) for colour, name in enumerate(curves) if name])
    return panel
