"""A comparison as one HTML page: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from dcqfa_ros.trials.report import CONTENT_POLICY, NOTHING
from dcqfa_ros.trials.report_style import STYLE
from training.compare.report import cost_text, devices, groups, latency_text, signed, with_interval, within_text

_STYLE = """
main { max-width: 1440px; }
table { font-size: 14px; }
th, td { padding: 8px 10px; vertical-align: top; }
td.w { white-space: nowrap; }
td small { color: var(--soft); display: block; }
h2 + p, h3 + p { color: var(--soft); margin: -6px 0 12px; max-width: 90ch; }
h3 { font-size: 15px; margin: 22px 0 10px; }
.forest { width: 210px; height: 22px; display: block; }
.forest .zero { stroke: var(--soft); }
.forest .margin { stroke: var(--warn); stroke-dasharray: 3 2; }
.forest .span { stroke: var(--accent); stroke-width: 3; stroke-linecap: round; }
.forest .dot { fill: var(--accent); }
.forest .out { fill: var(--accent); }
.notes li { margin-bottom: 5px; max-width: 110ch; }
"""
_GOOD = {"better", "non-inferior", "found", "worse, within the margin"}
_BAD = {"worse by more than the margin", "not found", "worse"}
REACH = 0.25  # difference at the ends of the drawn axis
WIDTH, HEIGHT = 210.0, 22.0


def render(document: dict[str, Any]) -> str:
    """The whole comparison as an HTML document."""
    title = f"Comparison {document['name']}"
    facts = (
        ("Reference", document["reference"]),
        ("Margin", f"{document['margin']:g}"),
        ("Latency of", devices(document)),
        ("Written", document["written"]),
    )
    items = "".join(f"<li><span>{escape(name)}</span>{escape(value)}</li>" for name, value in facts)
    parts = [_group(heading, of, document) for heading, of in groups(document)]
    parts += [_pairs(document), _claims(document["claims"]), _amortised(document["amortised"])]
    parts += [_reproduced(document.get("reproduces") or [])]
    notes = "".join(f"<li>{escape(note)}</li>" for note in document["notes"])
    versions = " · ".join(f"{escape(k)} <code>{escape(v)}</code>" for k, v in document["versions"].items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><ul class="facts">{items}</ul>{"".join(parts)}'
        f'<h2>Notes</h2><ul class="notes">{notes}</ul><footer><p>{versions}</p></footer></main></body></html>\n'
    )


def _group(heading: str, of: Sequence[dict[str, Any]], document: dict[str, Any]) -> str:
    body = []
    for row in of:
        size, against = row["size"], row["difference"]
        paper = NOTHING if row["paper"] is None else f"{row['paper']:.3f}"
        reference = row["entry"] == document["reference"]
        body.append(
            [
                f"{escape(row['method'])}<small>{escape(row['entry'])}</small>",
                escape(row["bits"].upper()),
                escape(with_interval(row["mean"], row["ci95"])).replace("+-", "±"),
                "reference" if reference else escape(signed(against)),
                "" if against is None else forest(against),
                "" if against is None else _shows(against),
                f"{size['paper_mib']:.2f}",
                f"{size['artifact_mib']:.2f}<small>{escape(size['artifact_of'])}</small>",
                escape(latency_text(row["latency"])),
                escape(cost_text(row["cost"])),
                paper,
            ]
        )
    head = (
        "Method", "Bits", "Score", "Difference, 95 %", "", "Margin", "MiB, paper's", "MiB, artifact", "Latency",
        "Training", "Paper",
    )  # fmt: skip
    return f"<h2>{escape(heading[:1].upper() + heading[1:])}</h2>{_table(head, body)}"


def forest(row: dict[str, Any]) -> str:
    """A paired difference on an axis from -0.25 to +0.25, with zero and the margin marked."""
    middle = HEIGHT / 2

    def x(value: float) -> float:
        return WIDTH * (min(max(value, -REACH), REACH) + REACH) / (2 * REACH)

    label = escape(f"difference {signed(row)}")
    parts = [f'<svg class="forest" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">']
    for name, value in (("zero", 0.0), ("margin", -row["margin"])):
        parts.append(f'<line class="{name}" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="1" y2="{HEIGHT - 1:g}"/>')
    if row["low"] is not None:
        ends = f'x1="{x(row["low"]):.1f}" x2="{x(row["high"]):.1f}"'
        parts.append(f'<line class="span" {ends} y1="{middle:g}" y2="{middle:g}"/>')
    if abs(row["mean"]) <= REACH:
        parts.append(f'<circle class="dot" cx="{x(row["mean"]):.1f}" cy="{middle:g}" r="4.5"/>')
    else:  # beyond the axis
        tip, base = (1.0, 8.0) if row["mean"] < 0 else (WIDTH - 1.0, WIDTH - 8.0)
        points = f"{tip:g},{middle:g} {base:g},{middle - 5:g} {base:g},{middle + 5:g}"
        parts.append(f'<polygon class="out" points="{points}"/>')
    return "".join([*parts, "</svg>"])


def _pairs(document: dict[str, Any]) -> str:
    if not document["pairs"]:
        return ""
    body = [
        [escape(p["first"]), escape(p["second"]), escape(p["task"]), escape(p["seeds"]), escape(signed(p)), forest(p),
         _shows(p)]
        for p in document["pairs"]
    ]  # fmt: skip
    head = ("First", "Second", "Task", "Seeds", "Difference, 95 %", "", "Shows")
    return f"<h2>Pairs</h2>{_table(head, body)}"


def _claims(claims: Sequence[dict[str, Any]]) -> str:
    if not claims:
        return ""
    order = {"found": 0, "not found": 1, "not measured": 2}
    body = []
    for claim in sorted(claims, key=lambda claim: order[claim["verdict"]]):
        pair = f"{claim['first']} - {claim['second']}, {claim['task']}, {claim['seeds']}"
        opposite = "<small>the opposite is found</small>" if claim["opposite_found"] else ""
        paper = NOTHING if claim["paper_difference"] is None else f"{claim['paper_difference']:+.3f}"
        body.append(
            [_pill(claim["verdict"]) + opposite, f"{escape(claim['text'])}<small>{escape(claim['source'])}</small>",
             paper, f"{escape(signed(claim['difference']))}<small>{escape(pair)}</small>",
             "" if claim["difference"] is None else forest(claim["difference"])]
        )  # fmt: skip
    head = ("Verdict", "Claim", "Paper", "Ours: difference, 95 %", "")
    return (
        "<h2>What the paper claims</h2><p>A claim is found where the whole 95 % interval lies where it says.</p>"
        f"{_table(head, body)}"
    )


def _amortised(costs: dict[str, Any] | None) -> str:
    if costs is None:
        return ""
    both = zip(costs["steps"]["rows"], costs["hours"]["rows"], strict=True)
    body = [
        [str(s["devices"]), f"{s['supernet']:,.0f}", f"{s['fixed_bit']:,.0f}", f"{h['supernet']:.2f}",
         f"{h['fixed_bit']:.2f}"]
        for s, h in both
    ]  # fmt: skip
    head = ("Devices", "Supernet, steps", "Fixed bits, steps", "Supernet, h", "Fixed bits, h")
    words = []
    for unit in ("steps", "hours"):
        needed = costs[unit]["break_even"]
        words.append(f"in {unit} {f'from {needed} devices on' if needed else 'for no number of devices'}")
    sources = "".join(
        f"<li>{escape(kind.replace('_', ' '))}: {escape(r['name'])}, {r['steps']:,} steps, {r['hours']:.3f} h "
        f"({escape(r['source'])})</li>"
        for kind, runs in costs["sources"].items()
        for r in runs
    )
    return (
        "<h2>One supernet against one training per device</h2>"
        f"<p>The supernet costs no more {escape(' and '.join(words))}. On {escape(costs['machine'])}.</p>"
        f'{_table(head, body)}<ul class="notes">{sources}</ul>'
    )


def _reproduced(of: Sequence[dict[str, Any]]) -> str:
    if not of:
        return ""
    body = [
        [escape(r["entry"]), escape(r["task"]), escape(r["seeds"]), f"{r['mean']:.3f}",
         escape(with_interval(r["committed"], r["committed_ci95"])).replace("+-", "±"),
         _pill("within" if r["within"] else "outside") if r["differs"] is None else escape(within_text(r))]
        for r in of
    ]  # fmt: skip
    head = ("Entry", "Task", "Seeds", "Now", "Committed", "")
    return f"<h2>Against the committed table</h2>{_table(head, body)}"


def _shows(row: dict[str, Any]) -> str:
    return NOTHING if row["shows"] is None else _pill(row["shows"])


def _pill(text: str) -> str:
    kind = "good" if text in _GOOD or text == "within" else "bad" if text in _BAD or text == "outside" else "warn"
    return f'<span class="pill {kind}">{escape(text)}</span>'


def _table(head: Iterable[str], body: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f'<td class="w">{cell}</td>' for cell in cells) + "</tr>" for cells in body)
    return f'<div class="table-card"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
