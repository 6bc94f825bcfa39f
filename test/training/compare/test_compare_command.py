"""The whole command on tiny networks, played in this process."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from training import commands_compare
from training.compare import session as session_module
from training.compare import workers
from training.compare.config import CompareError, StatedCost, load_compare
from training.compare.session import Session
from training.distill_config import DistillConfig
from training.stress import STANDARD

VOID = {"meta", "line", "circle", "polygon", "br"}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(in_process: Callable[[str], Command]) -> Command:
    return in_process("compare")


class Balanced(HTMLParser):
    """Fails on tags that do not close in order, and collects the text and what would be fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.columns: list[list[int]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "img", "iframe"}
        assert all(name not in {"src", "href"} and not name.startswith("on") for name, _ in attrs)
        if tag == "table":
            self.columns.append([])
        if tag == "tr":
            self.columns[-1].append(0)
        if tag in {"td", "th"}:
            self.columns[-1][-1] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_command_plays_keeps_reports_and_prints_the_committed_table(
    tiny_comparison: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    config = tiny_comparison()
    code, out, err = command("--config", config, "--workers", 1, "--json", "--save-results")
    assert code == 0, err
    document = json.loads(out)
    rows = document["rows"]
    assert [(r["entry"], r["task"]) for r in rows] == [
        ("full", "standard"), ("dcqfa", "standard"), ("full", "short"), ("dcqfa", "short"),
    ]  # fmt: skip
    row = rows[1]
    assert (row["method"], row["bits"], row["n"], row["paper"]) == ("DC-QFA", "w4a4", 2, 0.77)
    assert 0.0 <= row["mean"] <= 1.0 and row["ci95"] >= 0.0
    assert row["difference"]["mean"] == pytest.approx(row["mean"] - rows[0]["mean"])
    assert row["size"]["paper_mib"] < rows[0]["size"]["paper_mib"]
    assert row["latency"]["ms"] > 0.0 and row["latency"]["kind"] == "modelled table"
    assert row["cost"]["steps"] == 6 and row["cost"]["teacher_calls"] == 6 * 8
    assert "ONNX Runtime" in row["executed"]
    assert "products of W4A4" in row["device_executes"] and row["latency"]["device"] in row["device_executes"]
    assert rows[3]["mean_episode_steps"] <= 40.0 and "40 steps" in rows[3]["stress"]
    assert document["claims"][0]["verdict"] in {"found", "not found"}

    folder = tmp_path / "compare/tiny"
    page = Balanced((folder / "report.html").read_text())
    assert all(len(set(columns)) == 1 for columns in page.columns)
    assert "DC-QFA" in page.words and any("ours is tiny" in word for word in page.words)
    lines = (folder / "report.md").read_text().splitlines()
    assert any(line.startswith("| DC-QFA | W4A4 |") for line in lines)

    code, out, err = command("--config", config, "--from-results", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == rows  # the committed table, from its scores
    renamed = config.with_name("renamed.yaml")
    renamed.write_text(config.read_text().replace("method: DC-QFA", "method: DC-QFA\n  paper: unheard of"))
    _, out, _ = command("--config", renamed, "--from-results", "--json")
    assert [row["paper"] for row in json.loads(out)["rows"]] == [None] * len(rows)  # looked up by that word

    played: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "play", lambda *arguments: played.append(arguments))
        code, out, _ = command("--config", config, "--workers", 1)
    assert (code, played) == (0, [])  # nothing is played twice
    assert "4 of 4 means lie within the committed intervals" in out


def test_an_interruption_loses_at_most_the_block_and_the_rest_is_as_if_there_was_none(
    tiny_comparison: Callable[..., Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, original, played = tiny_comparison(tasks=[SHORT], claims=[]), workers.play, []

    def interrupted(policy: Any, block: workers.Block) -> workers.Played:
        if len(played) == 3:
            raise KeyboardInterrupt
        played.append(block)
        return original(policy, block)

    monkeypatch.setattr(workers, "play", interrupted)
    code, _, _ = command("--config", config, "--workers", 1, "--out", tmp_path / "a")
    assert code == 130 and not (tmp_path / "a/results.json").exists()
    monkeypatch.setattr(workers, "play", lambda policy, block: (played.append(block), original(policy, block))[1])
    assert command("--config", config, "--workers", 1, "--out", tmp_path / "a")[0] == 0
    assert len(played) == 4 and len({(b.entry, b.seeds) for b in played}) == 4
    assert command("--config", config, "--workers", 1, "--out", tmp_path / "b")[0] == 0
    once, twice = (json.loads((tmp_path / name / "results.json").read_bytes())["cells"] for name in "ab")
    assert once == twice


SHORT = {"name": "short", "seeds": ["some"], "stress": {"episode_steps": 16}}


def test_other_weights_seeds_or_data_are_refused_by_field_before_anything_is_played(
    tiny_comparison: Callable[..., Path], command: Command, tmp_path: Path, supernet_run: Path
) -> None:
    copied = tmp_path / "supernet"
    shutil.copytree(supernet_run, copied)
    subnet = {"name": "dcqfa", "method": "DC-QFA", "bits": "w4a4", "supernet": str(copied), "subnet": "w4a4"}
    entries = [yaml.safe_load(tiny_comparison().read_text())["entries"][0], subnet]
    config = tiny_comparison(entries=entries, tasks=[SHORT], claims=[])
    out = ("--workers", 1, "--out", tmp_path / "out")
    assert command("--config", config, *out)[0] == 0
    before = (tmp_path / "out/cells/short/dcqfa.jsonl").read_bytes()

    payload = torch.load(copied / "checkpoint.pt", weights_only=True)
    key = next(name for name in payload["ema"] if name.endswith("fc1.weight"))
    payload["ema"][key] = payload["ema"][key] + 0.5
    torch.save(payload, copied / "checkpoint.pt")
    code, _, err = command("--config", config, *out)
    assert code == 2 and "identity.artifact" in err and "identity.weights" in err and "must not be mixed" in err
    assert (tmp_path / "out/cells/short/dcqfa.jsonl").read_bytes() == before

    for field, named in (("data_sha256", "field data"), ("policy_sha256", "field policy")):
        other = "a" * 64
        config = tiny_comparison(tasks=[SHORT], claims=[], **{field: [other] if field.startswith("p") else other})
        code, _, err = command("--config", config, "--workers", 1, "--out", tmp_path / "elsewhere")
        assert code == 2 and named in err and other in err

    longer = SHORT | {"stress": {"episode_steps": 17}}
    code, _, err = command("--config", tiny_comparison(entries=entries[:1], tasks=[longer], claims=[], pairs=[]), *out)
    assert code == 2 and "protocol.stress.episode_steps" in err


def test_a_baseline_is_played_in_pytorch_and_says_so(
    tiny_comparison: Callable[..., Path], supernet_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.baselines import calibration

    original = calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", lambda policy, data: original(policy, data, observations=4))
    full = yaml.safe_load(tiny_comparison().read_text())["entries"][0]
    rtn = {"name": "rtn", "method": "RTN", "bits": "w4a4", "baseline": "rtn"}
    config = load_compare(tiny_comparison(entries=[full, rtn], tasks=[SHORT], claims=[], pairs=[]))
    document = Session(config, tmp_path / "out", str(supernet_files.data)).run(1)
    assert document is not None
    facts = document["entries"][1]
    assert "simulated quantizers" in facts["executed"] and facts["device_executes"]
    assert document["entries"][0]["device_executes"].startswith("FP32 products on ")
    assert facts["latency"]["ms"] > 0.0 and "not counted" in facts["latency"]["note"]
    assert facts["identity"]["policy"] == document["policy"][0]
    assert facts["size"]["paper_mib"] < document["entries"][0]["size"]["paper_mib"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "none", "bits": "w4a4", "checkpoint": None}, "none"),
        ({"baseline": "rtn", "bits": "w4a4", "checkpoint": None, "trained": "x"}, "no such run"),
        ({"checkpoint": "nowhere"}, "no such run or checkpoint"),
    ],
)
def test_an_entry_that_is_not_there_is_refused_before_anything_is_opened(
    tiny_comparison: Callable[..., Path], command: Command, change: dict[str, Any], message: str
) -> None:
    config = tiny_comparison()
    document = yaml.safe_load(config.read_text())
    document["entries"][1] = {"name": "dcqfa", "method": "m", "bits": "fp32"} | change
    config.write_text(yaml.safe_dump(document))
    code, _, err = command("--config", config, "--workers", 1)
    assert code == 2 and message in err


def test_bits_of_the_file_must_be_those_of_the_network(tiny_comparison: Callable[..., Path], command: Command) -> None:
    config = tiny_comparison()
    document = yaml.safe_load(config.read_text())
    document["entries"][1]["bits"] = "w8a8"
    config.write_text(yaml.safe_dump(document))
    code, _, err = command("--config", config, "--workers", 1)
    assert code == 2 and "the file says w8a8, the network is w4a4" in err


def test_measured_latency_is_taken_in_turns_and_kept(
    tiny_comparison: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_compare(tiny_comparison(latency={"measured_rounds": 5}, tasks=[SHORT], claims=[]))
    document = Session(config, tmp_path / "out").run(1)
    assert document is not None
    assert all(e["latency"]["ms"] > 0 and e["latency"]["kind"] == "measured" for e in document["entries"])
    monkeypatch.setattr(session_module, "measured_latency", None)
    again = Session(config, tmp_path / "out").run(1)
    assert again is not None and again["entries"] == document["entries"]


def test_processes_give_what_one_gives_and_a_lost_one_is_reported(
    tiny_comparison: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_compare(tiny_comparison(tasks=[SHORT], claims=[]))
    opener = Session(config, tmp_path).opener
    stress = STANDARD.model_copy(update={"episode_steps": 16})
    blocks = [workers.Block(e.name, "short", stress, (s,), None) for e in config.entries for s in (1, 2, 3)]

    def runnable(name: str) -> Any:
        return opener.open(config.entry(name)).runnable

    here = {(p.block.entry, p.block.seeds): p.scores for p in workers.play_all(blocks, runnable, 1)}
    assert len(here) == len(blocks)
    there = workers.play_all(blocks, runnable, 2)
    for played in (next(there), next(there)):
        assert played.scores.scores == pytest.approx(here[played.block.entry, played.block.seeds].scores)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(CompareError, match="ended early"):
        list(there)


def test_hours_leave_pauses_out_and_the_teachers_batch_is_the_largest(
    supernet_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.compare import cost

    assert cost.event_hours(tmp_path) is None
    (tmp_path / "events.out.tfevents.1").touch()
    (tmp_path / "events.out.tfevents.2").touch()
    monkeypatch.setattr(
        cost, "_times", lambda file: [0.0, 60.0, 120.0, 1e6, 1e6 + 60.0] if "1" in file.name[-1] else [5.0]
    )
    assert cost.event_hours(tmp_path) == pytest.approx(180.0 / 3600.0)
    assert cost.teacher_batch(supernet_config()) == 8
    assert cost.teacher_batch(supernet_config(supernet={"only": "w4a4"})) == 6


def test_hours_of_a_distillation_include_those_of_the_supernet_before_it(
    supernet_config: Callable[..., Any], supernet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.compare import cost

    config = supernet_config()
    rounds = DistillConfig(start=str(supernet_run), denoising_steps=2)
    config = config.model_copy(update={"distill": rounds})
    monkeypatch.setattr(cost, "event_hours", lambda folder: 2.0 if folder == supernet_run else 1.0)
    known = cost.training_cost(tmp_path / "checkpoint.pt", config, 4, {}, None)
    assert known.hours == 3.0 and known.steps is not None and known.steps > 4
    monkeypatch.setattr(cost, "event_hours", lambda folder: 2.0 if folder == supernet_run else None)
    unknown = cost.training_cost(tmp_path / "checkpoint.pt", config, 4, {}, None)
    assert unknown.hours is None and f"2.00 h of {supernet_run} alone" in unknown.source
    stated = StatedCost(hours=7.0, source="a note")
    told = cost.training_cost(tmp_path / "checkpoint.pt", config, 4, {}, stated)
    assert told.hours == 7.0 and "a note" in told.source and told.steps == known.steps
    monkeypatch.setattr(cost, "event_hours", lambda folder: 1.0)
    lost = config.model_copy(update={"distill": DistillConfig(start=str(tmp_path / "gone"), denoising_steps=2)})
    told = cost.training_cost(tmp_path / "checkpoint.pt", lost, 4, {}, stated)
    assert told.hours == 7.0 and "1.00 h of it alone" in told.source


def test_saving_what_was_only_printed_is_refused(tiny_comparison: Callable[..., Path], command: Command) -> None:
    code, _, err = command("--config", tiny_comparison(), "--from-results", "--save-results")
    assert code == 2 and "--save-results" in err
    code, _, err = command("--config", tiny_comparison(), "--from-results")
    assert code == 2 and "committed.json" in err and "--save-results" in err
    assert commands_compare.DEFAULT_CONFIG.endswith("pusht.yaml")


def test_committed_results_are_not_replaced_by_fewer_nor_printed_for_another_comparison(
    tiny_comparison: Callable[..., Path], command: Command
) -> None:
    config = tiny_comparison(tasks=[SHORT], claims=[])
    assert command("--config", config, "--workers", 1, "--save-results")[0] == 0
    committed = config.parent / "committed.json"
    before = committed.read_bytes()
    part = ("--config", config, "--workers", 1, "--only", "full", "--save-results")
    code, _, err = command(*part)
    assert code == 2 and "dcqfa on short" in err and "--merge" in err and committed.read_bytes() == before
    assert command(*part, "--merge", committed)[0] == 0
    assert json.loads(committed.read_bytes())["cells"] == json.loads(before)["cells"]
    code, _, err = command("--config", config, "--from-results", "--only", "full")
    assert code == 2 and "--only" in err
    code, _, err = command("--config", tiny_comparison(data_sha256="a" * 64), "--from-results")
    assert code == 2 and "data_sha256" in err and "committed.json" in err


def test_what_is_kept_of_an_entry_follows_the_file_and_scores_of_another_sampler_are_refused(
    tiny_comparison: Callable[..., Path], tmp_path: Path, supernet_run: Path
) -> None:
    copied = tmp_path / "supernet"
    shutil.copytree(supernet_run, copied)
    full, subnet = yaml.safe_load(tiny_comparison().read_text())["entries"]
    subnet |= {"supernet": str(copied)}

    def played(**fields: Any) -> Any:
        fields = {"entries": [full, subnet], "tasks": [SHORT], "claims": []} | fields
        return Session(load_compare(tiny_comparison(**fields)), tmp_path / "out").run(1)

    first = played()["entries"][1]
    stated = subnet | {"cost": {"teacher_calls": 123, "source": "a logbook"}}
    again = played(entries=[full, stated], latency={"measured_rounds": 5})["entries"][1]
    assert (again["cost"]["teacher_calls"], again["latency"]["kind"]) == (123, "measured")
    assert again["identity"] == first["identity"]

    payload = torch.load(copied / "checkpoint.pt", weights_only=True)
    payload["config"]["diffusion"]["steps"] += 1
    torch.save(payload, copied / "checkpoint.pt")
    with pytest.raises(CompareError, match=r"specification\.diffusion\.steps"):
        played()


def test_a_method_that_trains_is_of_the_data_of_its_own_run_and_errors_name_the_entry(
    tiny_comparison: Callable[..., Path],
    supernet_files: Any,
    supernet_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from training.baselines import batchquant, calibration, find_baseline

    original = calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", lambda policy, data: original(policy, data, observations=2))
    copied = tmp_path / "run"
    shutil.copytree(supernet_run, copied)
    full = yaml.safe_load(tiny_comparison().read_text())["entries"][0]
    trains = {"name": "bq", "method": "m", "bits": "w4a4", "baseline": "batchquant", "trained": str(copied)}
    opener = Session(
        load_compare(tiny_comparison(entries=[full, trains], pairs=[], claims=[])), tmp_path, str(supernet_files.data)
    ).opener
    with pytest.raises(CompareError, match=r"entry bq: baseline batchquant: .* is no BatchQuant supernet"):
        opener.open(opener.config.entry("bq"))

    def quantize(_self: Any, *arguments: Any, trained: Path, **options: Any) -> Any:
        assert trained == copied
        return find_baseline("rtn").quantize(*arguments, **options)

    monkeypatch.setattr(batchquant.BatchQuantSupernet, "quantize", quantize)
    payload = torch.load(copied / "checkpoint.pt", weights_only=True)
    assert opener.open(opener.config.entry("bq")).data == payload["data_sha256"]
    payload["data_sha256"] = "b" * 64
    torch.save(payload, copied / "checkpoint.pt")
    with pytest.raises(CompareError, match=f"entry bq: comes from other demonstrations .* field data is {'b' * 64}"):
        opener.open(opener.config.entry("bq"))


def test_bits_that_a_method_does_not_have_name_the_entry(
    tiny_comparison: Callable[..., Path], command: Command
) -> None:
    full = yaml.safe_load(tiny_comparison().read_text())["entries"][0]
    rtn = {"name": "rtn", "method": "RTN", "bits": "fp16", "baseline": "rtn"}
    config = tiny_comparison(entries=[full, rtn], tasks=[SHORT], claims=[], pairs=[])
    code, _, err = command("--config", config, "--workers", 1)
    assert code == 2 and "entry rtn: baseline bits 'fp16': expected" in err
