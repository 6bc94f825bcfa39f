"""The report is one well-formed, self-contained page that says what the records say."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.trials.charts import coverage_chart, score_strip
from dcqfa_ros.trials.records import TrialMode, TrialPart, TrialRecord, TrialSwap, summarize
from dcqfa_ros.trials.report import render_report, write_report
from dcqfa_ros.trials.statistics import mean_interval
from dcqfa_ros.trials.video import TrialVideo

VOID = {"meta", "source", "br", "line", "rect", "circle", "polyline", "polygon"}
VIDEO = TrialVideo(webm=b"webm bytes", poster=b"jpeg bytes", width=480, height=480, seconds=1.0)


class Page(HTMLParser):
    """Collects elements, attributes and text, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data + " "


def make_record(seed: int = 1, **changes: Any) -> TrialRecord:
    """Return a plausible record."""
    fields: dict[str, Any] = {
        "seed": seed,
        "score": 0.8,
        "steps": 3,
        "stop_reason": "step_limit",
        "variant": "w8a8",
        "device": "test computer",
        "curve": (0.1, 0.76, 0.5),
        "missed_ticks": 2,
        "starved_ticks": 1,
        "chunks": 1,
        "inference_ms_p50": 20.5,
        "inference_ms_p99": 31.25,
        "started": "2025-01-02T03:04:05+00:00",
        "mode": TrialMode.REALTIME,
        "cell": "pusht",
    }
    return TrialRecord(**(fields | changes))


def page(records: Sequence[TrialRecord], videos: dict[int, TrialVideo] | None = None, title: str = "Trials") -> Page:
    """Render and parse a report."""
    return Page(render_report(title, records, summarize(records, "pusht_keypoints", {"numpy": "2.4"}), videos))


