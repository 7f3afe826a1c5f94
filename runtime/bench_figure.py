"""What a measured server looks like: throughput and latency against the number of requests at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.evaluation.chart import Axis, Panel, figure

HEIGHT = 260
CONCURRENCY = "max_concurrency"


def serving_figure(servers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """An SVG of three panels: tokens a second; the time to the first token; the time between tokens. ``servers`` names
    the results of ``relinear bench serving`` of each, one a concurrency; one server alone needs no name."""
    panels = [
        _panel("Throughput", servers, {"": "output_throughput"}, "tokens a second", 0, log=False),
        _panel(
            "Time to the first token",
            servers,
            {"median": "median_ttft_ms", "99 %": "p99_ttft_ms"},
            "milliseconds",
            HEIGHT,
        ),
        _panel(
            "Time per token after the first",
            servers,
            {"median": "median_tpot_ms", "99 %": "p99_tpot_ms"},
            "milliseconds",
            2 * HEIGHT,
        ),
    ]
    return figure(panels, "Throughput and latency against the number of requests at a time")


def _panel(
    title: str,
    servers: Mapping[str, Sequence[Mapping[str, Any]]],
    shown: Mapping[str, str],
    unit: str,
    top: float,
    log: bool = True,
) -> Panel:
    results = [result for rows in servers.values() for result in rows]
    values = [result[key] for result in results for key in shown.values() if result[key] is not None]
    panel = Panel(
        title,
        Axis.around([result[CONCURRENCY] for result in results], "requests at a time", log=True),
        Axis.around(values, unit, log=log, zero=not log),
        top=top,
    )
    ends = []
    for colour, (server, rows) in enumerate(servers.items()):
        for place, (kind, key) in enumerate(shown.items()):
            points = [(row[CONCURRENCY], row[key]) for row in rows if row[key] is not None]
            panel.line(points, colour if server else place)
            for x, y in points:
                panel.point(x, y, colour if server else place, hint=f"{server} {kind} {x:g}: {y:.4g}".strip())
            name = ", ".join(part for part in (server, kind) if part)
            if points and name:
                ends.append((*points[-1], name))
    panel.labels(ends)
    return panel
