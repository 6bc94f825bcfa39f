"""Charts of the trial report as inline SVG: no scripts, no fonts, colours from the page's CSS variables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dcqfa_ros.sim.tee import SUCCESS_COVERAGE
from dcqfa_ros.trials.statistics import Interval


def coverage_chart(curve: Sequence[float], seconds_per_step: float, label: str) -> str:
    """Return the coverage (0..1) after each step over time, with the 0.95 threshold and the best value marked.

    Args:
        curve: coverage per step; may be empty.
        seconds_per_step: duration of a step, s.
        label: what a screen reader says.
    """
    width, height, left, right, top, bottom = 560.0, 220.0, 38.0, 14.0, 14.0, 30.0
    span_x, span_y = width - left - right, height - top - bottom
    steps = max(len(curve), 1)

    def x(step: float) -> float:
        return left + span_x * step / steps

    def y(coverage: float) -> float:
        return top + span_y * (1.0 - coverage)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">',
    ]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<line class="grid" x1="{left:g}" x2="{width - right:g}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text class="tick end" x="{left - 7:g}" y="{y(value) + 3.5:.1f}">{value:.2f}</text>')
    for second in _ticks(steps * seconds_per_step):
        at = x(second / seconds_per_step)
        parts.append(f'<text class="tick middle" x="{at:.1f}" y="{height - 10:g}">{second:g} s</text>')
    limit = y(SUCCESS_COVERAGE)
    if curve:
        points = [(x(step + 1), y(min(max(value, 0.0), 1.0))) for step, value in enumerate(curve)]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(
            f'<polygon class="area" points="{points[0][0]:.1f},{y(0):.1f} {line} {points[-1][0]:.1f},{y(0):.1f}"/>'
        )
        parts.append(f'<polyline class="curve" points="{line}"/>')
    parts.append(f'<line class="limit" x1="{left:g}" x2="{width - right:g}" y1="{limit:.1f}" y2="{limit:.1f}"/>')
    parts.append(
        f'<text class="limit-label" x="{left + 6:g}" y="{limit + 12:.1f}">success above {SUCCESS_COVERAGE:g}</text>'
    )
    if curve:
        best = max(range(len(curve)), key=lambda step: curve[step])
        px, py = points[best]
        anchor = "end" if px > width - 150 else "start"
        shift = -9 if anchor == "end" else 9
        text_y = py + 18 if py < limit + 24 else py - 8
        parts.append(f'<circle class="best" cx="{px:.1f}" cy="{py:.1f}" r="4"/>')
        place = f'class="best-label {anchor}" x="{px + shift:.1f}" y="{text_y:.1f}"'
        parts.append(f"<text {place}>best coverage {curve[best]:.3f}</text>")
    parts.append("</svg>")
    return "".join(parts)


def score_strip(scores: Sequence[float], mean: Interval) -> str:
    """Return all scores as dots on one axis from 0 to 1, equal ones stacked, with the mean and its interval."""
    width, left, right, radius = 1000.0, 24.0, 24.0, 5.5
    span = width - left - right
    bins: dict[int, int] = {}
    dots = []
    columns = int(span // (2 * radius + 1))
    for score in sorted(scores):
        column = min(int(score * columns), columns - 1)
        level = bins.get(column, 0)
        bins[column] = level + 1
        dots.append((left + span * (column + 0.5) / columns, level))
    tallest = max(bins.values(), default=1)
    axis = 26.0 + tallest * (2 * radius + 1)
    height = axis + 26.0

    def x(score: float) -> float:
        return left + span * min(max(score, 0.0), 1.0)

    label = f"Scores of {len(scores)} trials, mean {mean.estimate:.3f}"
    parts = [f'<svg class="chart strip" viewBox="0 0 {width:g} {height:.0f}" role="img" aria-label="{label}">']
    if mean.low is not None and mean.high is not None:
        parts.append(
            f'<rect class="band" x="{x(mean.low):.1f}" y="18" width="{x(mean.high) - x(mean.low):.1f}" '
            f'height="{axis - 18:.1f}" rx="3"/>'
        )
    parts.append(f'<line class="axis" x1="{left:g}" x2="{width - right:g}" y1="{axis:.1f}" y2="{axis:.1f}"/>')
    for tick in range(0, 11, 2):
        parts.append(f'<text class="tick middle" x="{x(tick / 10):.1f}" y="{axis + 18:.1f}">{tick / 10:.1f}</text>')
    parts.append(
        f'<line class="mean" x1="{x(mean.estimate):.1f}" x2="{x(mean.estimate):.1f}" y1="18" y2="{axis:.1f}"/>'
    )
    anchor = "end" if mean.estimate > 0.9 else "start" if mean.estimate < 0.1 else "middle"
    parts.append(f'<text class="mean-label {anchor}" x="{x(mean.estimate):.1f}" y="12">mean {mean.estimate:.3f}</text>')
    for px, level in dots:
        py = axis - 3 - radius - level * (2 * radius + 1)
        parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="{radius:g}"/>')
    parts.append("</svg>")
    return "".join(parts)


def _ticks(seconds: float) -> list[float]:
    """Return round times from 0 to ``seconds`` for an axis, at most seven."""
    for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if seconds / step <= 6:
            return [step * number for number in range(int(seconds / step + 1e-9) + 1)]
    return [0.0, seconds]
