"""Results that are kept, printed and joined: only those of the comparison that its file describes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from test.training.compare.conftest import cell, entry, results_document
from training.compare import config as config_module
from training.compare import workers
from training.compare.committed import check_belongs, check_replaces
from training.compare.config import CompareError, load_compare
from training.compare.results import joined, parse_results, read_results

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "config/compare"
SHORT = {"name": "short", "seeds": ["some"], "stress": {"episode_steps": 16}}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(in_process: Callable[[str], Command]) -> Command:
    return in_process("compare")


@pytest.fixture
def saved(tiny_comparison: Callable[..., Path], command: Command) -> Path:
    """A comparison whose results are committed, beside it."""
    config = tiny_comparison(tasks=[SHORT], claims=[])
    assert command("--config", config, "--workers", 1, "--save-results")[0] == 0
    return config


@pytest.fixture
def no_play(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(*_arguments: Any) -> None:
        raise AssertionError("a block was played")

    monkeypatch.setattr(workers, "play", play)


def changed(config: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The comparison with a change to its file, beside it."""
    document = yaml.safe_load(config.read_text())
    change(document)
    path = config.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize("name", ["pusht", "pusht_quick"])
def test_shipped_results_are_those_of_their_own_comparison(name: str) -> None:
    results = read_results(COMMITTED / f"{name}_results.json")
    check_belongs(results, load_compare(COMMITTED / f"{name}.yaml"), name)


def test_results_of_another_comparison_are_not_printed(command: Command) -> None:
    code, out, err = command(
        "--config", COMMITTED / "pusht.yaml", "--from-results", COMMITTED / "pusht_quick_results.json"
    )
    assert code == 2 and not out and 'name is "pusht_quick", "pusht" of the comparison' in err and "--config" in err


CHANGES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda d: d.update(name="other"), r'name is "tiny", "other" of the comparison'),
    (lambda d: d.update(reference="dcqfa"), 'reference is "full", "dcqfa"'),
    (lambda d: d.update(margin=0.05), r"margin is 0\.03, 0\.05"),
    (lambda d: d.update(steps=4), "cell full, short, some: steps is null, 4"),
    (lambda d: d.update(data_sha256="a" * 64), "data_sha256"),
    (lambda d: d.update(policy_sha256=["a" * 64]), "policy_sha256"),
    (lambda d: d["seeds"]["some"].update(first=800_000), "cell full, short, some: first_seed is 200001, 800000"),
    (lambda d: d["seeds"]["some"].update(count=500), "seeds is 2, 500"),
    (lambda d: d["tasks"][0]["stress"].update(episode_steps=17), r"stress\.episode_steps is 16, 17"),
    (lambda d: d["tasks"][0]["stress"].update(block_nudge_px=9.0), r"stress\.block_nudge_px is 0\.0, 9\.0"),
    (lambda d: d["entries"][1].update(bits="w8a8"), 'entry dcqfa: bits is "w4a4", "w8a8"'),
    (lambda d: d["entries"][1].update(subnet="w8a8"), 'entry dcqfa: subnet is "w4a4", "w8a8"'),
    (
        lambda d: d["entries"].__setitem__(1, {"name": "dcqfa", "method": "m", "bits": "w4a4", "bundle": "b"}),
        'entry dcqfa: kind is "supernet", "bundle"',
    ),
]


def test_results_that_the_file_does_not_describe_any_more_are_neither_printed_nor_joined_nor_replaced(
    saved: Path, command: Command, no_play: None
) -> None:
    committed = saved.with_name("committed.json")
    results, before = read_results(committed), committed.read_bytes()
    for change, message in CHANGES:
        with pytest.raises(CompareError, match=message):
            check_belongs(results, load_compare(changed(saved, change)), "file.json")
    path = changed(saved, lambda d: d.update(margin=0.05))
    for options in (("--from-results",), ("--merge", committed), ("--save-results",)):
        code, _, err = command("--config", path, "--workers", 1, *options)
        assert code == 2 and "committed.json" in err and "margin is 0.03, 0.05" in err, options
    assert committed.read_bytes() == before


def test_a_comparison_that_describes_more_than_was_played_takes_the_results(saved: Path, command: Command) -> None:
    def more(document: dict[str, Any]) -> None:
        document["entries"].append(document["entries"][1] | {"name": "eight", "bits": "w8a8", "subnet": "w8a8"})
        document["tasks"].append(SHORT | {"name": "further"})
        document["pairs"].append({"first": "eight", "second": "dcqfa"})
        document["policy_sha256"].append("b" * 64)

    code, out, err = command("--config", changed(saved, more), "--from-results", "--json")
    assert code == 0, err
    assert [row["entry"] for row in json.loads(out)["rows"]] == ["full", "dcqfa"]
    assert json.loads(out)["not_played"] == [{"name": "eight", "missing": None, "made_by": None}]


