from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.compare.config import CompareError, found, load_compare
from training.compare.paper import load_paper

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "config/compare").glob("pusht*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_comparisons_can_be_read_and_name_files_that_are_there(path: Path) -> None:
    config = load_compare(path)
    paper = load_paper(found(config.paper))
    assert config.latency.table is not None
    for text in (config.policy, config.training, config.latency.table, config.amortised):
        assert text is None or found(text).exists(), text
    for task in config.tasks:
        assert task.paper is None or task.paper in paper.tasks
    if path.stem == "pusht":
        assert config.margin == 0.03 and config.seeds["published"].seeds == range(100_000, 100_050)
        for claim in config.claims:  # of equality or difference, of which 50 seeds decide nothing
            assert config.seeds[claim.seeds].count >= 500 and claim.seeds != "published", claim.text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_sources_of_shipped_comparisons_are_shipped_or_it_is_said_what_makes_them(path: Path) -> None:
    config = load_compare(path)
    for entry in config.entries:
        for text in (entry.bundle, entry.checkpoint, entry.supernet, entry.trained):
            shipped = text is None or (text.startswith("models/") and (ROOT / text).exists())
            assert shipped or entry.made_by is not None, f"{entry.name}: {text} is not shipped; say made_by"


def test_only_leaves_out_tasks_that_the_reference_would_play_alone(tiny_comparison: Callable[..., Path]) -> None:
    path = tiny_comparison()
    document = yaml.safe_load(path.read_text())
    document["entries"].append(document["entries"][1] | {"name": "other"})
    document["entries"].append(document["entries"][1] | {"name": "idle"})
    document["tasks"][0]["entries"] = ["full", "other"]
    document["tasks"][1]["entries"] = ["full", "dcqfa", "other"]
    path.write_text(yaml.safe_dump(document))
    config = load_compare(path)
    assert [task.name for task in config.only(["dcqfa"]).tasks] == ["short"]
    assert [task.name for task in config.only(["dcqfa", "other"]).tasks] == ["standard", "short"]
    assert [task.name for task in config.only(["full"]).tasks] == ["standard", "short"]
    with pytest.raises(CompareError, match="--only idle: no task"):
        config.only(["idle"])


def test_the_papers_figures_are_those_of_the_table() -> None:
    paper = load_paper(ROOT / "config/compare/paper.yaml")
    assert paper.value("pusht_image", "full precision", "fp32") == 0.772
    assert paper.value("pusht_image", "DC-QFA", "w4a4") == 0.770
    assert paper.value("pusht_image", "RTN", "w4a4") is None
    assert paper.value(None, "DC-QFA", "w4a4") is None
    awq = load_compare(ROOT / "config/compare/pusht.yaml").entry("awq-w4a4")
    assert awq.method == "AWQ weights + RTN activations"  # it quantizes weights alone
    assert paper.value("pusht_image", awq.paper or awq.method, awq.bits) == 0.723
    assert "key points" in (paper.tasks["pusht_image"].caveat or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "nobody"}, "reference: nobody is not there"),
        ({"surprise": 1}, "surprise"),
        ({"margin": 0.0}, "margin"),
        ({"block": 0}, "block"),
        ({"latency": {}}, "latency"),
        ({"latency": {"table": "a.json", "measured_rounds": 9}}, "latency"),
        ({"data_sha256": "abc"}, "data_sha256"),
        ({"seeds": {"some": {"first": 2**32 - 1, "count": 2}}}, "start seeds end at"),
        ({"tasks": [{"name": "a", "seeds": ["none"]}]}, "none is not there"),
        ({"tasks": [{"name": "a", "seeds": ["some", "some"]}]}, "named twice"),
        ({"tasks": [{"name": "a", "seeds": ["some"], "entries": ["dcqfa"]}]}, "reference full has to play"),
        ({"tasks": [{"name": "a", "seeds": ["some"], "stress": {"action_delay_steps": -1}}]}, "action_delay_steps"),
        ({"verdict_seeds": 0}, "verdict_seeds"),
        ({"verdict_seeds": 3}, "claims.0..seeds: some has 2 seeds, expected at least verdict_seeds, 3"),
        ({"pairs": [{"first": "full", "second": "full"}]}, "compared with itself"),
        ({"pairs": [{"first": "full", "second": "x"}]}, "x is not there"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_by_field(
    tiny_comparison: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompareError, match=message):
        load_compare(tiny_comparison(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "b"}, "expected one of bundle, checkpoint, supernet and baseline"),
        ({"checkpoint": None}, "got none"),
        ({"bits": "w8a8"}, "runs at fp32 or fp16"),
        ({"variant": "v"}, "variant belongs to an entry with bundle"),
        ({"options": {"a": 1}}, "options belongs to an entry with baseline"),
        ({"checkpoint": None, "supernet": "s"}, "subnet is missing"),
        ({"checkpoint": None, "baseline": "rtn", "bits": "mixed"}, "baseline_bits is missing"),
        ({"checkpoint": None, "baseline": "rtn", "bits": "w4a4", "baseline_bits": "w8a8"}, "but baseline_bits w8a8"),
        ({"checkpoint": None, "baseline": "rtn", "bits": "w4a4", "made_by": "c"}, "made_by belongs to an entry with"),
        ({"bits": "w3a3"}, "bits"),
    ],
)
def test_an_entry_is_of_one_source_with_its_own_fields(
    tiny_comparison: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    path = tiny_comparison()
    document = yaml.safe_load(path.read_text())
    document["entries"][0].update(change)
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(CompareError, match=message):
        load_compare(path)


def test_overlapping_seed_sets_of_a_task_are_refused(tiny_comparison: Callable[..., Path]) -> None:
    seeds = {"some": {"first": 5, "count": 3}, "more": {"first": 7, "count": 3}}
    with pytest.raises(CompareError, match="overlap"):
        load_compare(tiny_comparison(seeds=seeds, tasks=[{"name": "a", "seeds": ["some", "more"]}], claims=[]))


def test_names_that_stand_twice_are_refused(tiny_comparison: Callable[..., Path]) -> None:
    path = tiny_comparison()
    document = yaml.safe_load(path.read_text())
    document["entries"].append(dict(document["entries"][0]))
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(CompareError, match="full is there twice"):
        load_compare(path)
    with pytest.raises(CompareError, match="cannot be read"):
        load_compare(path.parent / "absent.yaml")
