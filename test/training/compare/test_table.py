from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcqfa_ros.trials.statistics import mean_interval
from test.training.compare.conftest import SHA, cell, entry, results_document
from training.compare.config import Claim, CompareError, Pair, load_compare
from training.compare.page import render
from training.compare.paper import load_paper
from training.compare.report import markdown, report, within_text
from training.compare.results import joined, parse_results
from training.compare.table import difference, judge, reproduced

scores = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=12)


def claim(kind: str, first: str = "b", second: str = "a") -> Claim:
    fields = {"text": "t", "source": "s", "kind": kind, "first": first, "second": second}
    return Claim.model_validate(fields | {"task": "standard", "seeds": "some", "paper_difference": 0.1})


def two(first: list[float], second: list[float], **fields: Any) -> dict[str, Any]:
    return results_document([entry("a"), entry("b")], [cell("a", first), cell("b", second, **fields)])


@settings(max_examples=80, deadline=None)
@given(ours=scores, shift=st.floats(-1.0, 1.0))
def test_verdicts_follow_from_the_interval_alone(ours: list[float], shift: float) -> None:
    theirs = [min(1.0, max(0.0, score + shift * (0.5 + index % 3))) for index, score in enumerate(ours)]
    results = parse_results(two(ours, theirs), "here")
    found = difference(results, "b", "a", "standard", "some", 0.03)
    assert found is not None and found.interval.low is not None and found.interval.high is not None
    low, high = found.interval.low, found.interval.high
    above, below, not_worse = (judge(results, claim(kind)) for kind in ("above", "below", "not_worse"))
    assert (above.verdict == "found") == (low > 0) == (found.shows == "better")
    assert (below.verdict == "found") == (high < 0)
    assert (not_worse.verdict == "found") == (low > -0.03) == found.non_inferior
    assert above.opposite == (high < 0) and below.opposite == (low > 0) and not_worse.opposite == (high < -0.03)
    assert not (above.verdict == "found" and above.opposite)
    assert above.paper_within == (low <= 0.1 <= high)
    mirrored = difference(results, "a", "b", "standard", "some", 0.03)
    assert mirrored is not None and mirrored.interval.estimate == pytest.approx(-found.interval.estimate)


def test_of_fewer_seeds_than_the_comparison_asks_for_no_verdict_is_told(tiny_comparison: Any) -> None:
    results = parse_results(two([0.1, 0.1, 0.2], [0.9, 0.9, 0.8]), "here")
    paper = load_paper(Path(tiny_comparison()).with_name("paper.yaml"))
    verdicts = []
    for least in (1, 3, 4):
        config = load_compare(tiny_comparison(verdict_seeds=least, claims=[]))
        config = config.model_copy(update={"pairs": (Pair(first="b", second="a"),)})
        document = report(results, config, paper, None)
        row = document["rows"][1]["difference"]
        assert row["mean"] > 0.5 and row["low"] < row["mean"] < row["high"] and document["verdict_seeds"] == least
        assert document["pairs"][0]["shows"] == row["shows"] and (row["non_inferior"] is None) == (row["shows"] is None)
        texts = markdown(document), render(document)
        assert all(("better" in text) == (row["shows"] is not None) for text in texts)
        verdicts.append(row["shows"])
    assert verdicts == ["better", "better", None]
    assert any("fewer than 4 seeds" in note for note in document["notes"])


def test_what_was_not_played_is_not_measured() -> None:
    document = two([0.1, 0.2], [0.3, 0.4])
    document["cells"].pop()
    judged = judge(parse_results(document, "here"), claim("above"))
    assert judged.verdict == "not measured" and judged.difference is None and judged.document()["difference"] is None
    assert judge(parse_results(two([0.1], [0.9]), "here"), claim("above")).verdict == "not measured"  # one seed


MIXTURES: list[tuple[str, Any, str]] = [
    ("cells.1.weights", SHA["other"], "weights"),
    ("cells.1.artifact", SHA["other"], "artifact"),
    ("cells.1.first_seed", 8, "first_seed"),
    ("cells.1.scores", [0.1], "seeds"),
    ("cells.1.protocol.simulator.gym-pusht", "0.2", "protocol.simulator.gym-pusht"),
    ("cells.1.protocol.stress.episode_steps", 600, "protocol.stress.episode_steps"),
    ("cells.1.protocol.steps", 8, "protocol.steps"),
    ("cells.1.protocol.metric", "another", "protocol.metric"),
    ("cells.1.protocol.task", "other", "protocol.task"),
    ("cells.1.entry", "c", "no such entry"),
    ("cells.1.entry", "a", "twice"),
    ("cells.1.scores", [0.1, 1.2], "scores"),
    ("entries.1.identity.data", SHA["other"], "identity.data"),
    ("entries.1.identity.policy", SHA["other"], "identity.policy"),
    ("entries.1.identity.data", None, "identity.data"),
    ("entries.1.name", "a", "twice"),
    ("reference", "z", "reference"),
    ("format", 2, "format"),
    ("surprise", 1, "surprise"),
]