def test_fewer_seeds_or_another_protocol_do_not_replace_committed_results_and_are_refused_before_playing(
    saved: Path, command: Command, no_play: None
) -> None:
    committed = saved.with_name("committed.json")
    before = committed.read_bytes()
    for change, message in (
        (lambda d: d["seeds"]["some"].update(count=1), "seeds is 2, 1 now"),
        (lambda d: d["seeds"]["some"].update(first=200_002), "first_seed is 200001, 200002 now"),
        (lambda d: d["tasks"][0]["stress"].update(episode_steps=17), "stress.episode_steps is 16, 17 now"),
        (lambda d: d["tasks"][0].update(name="other"), "holds full on short, some, which is not played"),
    ):
        out = ("--out", saved.with_name("elsewhere"))
        code, _, err = command("--config", changed(saved, change), "--workers", 1, "--save-results", *out)
        assert code == 2 and message in err and str(committed) in err, err
    document = json.loads(before)
    for played in document["cells"]:
        played["protocol"]["simulator"]["pymunk"] = "1"
    committed.write_text(json.dumps(document))
    code, _, err = command("--config", saved, "--workers", 1, "--save-results", *out)
    assert code == 2 and "protocol.simulator.pymunk" in err and "remove" in err


def test_joining_files_that_hold_less_does_not_replace_committed_results(saved: Path, command: Command) -> None:
    committed, part = saved.with_name("committed.json"), saved.with_name("part.json")
    before = committed.read_bytes()
    document = json.loads(before)
    part.write_text(json.dumps(document | {"cells": document["cells"][:1]}))
    options = ("--config", saved, "--from-results", part, "--merge", part, "--save-results")
    code, _, err = command(*options)
    assert code == 2 and "holds dcqfa on short, some" in err and committed.read_bytes() == before
    code, _, err = command(*options, "--merge", committed)
    assert code == 0 and json.loads(committed.read_bytes())["cells"] == document["cells"], err


def test_more_seeds_replace_committed_results(saved: Path, command: Command) -> None:
    wider = changed(saved, lambda d: d["seeds"]["some"].update(first=200_000, count=4))
    code, _, err = command("--config", wider, "--workers", 1, "--save-results")
    assert code == 0, err
    cells = json.loads(saved.with_name("committed.json").read_bytes())["cells"]
    assert [(c["first_seed"], len(c["scores"])) for c in cells] == [(200_000, 4)] * 2


def test_another_network_of_the_same_name_does_not_replace_the_committed_one(
    saved: Path, command: Command, supernet_run: Path, no_play: None
) -> None:
    copied = saved.with_name("supernet")
    shutil.copytree(supernet_run, copied)
    payload = torch.load(copied / "checkpoint.pt", weights_only=True)
    key = next(name for name in payload["ema"] if name.endswith("fc1.weight"))
    payload["ema"][key] = payload["ema"][key] + 0.5
    torch.save(payload, copied / "checkpoint.pt")
    path = changed(saved, lambda d: d["entries"][1].update(supernet=str(copied)))
    out = ("--out", saved.with_name("elsewhere"))
    code, _, err = command("--config", path, "--workers", 1, "--save-results", *out)
    assert code == 2 and "entry dcqfa: identity.weights" in err and "remove" in err


def test_what_was_played_is_compared_with_what_it_replaces() -> None:
    one = results_document([entry("a")], [cell("a", [0.1, 0.2, 0.3])])
    committed = parse_results(one, "committed")
    check_replaces(parse_results(results_document([entry("a")], [cell("a", [0.5] * 4)]), "new"), committed, "c.json")
    machine = {"artifact": f"{9:064x}"}
    other = results_document([entry("a", identity=machine)], [cell("a", [0.5] * 3, **machine)])
    check_replaces(parse_results(other, "new"), committed, "c.json")  # graphs of another machine
    for document, message in (
        (results_document([entry("a")], [cell("a", [0.5] * 2)]), "seeds is .7 to 9., .7 to 8. now"),
        (results_document([entry("a")], [cell("a", [0.5] * 3, first_seed=8)]), "seeds is .7 to 9., .8 to 10. now"),
        (results_document([entry("b")], [cell("b", [0.5] * 3)]), "reference is"),
        (one | {"margin": 0.1}, "margin is"),
        (one | {"name": "z"}, "name is"),
        (results_document([entry("a", denoising_steps=3)], one["cells"]), "denoising_steps is 16, 3 now"),
        (results_document([entry("a"), entry("b")], [cell("b", [0.5] * 3)]), "holds a on standard, some"),
    ):
        with pytest.raises(CompareError, match=message):
            check_replaces(parse_results(document, "new"), committed, "c.json")


