"""Measured latencies survive in the user's cache, atomically, and a damaged file is named instead of believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.bundle.schema import LatencyRecord
from dcqfa_ros.devices.records import (
    LocalRecord,
    LocalRecords,
    RecordsError,
    bench_records,
    is_of_version,
    load_records,
    matches,
    records_file,
    save_records,
)


def local(p50: float = 5.0, weights: str = "a" * 64, **changes) -> LocalRecord:
    values = {"device": "d", "runtime": "onnxruntime 1.31.1", "kind": "measured", "threads": 1, "steps": 16}
    record = LatencyRecord(**(values | {"p50_ms": p50, "command": "dcqfa bench engine"} | changes))
    return LocalRecord(variant="fp32", weights=weights, record=record)


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert load_records(tmp_path / "none.json") == LocalRecords()


def test_records_come_back_as_they_were_saved(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "latency.json"
    assert save_records([local(), local(weights="b" * 64)], file) == file
    assert load_records(file).records == (local(), local(weights="b" * 64))
    assert [f.name for f in file.parent.iterdir()] == ["latency.json"], "no temporary file is left"


def test_a_new_measurement_replaces_that_of_the_same_conditions(tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    save_records([local(5.0), local(6.0, steps=8)], file)
    save_records([local(7.0, runtime="onnxruntime 1.32.0")], file)
    assert sorted(r.record.p50_ms for r in load_records(file).records) == [6.0, 7.0]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema_version": 2}', '{"records": [{"variant": "x"}]}', '{"new": 1}']
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "latency.json"
    file.write_text(text)
    with pytest.raises(RecordsError, match=r"latency\.json: .*delete the file"):
        load_records(file)
    with pytest.raises(RecordsError):
        save_records([local()], file)
    assert file.read_text() == text


@given(st.binary(max_size=60))
def test_any_bytes_are_records_or_a_records_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("records") / "latency.json"
    file.write_bytes(data)
    with pytest.raises(RecordsError):
        load_records(file)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordsError, match=r"latency\.json: cannot be"):
        save_records([local()], tmp_path / "file" / "latency.json")


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert records_file() == tmp_path / "dcqfa_ros" / "latency.json"


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime 1.23.2", "onnxruntime/w8a8"])
def test_any_version_of_the_runtime_matches(runtime: str) -> None:
    record = local(runtime=runtime).record
    assert matches(record, "d", "onnxruntime", 1, 16)
    assert not matches(record, "d", "tensorrt", 1, 16)


def bench(*engines: str, **versions: str) -> dict:
    row = {"variant": "w8a8", "weights": "a" * 64, "threads": 1, "steps": 16, "p50_ms": 2.0, "p99_ms": 3.0}
    return {
        "fingerprint": "d",
        "bundle": "tiny",
        "versions": {name.replace("_", "-"): version for name, version in versions.items()},
        "rows": [{**row, "engine": engine} for engine in engines],
    }


def test_a_benchmark_gives_records_of_every_runtime_with_its_version() -> None:
    versions = {"onnxruntime": "1.31.1", "tensorrt_cu13": "10.16", "torch": "2.13.0"}
    records = bench_records(bench("onnxruntime", "tensorrt", "torch_cuda", "torch_eager", **versions))
    assert [r.record.runtime for r in records] == ["onnxruntime 1.31.1", "tensorrt 10.16", "torch_cuda 2.13.0"]
    assert records[1].record.command.endswith("--runtimes tensorrt")


def test_a_benchmark_without_the_version_of_a_runtime_is_refused() -> None:
    with pytest.raises(KeyError, match=r"versions\.openvino"):
        bench_records(bench("openvino", onnxruntime="1.31.1"))


@pytest.mark.parametrize(
    ("runtime", "kind", "same"),
    [
        ("onnxruntime 1.31.1", "measured", True),
        ("onnxruntime 1.31.10", "measured", False),
        ("onnxruntime", "measured", False),
        ("onnxruntime", "predicted", True),
        ("onnxruntime 1.30.0", "predicted", False),
    ],
)
def test_a_record_belongs_to_one_version_of_its_runtime(runtime: str, kind: str, same: bool) -> None:
    assert is_of_version(local(runtime=runtime, kind=kind).record, "1.31.1") is same


def test_threads_do_not_matter_where_none_are_asked_for() -> None:
    record = local(threads=4).record
    assert matches(record, "d", "onnxruntime", None, 16) and not matches(record, "d", "onnxruntime", 1, 16)
