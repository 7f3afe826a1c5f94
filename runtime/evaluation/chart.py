"""Just enough SVG: panels with axes, points, lines and bars. Colours are CSS variables, so that a figure suits a light and a
dark page alike, also where it is shown as an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
svg { --ink: #24292f; --quiet: #6e7781; --line: #d0d7de; --paper: #ffffff; font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --quiet: #9198a1; --line: #3d444d; --paper: #0d1117; } }
text { fill: var(--ink); } .quiet { fill: var(--quiet); } .title { font-weight: 600; font-size: 13px; }
.grid { stroke: var(--line); stroke-width: 1; } .paper { fill: var(--paper); }
.c0 { --c: #0969da; } .c1 { --c: #bc4c00; } .c2 { --c: #1a7f37; } .c3 { --c: #8250df; } .c4 { --c: #bf3989; }
@media (prefers-color-scheme: dark) {
  .c0 { --c: #58a6ff; } .c1 { --c: #f0883e; } .c2 { --c: #3fb950; } .c3 { --c: #bc8cff; } .c4 { --c: #f778ba; } }
.fill { fill: var(--c); } .stroke { stroke: var(--c); fill: none; stroke-width: 1.5; }
"""

LEFT, TOP, BOTTOM, RIGHT = 74, 34, 44, 18
GAPS, SHIFTS = (8, 30, 60, 90, 130), [13 * step for step in range(-8, 9)]
"""Pixels across and up or down that a name may be from its point."""
CHARACTER = 7.2
"""Pixels that a character of a name may take, in a wide font."""


