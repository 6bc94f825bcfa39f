"""The table of chunk execution as one HTML page with charts: no script, no network, no other file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from dcqfa_ros.atomic import replace_file
from dcqfa_ros.bench.chunking import NotRun
from dcqfa_ros.bench.chunking_record import Settings
from dcqfa_ros.bench.chunking_table import MARGIN, Difference, Row
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.trials.report import CONTENT_POLICY, NOTHING
from dcqfa_ros.trials.report_style import STYLE

Point = tuple[float, float, tuple[float, float] | None]  # x, y, interval of y

# Light and dark: grey for the method that waits, warm for those that ignore the old chunk, cool for those that go on.
COLORS = {
    "synchronous": ("#5c6878", "#97a4b5"),
    "asynchronous": ("#c22f3d", "#ff7e88"),
    "ensemble": ("#b26a00", "#f0b35a"),
    "soft": ("#2f6bea", "#6c9bff"),
    "guided": ("#7a3fc0", "#b794ff"),
    "trained": ("#1d8a4e", "#58cb8c"),
}
_CHARTS_STYLE = (
    "".join(f".m-{name} {{ --c: {light}; }}\n" for name, (light, _) in COLORS.items())
    + "@media (prefers-color-scheme: dark) {\n"
    + "".join(f".m-{name} {{ --c: {dark}; }}\n" for name, (_, dark) in COLORS.items())
    + """}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px; }
