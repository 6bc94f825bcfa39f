"""The trial report: one HTML file with everything in it. It needs no network, no script and no other file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from dcqfa_ros.atomic import replace_file
from dcqfa_ros.trials.charts import coverage_chart, score_strip
from dcqfa_ros.trials.records import TrialMode, TrialRecord, TrialSummary, TrialSwap
from dcqfa_ros.trials.report_style import STYLE
from dcqfa_ros.trials.statistics import mean_interval, wilson_interval
from dcqfa_ros.trials.video import TrialVideo

# How a healthy trial ends, and the colour of that; every other stop reason is a fault.
NORMAL_ENDS = {"success": "good", "step_limit": "", "operator": "warn", "shutdown": "warn"}
NOTHING = "\u2013"  # a dash where there is no number
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def write_report(
    path: Path,
    title: str,
    records: Sequence[TrialRecord],
    summary: TrialSummary,
    videos: Mapping[int, TrialVideo] | None = None,
    seconds_per_step: float = 0.1,
) -> None:
    """Write the report of ``records`` to ``path``, replacing it as a whole; arguments as in ``render_report``.

    Raises:
        ValueError: there are no records, or a video belongs to none of them.
        OSError: the file cannot be written.
    """
    replace_file(path, render_report(title, records, summary, videos, seconds_per_step).encode())


def render_report(
    title: str,
    records: Sequence[TrialRecord],
    summary: TrialSummary,
    videos: Mapping[int, TrialVideo] | None = None,
    seconds_per_step: float = 0.1,
) -> str:
    """Return the report as an HTML document.

    Args:
        title: heading of the page.
        records: the trials, in the order shown.
        summary: their summary (``records.summarize``).
        videos: video per index into ``records``; trials without one are shown without.
        seconds_per_step: duration of a control step, s.

    Raises:
        ValueError: there are no records, or a video belongs to none of them.
    """
    if not records:
        raise ValueError("report: expected at least one trial, got none")
    films = {} if videos is None else videos
    unknown = sorted(set(films) - set(range(len(records))))
    if unknown:
        raise ValueError(f"report: videos for trials {unknown}, but there are only trials 0 to {len(records) - 1}")
    scores = [record.score for record in records]
    rows = "".join(_row(index, record) for index, record in enumerate(records))
    trials = "".join(_trial(index, r, films.get(index), seconds_per_step) for index, r in enumerate(records))
    strip = ""
    if len(records) > 1:
        strip = f'<h2>Scores</h2><div class="card">{score_strip(scores, mean_interval(scores))}</div>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{_facts(records, summary)}{_tiles(records)}{_faults(records)}{strip}"
        '<h2>Trials</h2><div class="table-card"><table><thead><tr><th>Seed</th><th>Score</th><th>Ended by</th>'
        '<th class="n">Steps</th><th>Mode</th><th class="n">Chunks</th><th class="n">Inference p50 / p99</th>'
        '<th class="n">Missed</th><th class="n">Starved</th></tr></thead>'
        f'<tbody>{rows}</tbody></table></div><h2>Coverage over time</h2><div class="trials">{trials}</div>'
        f"{_footer(summary)}</main></body></html>\n"
    )


def _facts(records: Sequence[TrialRecord], summary: TrialSummary) -> str:
    cells = ", ".join(dict.fromkeys(record.cell for record in records))
    started = min(record.started for record in records).replace("T", " ").split(".")[0].split("+")[0]
    facts = (
        ("Policy", summary.bundle),
        ("Variant", summary.variant),
        ("Cell", cells),
        ("Device", summary.device),
        ("Started", f"{started} UTC"),
    )
    items = "".join(f"<li><span>{name}</span>{escape(value)}</li>" for name, value in facts)
    return f'<ul class="facts">{items}</ul>'


def _tile(name: str, value: str, unit: str, note: str) -> str:
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)}{small}</div>'
        f'<div class="note">{escape(note)}</div></div>'
    )


def _tiles(records: Sequence[TrialRecord]) -> str:
    mean = mean_interval([record.score for record in records])
    successes = sum(record.success for record in records)
    rate = wilson_interval(successes, len(records))
    live = [record for record in records if record.mode is TrialMode.REALTIME]
    missed, ticks = sum(r.missed_ticks for r in live), sum(r.steps for r in live)
    slowest = [record.inference_ms_p99 for record in records if record.inference_ms_p99 is not None]
    medians = sorted(record.inference_ms_p50 for record in records if record.inference_ms_p50 is not None)
    interval = "" if mean.half_width is None else f"± {mean.half_width:.3f}"
    tiles = [
        _tile(
            "Mean score",
            f"{mean.estimate:.3f}",
            interval,
            "95 % interval over seeds" if interval else "one trial: no interval",
        ),
        _tile(
            "Success",
            f"{successes}",
            f"of {len(records)}",
            f"95 % interval {100 * (rate.low or 0):.0f} to {100 * (rate.high or 0):.0f} %",
        ),
        _tile("Missed ticks", str(missed), f"of {ticks}", "real-time trials")
        if live
        else _tile("Missed ticks", NOTHING, "", "lockstep: time waits for the policy"),
    ]
    if slowest:
        middle = medians[len(medians) // 2]
        tiles.append(_tile("Inference", f"{middle:.1f}", "ms per chunk", f"median; worst p99 {max(slowest):.1f} ms"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _faults(records: Sequence[TrialRecord]) -> str:
    """Return a line that names the trials a fault ended, so that a mean over them is not read as the policy's."""
    broken = [(index, record) for index, record in enumerate(records) if record.stop_reason not in NORMAL_ENDS]
    if not broken:
        return ""
    links = ", ".join(f'<a href="#trial-{index}">seed {r.seed}</a> {_pill(r.stop_reason)}' for index, r in broken)
    count = f"{len(broken)} of {len(records)} trials ended by a fault"
    return f'<p class="faults"><b>{count}</b>, counted with the score reached until then: {links}</p>'