def test_nothing_is_loaded_from_anywhere_and_nothing_runs() -> None:
    text = render_report("T", [make_record()], summarize([make_record()], "b", {}), {0: VIDEO})
    parsed = Page(text)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "img")
        for name in ("src", "href", "poster", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_videos_are_embedded_with_their_poster_at_their_trial() -> None:
    records = [make_record(1), make_record(2)]
    parsed = page(records, {1: VIDEO})
    (video,) = [attributes for tag, attributes in parsed.tags if tag == "video"]
    assert video["poster"] == "data:image/jpeg;base64," + base64.b64encode(b"jpeg bytes").decode()
    (source,) = [attributes for tag, attributes in parsed.tags if tag == "source"]
    assert source["src"] == "data:video/webm;base64," + base64.b64encode(b"webm bytes").decode()
    articles = [attributes["class"] for tag, attributes in parsed.tags if tag == "article"]
    assert articles == ["card trial no-video", "card trial"]


def test_table_and_tiles_say_what_the_records_say() -> None:
    records = [
        make_record(11, score=1.0, stop_reason="success"),
        make_record(12, score=0.5, mode=TrialMode.LOCKSTEP, missed_ticks=0),
    ]
    text = re.sub(r"\s+", " ", page(records).text)
    assert "0.750 ± 3.177" in text  # t(0.975, 1) = 12.706 times 0.25
    assert "Success 1 of 2" in text
    assert "Missed ticks 2 of 3" in text  # of the real-time trial only
    assert "step limit" in text
    assert "real time" in text
    assert "lockstep" in text
    assert "median; worst p99 31.2 ms" in text


def test_one_trial_shows_no_interval_and_no_distribution() -> None:
    text = page([make_record(mode=TrialMode.LOCKSTEP, inference_ms_p50=None, inference_ms_p99=None)]).text
    assert "one trial: no interval" in text
    assert "±" not in text
    assert "lockstep: time waits for the policy" in text
    assert "Scores" not in text
    assert "ms per chunk" not in text


def test_trials_ended_by_a_fault_are_named() -> None:
    healthy = [make_record(1), make_record(2, stop_reason="success", score=1.0)]
    assert "ended by a fault" not in page(healthy).text
    text = page([*healthy, make_record(3, stop_reason="command_timeout")]).text
    assert "1 of 3 trials ended by a fault" in text
    assert "command timeout" in text


def test_exchanges_of_variants_are_told_at_their_trial() -> None:
    switched = TrialSwap(
        swap_id=4, time="2025-01-02T03:04:05+00:00", step=12, requested="w8a8", runtime="onnxruntime",
        previous="onnxruntime/fp32", engine="onnxruntime/w8a8", outcome="switched", reason="", load_ms=810.4,
        gap_ms=0.1,
    )  # fmt: skip
    failed = switched.model_copy(update={"swap_id": 5, "outcome": "failed", "reason": "<damaged>"})
    parts = (TrialPart(first_chunk=0, engine="onnxruntime/fp32"), TrialPart(first_chunk=2, engine="onnxruntime/w8a8"))
    records = [make_record(swaps=(switched, failed), parts=parts)]
    html = render_report("t", records, summarize(records, "b", {}))
    assert "4: onnxruntime/fp32 to onnxruntime/w8a8 at step 12, switched, 810 ms to load" in html
    assert "failed (&lt;damaged&gt;)" in html
    assert "onnxruntime/fp32 from chunk 0, onnxruntime/w8a8 from chunk 2" in html


def test_links_lead_to_trials() -> None:
    parsed = page([make_record(5), make_record(5, mode=TrialMode.LOCKSTEP)])
    targets = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    links = {attributes["href"] for tag, attributes in parsed.tags if tag == "a"}
    assert links == {"#trial-0", "#trial-1"}
    assert targets == {"trial-0", "trial-1"}


@settings(deadline=None, max_examples=30)
@given(st.text(min_size=1, max_size=30))
def test_text_from_outside_is_escaped(text: str) -> None:
    records = [make_record(variant=text, device=text, stop_reason=text, cell=text)]
    plain = page([make_record()])
    hostile = page(records, title=text)
    structure = [tag for tag, _ in hostile.tags if tag not in ("p", "b", "a", "span")]
    assert structure == [tag for tag, _ in plain.tags if tag not in ("p", "b", "a", "span")]


def test_markup_in_names_stays_text() -> None:
    text = page([make_record(device='<script>alert("x")</script>')], title="<b>&amp;").text
    assert '<script>alert("x")</script>' in text
    assert "<b>&amp;" in text


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    records = [make_record()]
    path = tmp_path / "report.html"
    write_report(path, "T", records, summarize(records, "b", {}))
    assert path.read_text().startswith("<!doctype html>")
    assert path.read_text().endswith("</html>\n")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_reports_of_nothing_and_videos_of_no_trial_are_refused() -> None:
    summary = summarize([make_record()], "b", {})
    with pytest.raises(ValueError, match="at least one trial"):
        render_report("T", [], summary)
    with pytest.raises(ValueError, match=r"videos for trials \[3\]"):
        render_report("T", [make_record()], summary, {3: VIDEO})


def test_the_curve_is_drawn_to_scale_with_the_threshold() -> None:
    chart = Page(coverage_chart([0.0, 0.5, 1.0], 0.1, "label"))
    lines = [attributes for tag, attributes in chart.tags if tag == "line"]
    grid = [float(line["y1"] or 0) for line in lines if line["class"] == "grid"]  # 0, 0.25, ..., 1
    (limit,) = [float(line["y1"] or 0) for line in lines if line["class"] == "limit"]
    assert limit == pytest.approx(grid[0] + 0.95 * (grid[-1] - grid[0]), abs=0.1)
    (curve,) = [attributes["points"] for tag, attributes in chart.tags if tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in (curve or "").split()]
    assert heights == pytest.approx([grid[0], grid[2], grid[4]], abs=0.1)
    assert "best coverage 1.000" in chart.text
    assert "success above 0.95" in chart.text


@given(st.lists(st.floats(0, 1), max_size=40), st.sampled_from([0.1, 0.01, 1.0, 100.0]))
def test_any_curve_stays_within_its_chart(curve: list[float], seconds: float) -> None:
    chart = Page(coverage_chart(curve, seconds, "label"))
    for tag, attributes in chart.tags:
        for point in (attributes.get("points") or "").split():
            x, y = (float(v) for v in point.split(","))
            assert 0 <= x <= 560
            assert 0 <= y <= 220
        assert tag != "polyline" or curve


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_every_score_has_its_dot(scores: list[float]) -> None:
    strip = Page(score_strip(scores, mean_interval(scores)))
    dots = [attributes for tag, attributes in strip.tags if tag == "circle"]
    assert len(dots) == len(scores)
    assert all(float(dot["cy"] or 0) > 20 for dot in dots)