@pytest.mark.parametrize(("path", "value", "message"), MIXTURES, ids=[f"{p}={v}" for p, v, _ in MIXTURES])
def test_results_that_must_not_stand_in_one_table_are_refused_by_field(path: str, value: Any, message: str) -> None:
    document = two([0.1, 0.2], [0.3, 0.4])
    place: Any = document
    *parents, last = path.split(".") if "gym-pusht" not in path else [*path.split(".")[:-1], "gym-pusht"]
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    with pytest.raises(CompareError, match=message):
        parse_results(document, "here")


def test_what_is_stated_may_be_missing() -> None:
    document = two([0.1, 0.2], [0.3, 0.4])
    document["entries"][1]["identity"]["data"] = None
    document["entries"][1]["stated"] = ["data"]
    assert parse_results(document, "here").entries[1].stated == ("data",)


@given(rows=st.lists(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_joined_results_hold_the_cells_of_all_and_do_not_depend_on_how_they_were_split(rows: list[list[float]]) -> None:
    names = [f"e{number}" for number in range(len(rows))]
    whole = results_document([entry(name) for name in names], [cell(n, r) for n, r in zip(names, rows, strict=True)])
    parts = []
    for name, row in zip(names, rows, strict=True):
        part = results_document([entry(names[0]), entry(name)][name == names[0] :], [cell(name, row)])
        parts.append(parse_results(part, name))
    made = joined(parts, names)
    assert made.cells == parse_results(whole, "whole").cells
    assert made.entries == parse_results(whole, "whole").entries


def test_joining_refuses_another_entry_of_the_same_name() -> None:
    one = two([0.1, 0.2], [0.3, 0.4])
    other = copy.deepcopy(one)
    other["entries"][1]["identity"]["options"] = {"alpha": 0.5}
    with pytest.raises(CompareError, match=r"identity\.options"):
        joined([parse_results(one, "x"), parse_results(other, "y")], ["x", "y"])
    other = json.loads(json.dumps(one).replace(SHA["data"], SHA["other"]))
    with pytest.raises(CompareError, match="y: data"):
        joined([parse_results(one, "x"), parse_results(other, "y")], ["x", "y"])


def test_joining_refuses_a_cell_of_both_that_was_not_played_alike_and_another_sampler() -> None:
    one = two([0.1, 0.2], [0.3, 0.4])
    other = copy.deepcopy(one)
    for played in other["cells"]:
        played["first_seed"] = 99
    with pytest.raises(CompareError, match="first_seed is 7 and 99"):
        joined([parse_results(one, "x"), parse_results(other, "y")], ["x", "y"])
    other = copy.deepcopy(one)
    other["entries"][1]["denoising_steps"] = 8
    with pytest.raises(CompareError, match="entry b: denoising_steps is 8"):
        joined([parse_results(one, "x"), parse_results(other, "y")], ["x", "y"])


@given(ours=st.floats(0.0, 1.0), committed=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2))
def test_a_mean_reproduces_the_committed_one_within_its_interval(ours: float, committed: list[float]) -> None:
    (row,) = reproduced(
        *(parse_results(results_document([entry("a")], [cell("a", s)]), "x") for s in ([ours] * 2, committed))
    )
    interval = mean_interval(committed)
    assert interval.low is not None and interval.high is not None
    assume(min(abs(ours - interval.low), abs(ours - interval.high)) > 1e-9)
    assert row["within"] == (interval.low <= ours <= interval.high) and row["differs"] is None


@pytest.mark.parametrize(
    ("identity", "fields", "differs"),
    [
        ({"weights": SHA["other"]}, {"weights": SHA["other"]}, "identity.weights"),
        ({}, {"first_seed": 8}, "first_seed"),
        ({}, {"scores": [0.5]}, "seeds"),
        ({"artifact": SHA["other"]}, {"artifact": SHA["other"]}, None),  # its last bits are the machine's
    ],
)
def test_what_is_not_the_committed_network_or_seeds_reproduces_nothing(
    identity: dict[str, Any], fields: dict[str, Any], differs: str | None
) -> None:
    committed = parse_results(results_document([entry("a")], [cell("a", [0.4, 0.6])]), "x")
    document = results_document([entry("a", identity=identity)], [cell("a", [0.5, 0.5]) | fields])
    (row,) = reproduced(parse_results(document, "y"), committed)
    assert (row["differs"], row["within"]) == (differs, True if differs is None else None)
    assert ("not compared" in within_text(row)) == (differs is not None)