def _pill(reason: str) -> str:
    return f'<span class="pill {NORMAL_ENDS.get(reason, "bad")}">{escape(reason.replace("_", " "))}</span>'


def _inference(record: TrialRecord) -> str:
    if record.inference_ms_p50 is None or record.inference_ms_p99 is None:
        return NOTHING
    return f"{record.inference_ms_p50:.1f} / {record.inference_ms_p99:.1f} ms"


def _mode(record: TrialRecord) -> str:
    return "real time" if record.mode is TrialMode.REALTIME else "lockstep"


def _row(index: int, record: TrialRecord) -> str:
    full = ' class="full"' if record.success else ""
    return (
        f'<tr><td><a href="#trial-{index}">{record.seed}</a></td><td><div class="score"><div class="bar">'
        f'<i{full} style="width:{100 * record.score:.1f}%"></i></div>{record.score:.3f}</div></td>'
        f'<td>{_pill(record.stop_reason)}</td><td class="n">{record.steps}</td><td>{_mode(record)}</td>'
        f'<td class="n">{record.chunks}</td><td class="n">{_inference(record)}</td>'
        f'<td class="n">{record.missed_ticks}</td><td class="n">{record.starved_ticks}</td></tr>'
    )


def _trial(index: int, record: TrialRecord, video: TrialVideo | None, seconds_per_step: float) -> str:
    label = f"Coverage over time, seed {record.seed}, score {record.score:.3f}"
    facts = [
        ("Variant", record.variant),
        ("Steps", f"{record.steps} ({record.steps * seconds_per_step:.1f} s)"),
        ("Mode", _mode(record)),
        ("Inference", _inference(record)),
    ]
    if record.swaps:
        facts.append(("Exchanges", "; ".join(_swap(swap) for swap in record.swaps)))
    if len(record.parts) > 1:
        facts.append(("Computed by", ", ".join(f"{p.engine} from chunk {p.first_chunk}" for p in record.parts)))
    details = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    film = "" if video is None else f"<div>{_video(video)}</div>"
    return (
        f'<article class="card trial{"" if video else " no-video"}" id="trial-{index}">{film}<div><header>'
        f"<h3>Seed {record.seed}</h3>{_pill(record.stop_reason)}"
        f'<div class="big">{record.score:.3f} <small>score</small></div></header>'
        f"{coverage_chart(record.curve, seconds_per_step, label)}<dl>{details}</dl></div></article>"
    )


def _swap(swap: TrialSwap) -> str:
    what = f"{swap.swap_id}: {swap.previous or 'nothing'} to {swap.runtime}/{swap.requested} at step {swap.step}"
    return f"{what}, {swap.outcome}" + (f" ({swap.reason})" if swap.reason else f", {swap.load_ms:.0f} ms to load")


def _video(video: TrialVideo) -> str:
    return (
        f'<video controls muted loop playsinline preload="metadata" width="{video.width}" height="{video.height}" '
        f'poster="data:image/jpeg;base64,{b64encode(video.poster).decode()}">'
        f'<source type="video/webm" src="data:video/webm;base64,{b64encode(video.webm).decode()}"></video>'
    )


def _footer(summary: TrialSummary) -> str:
    versions = " · ".join(f"{escape(name)} <code>{escape(value)}</code>" for name, value in summary.versions.items())
    return (
        "<footer><p>Score: the maximum over the trial of coverage / 0.95, clipped to 0 and 1; a trial succeeds above "
        "0.95 coverage and ends there, or at the step limit. The interval of the mean is Student's t over seeds, that "
        "of the success rate is Wilson's. A tick is missed when it comes over a full period late; it is starved when "
        f"no action was there.</p><p>{versions}</p></footer>"
    )
