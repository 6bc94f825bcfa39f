"""The benchmark of chunk execution: its table, the file it goes on from, its page, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.bench import chunking
from dcqfa_ros.bench.chunking import NotRun, Task, delay_ticks, plan_tasks, run_tasks
from dcqfa_ros.bench.chunking_contenders import Contender, find_contenders
from dcqfa_ros.bench.chunking_page import nice_ticks, render_page
from dcqfa_ros.bench.chunking_record import Outcome, Record, Settings
from dcqfa_ros.bench.chunking_table import describe, make_rows
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.cli import main
from dcqfa_ros.runtime.chunking import Method
from test.conftest import make_spec
from test.runtime.conftest import ACTED, tiny_files, tiny_spec

WEIGHTS = "a" * 64


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    write_bundle(folder, *tiny_spec())
    return folder


def made(
    method: Method = Method.ASYNCHRONOUS, ticks: int = 0, scores: tuple[float, ...] = (0.5, 0.7), **more: Any
) -> Outcome:
    n = len(scores)
    values: dict[str, Any] = {
        "bundle": "tiny",
        "variant": "w8a8",
        "weights": WEIGHTS,
        "timing_note": "",
        "steps": (300,) * n,
        "starved": (30,) * n,
        "chunks": (38,) * n,
        "late": 0,
        "jerk": (2000.0, None, *(3000.0,) * (n - 2)),
        "agent_jerk": (1000.0,) * n,
        "discontinuity": 4.0,
        "discontinuity_p95": 9.0,
        "seams": 74,
        "jump": 5.0,
        "seconds": 1.0,
    }
    return Outcome(method=method, ticks=ticks, scores=scores, **(values | more))


def made_settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "bundle": "tiny",
        "variant": "w8a8",
        "first_seed": 5,
        "seeds": 2,
        "denoising_steps": None,
        "execution_horizon": 8,
        "threads": 1,
        "versions": {"numpy": "2"},
    }
    return Settings(**(values | changes))


@pytest.mark.parametrize(
    ("delay", "ticks"), [(0, 0), (0.1, 1), (50, 1), (100, 1), (100.1, 2), (200, 2), (300, 3), (400, 4)]
)
def test_a_latency_costs_whole_control_periods(delay: float, ticks: int) -> None:
    assert delay_ticks(delay, 10.0) == ticks


def test_differences_are_of_pairs_to_no_latency_and_to_synchronous_execution() -> None:
    outcomes = [
        made(Method.SYNCHRONOUS, 0, (0.8, 0.9)),
        made(Method.SYNCHRONOUS, 2, (0.5, 0.7)),
        made(Method.TRAINED, 0, (0.8, 0.8)),
        made(Method.TRAINED, 2, (0.78, 0.8), timing_note="cut"),
    ]
    rows = make_rows(outcomes, {0: 0, 150: 2, 200: 2, 400: 4}, 5, {Method.TRAINED: "other bundle"})
    assert [(row.method, row.delay) for row in rows] == [
        *(("synchronous", delay) for delay in (0, 150, 200)),
        *(("trained", delay) for delay in (0, 150, 200)),
    ]
    waiting, trained = rows[2], rows[5]
    assert waiting.against_no_delay is not None and waiting.against_no_delay.mean == pytest.approx(-0.25)
    assert not waiting.against_no_delay.within_margin
    assert waiting.against_synchronous is None and rows[0].against_no_delay is None
    assert trained.against_no_delay is not None and trained.against_no_delay.mean == pytest.approx(-0.01)
    assert trained.against_no_delay.within_margin and not trained.against_no_delay.shown_within_margin
    assert trained.against_synchronous is not None and trained.against_synchronous.mean == pytest.approx(0.19)
    assert trained.note == "other bundle; cut"
    assert trained.score == pytest.approx(0.79)
    assert (trained.starved_share, trained.steps, trained.seeds) == (0.1, 300.0, 2)
    assert trained.jerk == 2000.0 and trained.jerk_interval is None  # one of two episodes was long enough
    assert any("+0.19" in line or "-0.010" in line for line in describe(rows))


def test_an_interrupted_benchmark_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Task] = []

    def run(task: Task, progress: Callable[[int], object] | None = None) -> Outcome:
        if len(done) == 1 and task.ticks == 2:
            raise KeyboardInterrupt
        done.append(task)
        return made(task.method, task.ticks)

    monkeypatch.setattr(chunking, "run_task", run)
    contender = Contender("tiny", "nowhere", "w8a8", WEIGHTS)
    tasks = [Task(Method.SOFT, ticks, 100.0 * ticks, contender, (5, 6), None, 1, 8) for ticks in (0, 2, 4)]
    path = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks, Record(made_settings(), path))
    assert [o.ticks for o in Record(made_settings(), path).outcomes] == [0]
    done.append(tasks[0])  # lets the second run pass
    outcomes = run_tasks(tasks, Record(made_settings(), path))
    assert [task.ticks for task in done] == [0, 0, 2, 4]
    assert [outcome.ticks for outcome in outcomes] == [0, 2, 4]
    assert run_tasks(tasks, Record(made_settings(), path)) == outcomes
    assert len(done) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_other_weights_are_not_used(tmp_path: Path) -> None:
    record = Record(made_settings(), tmp_path / "rows.json")
    record.add(made(Method.SOFT, 2))
    assert record.find(Method.SOFT, 2, WEIGHTS) is not None
    assert record.find(Method.SOFT, 2, "b" * 64) is None
    assert record.find(Method.SOFT, 1, WEIGHTS) is None


@pytest.mark.parametrize(
    ("field", "value"), [("first_seed", 6), ("seeds", 3), ("denoising_steps", 4), ("versions", {"numpy": "3"})]
)
def test_rows_made_with_other_settings_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "rows.json"
    Record(made_settings(), path).add(made())
    before = path.read_bytes()
    with pytest.raises(BenchError, match=rf"rows\.json: was made with {field} = "):
        Record(made_settings(**{field: value}), path)
    assert path.read_bytes() == before


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.sampled_from([b"{}", b"[]", b'{"format": 1}', b'{"format": 2}', b"NaN"])))
def test_a_damaged_file_is_refused_and_left_alone(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("record") / "rows.json"
    path.write_bytes(content)
    with pytest.raises(BenchError, match=r"rows\.json: "):
        Record(made_settings(), path)
    assert path.read_bytes() == content


def test_a_truncated_outcome_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    Record(made_settings(), path).add(made())
    document = json.loads(path.read_text())
    document["outcomes"][0]["steps"] = [300]
    path.write_text(json.dumps(document))
    with pytest.raises(BenchError, match="steps has 1 entries, scores has 2"):
        Record(made_settings(), path)


def test_a_place_that_cannot_be_written_shows_before_the_first_episode(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"--resume .*missing/rows\.json: cannot be written"):
        Record(made_settings(), tmp_path / "missing" / "rows.json")


def test_guided_chunking_runs_on_the_float_variant_and_says_so(bundle: Path) -> None:
    field = find_contenders(str(bundle), "w8a8", None, [Method.SOFT, Method.GUIDED])
    assert field.contenders[Method.SOFT].variant == "w8a8" and not field.contenders[Method.SOFT].note
    assert field.contenders[Method.GUIDED].variant == "fp32"
    assert "run on fp32" in field.contenders[Method.GUIDED].note
    asked = find_contenders(str(bundle), "fp32", None, [Method.GUIDED]).contenders[Method.GUIDED]
    assert (asked.variant, asked.note) == ("fp32", "")


def test_without_a_float_variant_guided_chunking_is_not_run(tmp_path: Path) -> None:
    files = {f"variants/w8a8/{role}.onnx": data for role, data in tiny_files(quantized=True).items()}
    spec = make_spec(files | {f"variants/fp32/{role}.onnx": data for role, data in tiny_files().items()})
    only = spec.model_copy(
        update={"variants": tuple(v for v in spec.variants if v.name == "w8a8"), "default_variant": "w8a8"}
    )
    write_bundle(tmp_path / "only", only, files)
    field = find_contenders(str(tmp_path / "only"), "w8a8", None, [Method.GUIDED])
    assert not field.contenders
    assert "needs the denoiser's derivative" in field.not_run[Method.GUIDED]
    assert "has no fp32 variant" in field.not_run[Method.GUIDED]


def test_methods_that_a_sampler_does_not_allow_are_not_run(tmp_path: Path) -> None:
    spec, files = tiny_spec()
    diffusion = spec.diffusion.model_dump() | {"sampler": "ddpm"}
    write_bundle(tmp_path / "ddpm", make_spec(files, diffusion=diffusion), files)
    field = find_contenders(str(tmp_path / "ddpm"), "w8a8", None, [Method.ENSEMBLE, Method.SOFT, Method.GUIDED])
    assert list(field.contenders) == [Method.ENSEMBLE]
    assert all("is defined for sampler ddim" in reason for reason in field.not_run.values())


def test_without_a_network_trained_for_it_trained_chunking_is_listed_as_not_run(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcqfa_ros.bench.chunking_contenders.DEFAULT_TRAINED", "no_such_bundle")
    field = find_contenders(str(bundle), "w8a8", None, [Method.TRAINED])
    tasks, not_run = plan_tasks(field, [Method.TRAINED], [0.0, 200.0], [1], None, 1, 8)
    assert not tasks
    assert [(entry.method, entry.delay) for entry in not_run] == [(Method.TRAINED, 0.0), (Method.TRAINED, 200.0)]
    assert "no bundle 'no_such_bundle' was found" in not_run[0].reason


def test_a_network_named_for_trained_chunking_has_to_be_trained_for_it(bundle: Path) -> None:
    with pytest.raises(BenchError, match=r"--trained-bundle: bundle tiny: diffusion.prefix is 0"):
        find_contenders(str(bundle), "w8a8", str(bundle), [Method.TRAINED])


def test_latencies_of_the_same_number_of_periods_are_run_once(bundle: Path) -> None:
    field = find_contenders(str(bundle), "w8a8", None, [Method.SOFT])
    tasks, _ = plan_tasks(field, [Method.SOFT], [0.0, 50.0, 100.0, 200.0], [1, 2], None, 1, 8)
    assert [task.ticks for task in tasks] == [0, 1, 2]


def command(bundle: Path, *options: str) -> list[str]:
    return ["bench", "chunking", "--bundle", str(bundle), "--seeds", "2", "--first-seed", "300000", *options]


def test_the_command_prints_a_row_per_method_and_latency_and_writes_a_page(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, kept = tmp_path / "page.html", tmp_path / "rows.json"
    options = ["--methods", "synchronous,asynchronous,soft,guided", "--delays-ms", "0,50,100", "--steps", "1"]
    options += ["--resume", str(kept), "--json"]
    assert main(command(bundle, *options, "--html", str(page))) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {(row["method"], row["delay"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 12 and result["not_run"] == []
    for row in rows.values():
        assert 0.0 <= row["score"] <= 1.0 and len(row["interval"]) == 2 and row["jerk"] > 0.0
        assert row["discontinuity"] is not None and row["seeds"] == 2
        assert row["variant"] == ("fp32" if row["method"] == "guided" else "w8a8")
    assert rows["synchronous", 50]["score"] == rows["synchronous", 100]["score"]
    assert rows["synchronous", 100]["starved_share"] > 0.05 and rows["asynchronous", 100]["starved_share"] == 0.0
    assert "chunk execution under latency" in page.read_text().lower()
    assert main(command(bundle, *options)) == 0  # all rows are there already
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == result["rows"]


def with_flag_channel(denoiser: bytes) -> bytes:
    """The tiny denoiser as one that takes known tokens: it has their channel and leaves it unread."""
    model = onnx.load_from_string(denoiser)
    noisy = next(entry for entry in model.graph.input if entry.name == "noisy")
    noisy.type.tensor_type.shape.dim[2].dim_value = ACTED + 1
    for node in model.graph.node:
        node.input[:] = ["actions" if name == "noisy" else name for name in node.input]
    bounds = {"from": [0], "to": [ACTED], "along": [2]}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v), k) for k, v in bounds.items())
    model.graph.node.insert(0, onnx.helper.make_node("Slice", ["noisy", *bounds], ["actions"]))
    return model.SerializeToString()


def test_trained_chunking_runs_on_the_network_trained_for_it(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, files = tiny_spec()
    files = {path: with_flag_channel(data) if "denoiser" in path else data for path, data in files.items()}
    diffusion = spec.diffusion.model_dump() | {"prefix": 4}
    write_bundle(tmp_path / "known", make_spec(files, name="known", diffusion=diffusion), files)
    options = ["--methods", "trained", "--delays-ms", "0,200,400", "--trained-bundle", str(tmp_path / "known")]
    assert main(command(bundle, *options, "--steps", "1", "--json")) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["bundle"], row["variant"], row["delay_ticks"]) for row in rows] == [
        ("known", "w8a8", ticks) for ticks in (0, 2, 4)
    ]
    assert [row["note"] for row in rows[:2]] == ["", ""]
    assert "delay 4 exceeds what the network was trained for: taken as 3" in rows[2]["note"]
    assert all(row["starved_share"] == 0.0 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "--methods: 'magic' is unknown; there are synchronous"),
        (["--delays-ms", "soon"], "--delays-ms: expected numbers in ms"),
        (["--delays-ms", "-1"], "--delays-ms: expected 0 to 60000 ms, got -1"),
        (["--delays-ms", "nan"], "--delays-ms: expected 0 to 60000 ms, got nan"),
        (["--delays-ms", ","], "--delays-ms: expected at least one"),
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["--first-seed", "-3"], "start seeds are 0 to 4294967295"),
        (["--steps", "0"], "--steps 0: policy 'tiny' takes 1 to"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--jobs", "0"], "--jobs: expected at least 1"),
        (["--execution-horizon", "16"], "--execution-horizon 16: a chunk of 'tiny' holds 1 to 15"),
        (["--variant", "w2a2"], "--variant: bundle 'tiny' has no variant 'w2a2'"),
        (["--trained-bundle", "nowhere"], "nowhere: no such bundle"),
    ],
)
def test_senseless_options_are_refused_by_name(
    bundle: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(command(bundle, *options)) == 2
    assert message in capsys.readouterr().err


def test_two_processes_compute_the_same(bundle: Path) -> None:
    field = find_contenders(str(bundle), "w8a8", None, [Method.SOFT])
    tasks, _ = plan_tasks(field, [Method.SOFT], [0.0, 200.0], [300_000], 1, 1, 8)
    alone = run_tasks(tasks, Record(made_settings()))
    together = run_tasks(tasks, Record(made_settings()), jobs=2)
    assert [o.model_copy(update={"seconds": 0.0}) for o in together] == [
        o.model_copy(update={"seconds": 0.0}) for o in alone
    ]


def test_the_page_shows_every_row_and_what_is_missing() -> None:
    outcomes = [made(Method.SOFT, 0, timing_note="<b>cut</b>"), made(Method.SOFT, 4, discontinuity=None)]
    rows = make_rows(outcomes, {0: 0, 400: 4}, 5, {})
    missing = [NotRun(Method.TRAINED, delay, "no network & no bundle") for delay in (0.0, 400.0)]
    page = render_page(rows, missing, made_settings())
    assert page.count("<tr") == 1 + len(rows)
    assert "no network &amp; no bundle" in page and "at 0, 400 ms" in page
    assert "<b>cut</b>" not in page and "&lt;b&gt;cut" in page
    assert "<script" not in page


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_an_axis_holds_its_values_in_few_round_steps(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    slack = 1e-6 * max(1.0, abs(low) + span)
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack
    assert ticks == sorted(set(ticks))