@dataclass(frozen=True)
class Axis:
    """A range of values on a line of pixels; logarithmic if ``log``. ``marks`` are ticks to show instead of round numbers."""

    low: float
    high: float
    title: str
    log: bool = False
    marks: tuple[float, ...] = ()

    @classmethod
    def around(cls, values: Sequence[float], title: str, log: bool = False, zero: bool = False) -> Axis:
        """The range of some values, with a margin. Those that a logarithm cannot show are left out."""
        shown = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = (0.0 if zero else min(shown)), max(shown)
        if log:
            room = (high / low) ** 0.06 if high > low else 1.5
            return cls(low / room, high * room, title, log)
        room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        return cls(low if zero else low - room, high + room, title)

    @classmethod
    def marked(cls, values: Sequence[float], title: str, room: float = 1.15) -> Axis:
        """A logarithmic axis with a tick at each value; ``room`` times the largest one is where it ends."""
        places = sorted(set(values))
        return cls(places[0] / 1.15, places[-1] * room, title, log=True, marks=tuple(places))

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end, clamped."""
        if self.log:
            value = max(value, self.low)
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(max(part, 0.0), 1.0)

    def ticks(self) -> list[float]:
        if self.marks:
            every = list(self.marks)
        elif self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if len(powers) > 4 else (1, 3) if self.high > 30 * self.low else (1, 2, 3, 4, 5, 6, 8)
            every = [step * 10.0**power for power in powers for step in steps]
        else:
            step = 10 ** math.floor(math.log10(self.high - self.low))
            step *= next(f for f in (0.1, 0.2, 0.5, 1, 2) if (self.high - self.low) / (f * step) <= 7)
            every = [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [tick for tick in every if self.low <= tick <= self.high]


class Panel:
    """One pair of axes at a height of the figure."""

    def __init__(self, title: str, x: Axis, y: Axis, top: float = 0, width: float = 720, height: float = 260):
        self.x, self.y = x, y
        self.left, self.right = LEFT, width - RIGHT
        self.top, self.bottom = top + TOP, top + height - BOTTOM
        self.parts = [f'<text class="title" x="{LEFT}" y="{top + 20:.0f}">{escape(title)}</text>']
        for tick in x.ticks():
            at = self.across(tick)
            self.parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{self.top}" y2="{self.bottom}"/>')
            self._text(at, self.bottom + 16, f"{tick:g}", "middle", "quiet")
        for tick in y.ticks():
            at = self.up(tick)
            self.parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            self._text(self.left - 7, at + 4, f"{tick:g}", "end", "quiet")
        self._text((self.left + self.right) / 2, self.bottom + 34, x.title, "middle", "")
        middle = (self.top + self.bottom) / 2
        self.parts.append(
            f'<text text-anchor="middle" transform="translate(16 {middle:.0f}) rotate(-90)">{escape(y.title)}</text>'
        )

    def across(self, value: float) -> float:
        return self.left + self.x.place(value) * (self.right - self.left)

    def up(self, value: float) -> float:
        return self.bottom - self.y.place(value) * (self.bottom - self.top)

    def _text(self, x: float, y: float, text: str, anchor: str, kind: str) -> None:
        kind = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>')

    def bar(self, low: float, high: float, value: float, colour: int = 0, hint: str = "") -> None:
        left, right, top = self.across(low), self.across(high), self.up(value)
        self.parts.append(
            f'<rect class="fill c{colour}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
            f'height="{self.bottom - top:.1f}"><title>{escape(hint)}</title></rect>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: int = 0) -> None:
        path = " ".join(f"{self.across(x):.1f},{self.up(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="stroke c{colour}" points="{path}"/>')

    def point(self, x: float, y: float, colour: int = 0, hint: str = "") -> None:
        self.parts.append(
            f'<circle class="fill c{colour}" cx="{self.across(x):.1f}" cy="{self.up(y):.1f}" r="4">'
            f"<title>{escape(hint)}</title></circle>"
        )

    def curve(self, points: Sequence[tuple[float, float]], colour: int = 0, name: str = "") -> None:
        """A line with its points, which say what they are."""
        self.line(sorted(points), colour)
        for x, y in points:
            self.point(x, y, colour, hint=f"{name} {x:g}: {y:.4g}".strip())

    def legend(self, names: Sequence[tuple[int, str]]) -> None:
        """What the colours stand for, at the right of the title."""
        end = self.right
        for colour, name in reversed(names):
            end -= CHARACTER * len(name)
            self._text(end, self.top - 14, name, "start", "")
            self.parts.append(f'<circle class="fill c{colour}" cx="{end - 9:.1f}" cy="{self.top - 18:.1f}" r="4"/>')
            end -= 28

    def labels(self, entries: Sequence[tuple[float, float, str]]) -> None:
        """Names beside points, as near as none covers another or a point; a line leads to those that had to move."""
        points = [(self.across(x), self.up(y), name) for x, y, name in entries]
        taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
        for x, y, name in sorted(points, key=lambda point: (point[1], point[0])):
            wide = CHARACTER * len(name)
            starts = [(start, gap) for gap in GAPS for start in (x + gap, x - gap - wide)]
            near = sorted(((gap + abs(shift), -start, y + shift) for start, gap in starts for shift in SHIFTS))
            boxes = [(-start, middle - 6, wide - start, middle + 6) for _, start, middle in near]
            free = (box for box in boxes if self._inside(box) and not any(_overlap(box, other) for other in taken))
            box = next(free, boxes[0])
            taken.append(box)
            if box not in boxes[:2]:
                end = box[0] - 2 if box[0] > x else box[2] + 2
                self.parts.append(
                    f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{box[1] + 6:.1f}"/>'
                )
            at_left = box[0] < x
            self._text(box[2] if at_left else box[0], box[1] + 10, name, "end" if at_left else "start", "quiet")

    def _inside(self, box: tuple[float, float, float, float]) -> bool:
        return self.left <= box[0] and box[2] <= self.right and self.top <= box[1] and box[3] <= self.bottom


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def figure(panels: Sequence[Panel], description: str, width: float = 720) -> str:
    """The whole SVG; ``description`` is what a screen reader says."""
    height = max(panel.bottom for panel in panels) + BOTTOM + 6
    body = "\n".join(part for panel in panels for part in panel.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(description)}">\n<style>{STYLE}</style>\n'
        f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>\n{body}\n</svg>\n'
    )