def test_results_are_saved_where_they_were_found_and_nowhere_new(
    saved: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = tmp_path / "share"
    (share / "kept").mkdir(parents=True)
    kept = share / "kept/results.json"
    kept.write_bytes(saved.with_name("committed.json").read_bytes())
    monkeypatch.setattr(config_module, "share_directory", lambda: share)
    kept.write_text(json.dumps(json.loads(kept.read_bytes()) | {"written": "before"}))
    path = changed(saved, lambda d: d.update(results="kept/results.json"))
    code, _, err = command("--config", path, "--workers", 1, "--save-results")
    assert code == 0 and str(kept) in err
    assert json.loads(kept.read_bytes())["written"] != "before" and not Path("kept").exists()
    path = changed(saved, lambda d: d.update(results="nowhere/results.json"))
    code, _, err = command("--config", path, "--workers", 1, "--save-results")
    assert code == 2 and "nowhere: no such folder" in err and not Path("nowhere").exists()


def test_what_the_report_needs_is_read_before_anything_is_played(
    tiny_comparison: Callable[..., Path], command: Command, tmp_path: Path, no_play: None
) -> None:
    config = tiny_comparison(tasks=[SHORT], claims=[], amortised="nope.yaml")
    code, _, err = command("--config", config, "--workers", 1)
    assert code == 2 and "nope.yaml" in err
    (tmp_path / "committed.json").write_text("{")
    code, _, err = command("--config", tiny_comparison(tasks=[SHORT], claims=[]), "--workers", 1, "--save-results")
    assert code == 2 and "committed.json: no JSON" in err


def test_damaged_committed_results_do_not_stop_a_run_that_does_not_replace_them(
    tiny_comparison: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    (tmp_path / "committed.json").write_text("{")
    config = tiny_comparison(tasks=[SHORT], claims=[])
    code, out, err = command("--config", config, "--workers", 1, "--json")
    assert code == 0 and "committed.json: no JSON" in err and "nothing is compared with it" in err
    assert "reproduces" not in json.loads(out) and (tmp_path / "compare/tiny/report.md").exists()


def test_results_with_an_unknown_stress_or_deep_nesting_are_refused_by_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    document = results_document([entry("a")], [cell("a", [0.1, 0.2])])
    document["cells"][0]["protocol"]["stress"] = {"wind": 3}
    path.write_text(json.dumps(document))
    with pytest.raises(CompareError, match=r"results\.json: cells\.0\.protocol\.stress\.wind"):
        read_results(path)
    for depth in (300, 990, 100_000):
        deep = "[" * depth + "]" * depth
        path.write_text(json.dumps(document | {"cells": []}).replace('"report": null', f'"report": {{"a": {deep}}}'))
        with pytest.raises(CompareError, match=r"results\.json"):
            read_results(path)


def test_versions_of_engines_are_kept_per_cell_and_of_all_files_that_are_joined(
    saved: Path, command: Command, tmp_path: Path
) -> None:
    code, out, _ = command("--config", saved, "--from-results", "--json")
    row = json.loads(out)["rows"][0]
    assert code == 0 and len(row["engines"]["onnxruntime"]) == 1 and row["engines"]["torch"]
    file = tmp_path / "compare/tiny/cells/short/full.jsonl"
    assert all("onnxruntime" in json.loads(line)["engines"] for line in file.read_text().splitlines()[1:])
    one, other = (results_document([entry("a")], [cell("a", [0.1])]) for _ in range(2))
    one["versions"], other["versions"] = {"onnxruntime": "1"}, {"onnxruntime": "2", "torch": "3"}
    one["written"], other["written"] = "2026-01-01", "2026-02-01"
    made = joined([parse_results(one, "x"), parse_results(other, "y"), parse_results(one, "z")], ["x", "y", "z"])
    assert made.versions == {"onnxruntime": "1 and 2", "torch": "3"} and made.written == "2026-02-01"
