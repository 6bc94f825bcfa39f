"""The engine benchmark measures whole chunks in turn and reports what it could not compare."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.bench import engine as bench
from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import BlockSpec
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.commands.bench import _engine
from dcqfa_ros.devices.detect import detect
from dcqfa_ros.runtime.errors import EngineError
from test.runtime.conftest import tiny_spec


class EntryPoint:
    """Stands for a function that another distribution registered."""

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.load = name, load


class Reference:
    name = "torch"

    def __init__(self, spec: Any, steps: int, threads: int) -> None:
        self.arguments, self.runs = (spec.name, steps, threads), 0

    def run(self) -> None:
        self.runs += 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "tiny", *tiny_spec())
    return tmp_path / "tiny"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def register(*entries: EntryPoint) -> None:
        monkeypatch.setattr(bench, "entry_points", lambda group: entries)

    register()
    return register


def test_every_variant_has_a_row_and_a_ratio(folder: Path, registered: Callable[..., None]) -> None:
    report = bench.compare_engines(load_bundle(folder), steps=2, rounds=3)
    assert [(row.engine, row.variant, row.threads, row.steps, row.samples) for row in report.rows] == [
        ("onnxruntime", "fp32", 1, 2, 3),
        ("onnxruntime", "w8a8", 1, 2, 3),
    ]
    assert all(0.0 < row.p50_ms <= row.p99_ms for row in report.rows)
    fp32, w8a8 = (row.p50_ms for row in report.rows)
    assert report.ratios["w8a8_vs_fp32"] == pytest.approx(fp32 / w8a8, abs=1e-3)
    assert report.ratios["w8a8_vs_torch_eager"] is None
    assert report.notes == (
        "no row torch_eager: nothing is registered for comparison (install the training requirements)",
    )
    assert report.batch == 1


def test_registered_reference_gets_a_row_with_the_same_steps_and_threads(
    folder: Path, registered: Callable[..., None]
) -> None:
    made: list[Reference] = []

    def make(*arguments: Any) -> Reference:
        made.append(Reference(*arguments))
        return made[-1]

    registered(EntryPoint("torch_eager", lambda: make))
    report = bench.compare_engines(load_bundle(folder), variants=["w8a8"], steps=3, threads=1, rounds=4)
    assert made[0].arguments == ("tiny", 3, 1)
    assert made[0].runs == 3 + 4  # warm-up and rounds
    assert [row.engine for row in report.rows] == ["onnxruntime", "torch_eager"]
    assert report.ratios["w8a8_vs_torch_eager"] is not None
    assert report.ratios["w8a8_vs_fp32"] is None
    assert report.notes == ()


def test_reference_that_cannot_be_imported_becomes_a_note(folder: Path, registered: Callable[..., None]) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'torch'")

    registered(EntryPoint("torch_eager", missing))
    report = bench.compare_engines(load_bundle(folder), steps=2, rounds=2)
    assert report.notes == ("no row torch_eager: No module named 'torch'",)


def test_a_runtime_that_cannot_be_opened_is_refused_with_the_reason(
    folder: Path, registered: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="runtime 'onnx' is unknown; there are onnxruntime"):
        bench.compare_engines(load_bundle(folder), runtimes=["onnx"])

    def refuse(*_: Any, **__: Any) -> None:
        raise EngineError("runtime openvino: the Python package openvino is not installed: pip install openvino")

    monkeypatch.setattr(bench, "open_engine", refuse)
    with pytest.raises(bench.BenchError, match=r"no row openvino fp32: .*not installed"):
        bench.compare_engines(load_bundle(folder), runtimes=["openvino"])


def test_a_variant_that_one_runtime_cannot_load_becomes_a_note(
    folder: Path, registered: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = bench.open_engine

    def only_fp32(runtime: str, files: Any, *, threads: int, name: str) -> Any:
        if runtime == "openvino" and name != "fp32":
            raise EngineError("denoiser.onnx: not for this runtime")
        return opened("onnxruntime", files, threads=threads, name=name)

    monkeypatch.setattr(bench, "open_engine", only_fp32)
    report = bench.compare_engines(load_bundle(folder), runtimes=["onnxruntime", "openvino"], steps=2, rounds=2)
    assert [(row.engine, row.variant) for row in report.rows] == [
        ("onnxruntime", "fp32"),
        ("onnxruntime", "w8a8"),
        ("openvino", "fp32"),
    ]
    assert "no row openvino w8a8: denoiser.onnx: not for this runtime" in report.notes
    assert report.ratios["openvino.w8a8_vs_fp32"] is None
    assert report.ratios["w8a8_vs_fp32"] is not None


def test_ratios_are_of_the_whole_policy_and_of_what_a_search_chose() -> None:
    spec, _ = tiny_spec()
    fp32, w8a8 = spec.variants
    size = spec.architecture
    small = {"subnet": "x", "blocks": (BlockSpec(index=0, heads=1, ffn_dim=1),), "precision": "w8a8"}
    assert (size.heads, size.ffn_dim, size.depth) != (1, 1, 1)
    variants = (
        fp32,
        w8a8,
        w8a8.model_copy(update=small | {"name": "small"}),
        w8a8.model_copy(update=small | {"name": "found", "searched_for": "cpu, at most 3 ms"}),
    )
    spec = spec.model_copy(update={"variants": variants})
    times = {"fp32": 30.0, "w8a8": 11.0, "small": 1.0, "found": 4.0}
    rows = [bench.Row("onnxruntime", name, 1, 16, ms, ms, 5) for name, ms in times.items()]
    rows.append(bench.Row("torch_eager", "fp32", 1, 16, 120.0, 120.0, 5))
    assert bench._ratios(spec, rows, ["onnxruntime"]) == {
        "w8a8_vs_torch_eager": pytest.approx(120 / 11, abs=1e-3),
        "w8a8_vs_fp32": pytest.approx(30 / 11, abs=1e-3),
        "searched_vs_torch_eager": pytest.approx(30.0),
    }


def test_contenders_take_turns_and_each_starts_a_round() -> None:
    order: list[str] = []
    contenders = [bench.Contender("e", name, name, 1, 1, lambda name=name: order.append(name)) for name in "abc"]
    bench.measure(contenders, 3)
    assert "".join(order[9:]) == "abcbcacab"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rounds": 1}, "rounds: expected at least 2"),
        ({"steps": 0}, "steps: expected 1 to 100, got 0"),
        ({"variants": ["int2"]}, "no variant 'int2'; it has fp32, w8a8"),
    ],
)
def test_wrong_request_is_refused(arguments: dict[str, Any], text: str, folder: Path) -> None:
    with pytest.raises(bench.BenchError, match=text):
        bench.compare_engines(load_bundle(folder), **arguments)


def arguments(folder: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "bundle": str(folder),
        "variants": "",
        "steps": 2,
        "threads": 1,
        "rounds": 2,
        "save": False,
        "small_pages": False,
    }
    values |= {"json": True, "runtimes": "onnxruntime"}
    return argparse.Namespace(**values | changes)


def test_command_prints_rows_and_ratios_as_json(
    folder: Path, registered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _engine(arguments(folder)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["rows"][0]) >= {"engine", "variant", "threads", "steps", "p50_ms", "p99_ms"}
    assert set(printed["ratios"]) == {"w8a8_vs_torch_eager", "w8a8_vs_fp32", "searched_vs_torch_eager"}
    assert printed["device"]
    spec = load_bundle(folder).spec
    assert [row["weights"] for row in printed["rows"]] == [v.weights for v in spec.variants]
    assert printed["fingerprint"] == detect().fingerprint
    assert printed["batch"] == 1


def test_command_prints_a_table_and_keeps_latencies_when_asked(
    folder: Path, registered: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    from dcqfa_ros.devices import records

    file = tmp_path / "latency.json"
    monkeypatch.setattr(records, "records_file", lambda: file)
    assert _engine(arguments(folder, json=False, save=True)) == 0
    assert "w8a8_vs_fp32" in capsys.readouterr().out
    kept = records.load_records(file).records
    assert {record.variant for record in kept} == {"fp32", "w8a8"}
    assert {(r.record.steps, r.record.threads) for r in kept} == {(2, 1)}