.charts h3 { font-size: 14.5px; margin: 0 0 8px; }
.charts h3 small { color: var(--soft); font-weight: 450; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 14px; font-size: 13.5px; }
.legend span, td .key { display: inline-flex; align-items: center; gap: 7px; white-space: nowrap; }
.legend i, .key i { width: 16px; height: 4px; border-radius: 2px; background: var(--c); }
.chart .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.chart .whisker { stroke: var(--c); stroke-width: 1.3; opacity: .65; }
.chart .point { fill: var(--card); stroke: var(--c); stroke-width: 2; }
main { max-width: 1400px; }
table { font-size: 14px; }
th, td { padding: 8px 9px; }
td { white-space: nowrap; }
td small { color: var(--soft); }
td small.note { display: block; white-space: normal; min-width: 180px; line-height: 1.35; }
td .within { color: var(--good); }
td .beyond { color: var(--bad); }
tbody tr.first td { border-top: 2px solid var(--line); }
"""
)


def write_page(path: Path, rows: Sequence[Row], not_run: Sequence[NotRun], settings: Settings) -> None:
    """Write the page to ``path``, replacing it as a whole.

    Raises:
        BenchError: the file cannot be written.
    """
    try:
        replace_file(path, render_page(rows, not_run, settings).encode())
    except OSError as error:
        raise BenchError(f"--html {path}: cannot be written ({error.strerror})") from error


def render_page(rows: Sequence[Row], not_run: Sequence[NotRun], settings: Settings) -> str:
    """Return the page as an HTML document."""
    title = "Chunk execution under latency"
    steps = "the bundle's own" if settings.denoising_steps is None else str(settings.denoising_steps)
    facts = (
        ("Policy", settings.bundle),
        ("Variant", settings.variant),
        ("Seeds", f"{settings.first_seed} to {settings.first_seed + settings.seeds - 1}"),
        ("Actions between inferences", str(settings.execution_horizon)),
        ("Denoising steps", steps),
    )
    items = "".join(f"<li><span>{name}</span>{escape(value)}</li>" for name, value in facts)
    charts = (
        ("Score", "mean over seeds, 95 % interval", lambda r: (r.score, r.interval)),
        ("Jump between old and new chunk", "px, mean", lambda r: (r.discontinuity, None)),
        ("Jerk of the commanded targets", "px/s³, mean over seeds", lambda r: (r.jerk, r.jerk_interval)),
        ("Jerk of the arm", "px/s³, mean over seeds", lambda r: (r.agent_jerk, r.agent_jerk_interval)),
    )
    methods = list(dict.fromkeys(row.method for row in rows))
    keys = "".join(f'<span class="m-{name}"><i></i>{name}</span>' for name in methods)
    cards = "".join(f'<div class="card">{_chart(rows, *chart)}</div>' for chart in charts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        f"<title>{title}</title><style>{STYLE}{_CHARTS_STYLE}</style></head><body><main>"
        f'<h1>{title}</h1><ul class="facts">{items}</ul><h2>Latency against score and smoothness</h2>'
        f'<div class="legend">{keys}</div><div class="charts">{cards}</div><h2>Table</h2>{_table(rows)}'
        f"{_missing(not_run)}{_footer(settings)}</main></body></html>\n"
    )


def _chart(
    rows: Sequence[Row],
    title: str,
    unit: str,
    value: Callable[[Row], tuple[float | None, tuple[float, float] | None]],
) -> str:
    lines: dict[str, list[Point]] = {}
    for row in rows:
        y, interval = value(row)
        if y is not None:
            lines.setdefault(row.method, []).append((row.delay, y, interval))
    heading = f"<h3>{escape(title)} <small>{escape(unit)}</small></h3>"
    if not lines:
        return f"{heading}<p>no figures</p>"
    return heading + line_chart(lines, f"{title}, {unit}, over injected latency in ms")


def line_chart(lines: dict[str, list[Point]], label: str) -> str:
    """Return lines with intervals over latency as inline SVG.

    Args:
        lines: method -> (latency in ms, value, interval of the value), at least one point in all.
        label: what a screen reader says.
    """
    width, height, left, right, top, bottom = 560.0, 300.0, 58.0, 16.0, 12.0, 34.0
    points = [point for line in lines.values() for point in line]
    low = min(min(y, *(interval or (y,))) for _, y, interval in points)
    high = max(max(y, *(interval or (y,))) for _, y, interval in points)
    ticks = nice_ticks(low, high)
    delays = sorted({x for x, _, _ in points})
    span_x, span_y = width - left - right - 24, height - top - bottom

    def px(x: float) -> float:
        return left + 12 + (span_x * (x - delays[0]) / (delays[-1] - delays[0]) if len(delays) > 1 else span_x / 2)

    def py(y: float) -> float:
        return top + span_y * (1 - (y - ticks[0]) / (ticks[-1] - ticks[0]))

    parts = [f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{left:g}" x2="{width - right:g}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
            f'<text class="tick end" x="{left - 7:g}" y="{py(tick) + 3.5:.1f}">{tick:g}</text>'
        )
    for delay in delays:
        parts.append(f'<text class="tick middle" x="{px(delay):.1f}" y="{height - 12:g}">{delay:g} ms</text>')
    for place, (method, line) in enumerate(lines.items()):
        shift = 3.0 * (place - (len(lines) - 1) / 2)  # intervals side by side
        drawn = [(px(x) + shift, py(y), y, x, interval) for x, y, interval in sorted(line, key=lambda p: p[0])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in drawn)
        parts.append(f'<g class="m-{method}"><polyline class="line" points="{path}"/>')
        for x, y, value, delay, interval in drawn:
            text = f"{method}, {delay:g} ms: {value:.4g}"
            if interval is not None:
                text += f" ({interval[0]:.4g} to {interval[1]:.4g})"
                parts.append(
                    f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{py(interval[0]):.1f}" '
                    f'y2="{py(interval[1]):.1f}"/>'
                )
            parts.append(
                f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(text)}</title></circle>'
            )
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers, two to ``most`` + 1, from at most ``low`` to at least ``high``."""
    span = high - low
    if not span > 1e-9 * max(abs(low), abs(high), 1e-3):
        span = abs(high) if abs(high) > 1e-12 else 1.0
        low, high = low - span / 2, high + span / 2
    base = 10.0 ** math.floor(math.log10(span))
    for step in (base * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _table(rows: Sequence[Row]) -> str:
    head = (
        '<th>Method</th><th class="n">Latency</th><th class="n">Score</th><th class="n">Against 0 ms</th>'
        '<th class="n">Against synchronous</th><th class="n">Old to new chunk / p95</th><th class="n">Jerk</th>'
        '<th class="n">Jerk of the arm</th><th class="n">Starved</th><th class="n">Steps</th><th>Variant</th>'
    )
    body, last = [], None
    for row in rows:
        first = ' class="first"' if last not in (None, row.method) else ""
        last = row.method
        note = f'<small class="note">{escape(row.note)}</small>' if row.note else ""
        body.append(
            f'<tr{first}><td><span class="key m-{row.method}"><i></i>{row.method}</span></td>'
            f'<td class="n">{row.delay:g} ms</td>'
            f'<td class="n">{row.score:.3f}{_half(row.score, row.interval, 3)}</td>'
            f'<td class="n">{_loss(row.against_no_delay, judged=True)}</td>'
            f'<td class="n">{_loss(row.against_synchronous)}</td>'
            f'<td class="n">{_plain(row.discontinuity, 1)} / {_plain(row.discontinuity_p95, 1)} px</td>'
            f'<td class="n">{_plain(row.jerk, 0)}</td><td class="n">{_plain(row.agent_jerk, 0)}</td>'
            f'<td class="n">{100 * row.starved_share:.1f} %</td><td class="n">{row.steps:.0f}</td>'
            f"<td>{escape(row.bundle)}/{escape(row.variant)}{note}</td></tr>"
        )
    return f'<div class="table-card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _half(mean: float, interval: tuple[float, float] | None, digits: int) -> str:
    return "" if interval is None else f" <small>± {interval[1] - mean:.{digits}f}</small>"


def _plain(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _loss(difference: Difference | None, judged: bool = False) -> str:
    if difference is None:
        return NOTHING
    mark = ""
    if judged and not difference.within_margin:
        mark = ' class="beyond"'
    elif judged and difference.shown_within_margin:
        mark = ' class="within"'
    return f"<span{mark}>{difference.mean:+.3f}</span>{_half(difference.mean, difference.interval, 3)}"


def _missing(not_run: Sequence[NotRun]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in not_run:
        reasons.setdefault((entry.method.value, entry.reason), []).append(f"{entry.delay:g}")
    return "".join(
        f'<p class="faults"><b>{escape(method)} not run</b> at {", ".join(delays)} ms: {escape(reason)}</p>'
        for (method, reason), delays in reasons.items()
    )


def _footer(settings: Settings) -> str:
    versions = " · ".join(f"{escape(name)} <code>{escape(value)}</code>" for name, value in settings.versions.items())
    margin = f"{MARGIN:g}"
    judged = f" Against 0 ms: green where the whole interval loses less than {margin}, red where the mean loses more."
    return (
        "<footer><p>Closed-loop Push-T in virtual time: every chunk comes the injected latency after its observation "
        "and takes effect at the next control tick; a tick without an action repeats the last target. Score: the "
        "maximum over the episode of coverage / 0.95, clipped to 0 and 1. Intervals are Student's t over seeds with "
        f"95 %, differences are of pairs of one seed.{judged} Jerk: mean size of the third difference per tick, times "
        "the rate cubed. Old to new chunk: distance between what both say for the first action taken from the new "
        f"one.</p><p>{versions}</p></footer>"
    )
