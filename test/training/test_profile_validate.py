"""Validation: predictions against measurements on the table's own device, and other tables refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcqfa_ros.devices.detect import detect
from dcqfa_ros.errors import UserError
from training import profile_networks, profile_validate
from training.cost import Cost, cost
from training.lut import CacheEffect, LookUpTable, TableError, save_table
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.profile import measure
from training.profile_graphs import FLOAT, INTEGER, BlockSize, DiffusionPolicyTGraphs
from training.profile_memory import MeasurementError, engine_growth
from training.profile_networks import Workbench
from training.profile_plot import PlotError, plot_report
from training.profile_runtime import ProfiledRuntime, profiled_runtime
from training.profile_table import ProfileSettings
from training.profile_tables import check_table, checked_runtime
from training.profile_timing import BURST, Timing, variant_of
from training.profile_validate import Compared, Report, ValidationError, validate
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.subnet import Precision

INFERS_ON_OPENVINO = True  # see test/conftest.py

POLICY = DiffusionPolicyTConfig(depth=3, heads=2, dim=32, ffn_ratio=2, horizon=6)
SECTION = {"min_depth": {"decoder": 1}, "head_ratios": [0.5, 1.0], "mlp_ratios": [0.5, 1.0], "precisions": ["fp32"]}
SPACE = SearchSpace(diffusion_policy_t_shape(POLICY, 5), SpaceConfig.model_validate_json(json.dumps(SECTION)))
SETTINGS = ProfileSettings(name="here", runs=BURST, warm_ups=0, subnets=0)
GRAPHS = DiffusionPolicyTGraphs(POLICY, 5)


@pytest.fixture(scope="module")
def runtime() -> ProfiledRuntime:
    return profiled_runtime("onnxruntime", detect())


@pytest.fixture(scope="module")
def table(runtime: ProfiledRuntime) -> LookUpTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_networks, "engine_growth", lambda *args: 10_000_000)
        return measure(SPACE, GRAPHS, SETTINGS, runtime=runtime)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_networks, "engine_growth", lambda *args: 10_000_000)


def test_each_network_is_compared_in_latency_and_memory(
    table: LookUpTable, runtime: ProfiledRuntime, no_processes: None
) -> None:
    report = validate(table, Workbench(SPACE, GRAPHS, SETTINGS, runtime), 7)
    assert {form: len(part) for form, part in report.by_form.items()} == {INTEGER: 4, FLOAT: 3}
    for point in report.points:
        assert point.predicted == cost(table, SPACE.shape, point.subnet, 16)
        assert point.measured.latency_ms > 0
        assert point.measured.memory_bytes == 10_000_000
    facts = report.as_dict()
    assert facts["n"] == 7
    assert facts["worst"] >= facts["mape"] > 0
    assert set(facts["forms"]) == {INTEGER, FLOAT}
    assert all(part["speed"] > 0 for part in facts["forms"].values())


def with_term(table: LookUpTable, ms_per_mb: float) -> LookUpTable:
    """The table with a cache that every network of float32 fits into."""
    term = {"cache": CacheEffect(low_bytes=10**9, high_bytes=10**9, ms_per_mb=ms_per_mb)}
    rows = [row.model_copy(update=term if row.precision is Precision.FP32 else {}) for row in table.fixed]
    return table.model_copy(update={"fixed": tuple(rows)})


@pytest.mark.parametrize("ms_per_mb", [0.0, 0.01])
def test_a_slower_computer_is_allowed_for(
    table: LookUpTable,
    runtime: ProfiledRuntime,
    no_processes: None,
    monkeypatch: pytest.MonkeyPatch,
    ms_per_mb: float,
) -> None:
    """Times are made up: everything takes twice what it did, with or without a cache in the table."""
    bench = Workbench(SPACE, GRAPHS, SETTINGS, runtime)
    fitted = with_term(table, ms_per_mb)

    def subnets(self: Workbench, part: Any) -> list[float]:
        reference = self.reference_ms(fitted, part[0].precision)
        return [reference, *(cost(fitted, SPACE.shape, subnet, 16).latency_ms for subnet in part)]

    monkeypatch.setattr(Workbench, "subnets", subnets)
    monkeypatch.setattr(profile_validate, "time_in_turn", lambda runs, *_: [Timing(2 * ms, 0.0) for ms in runs])
    facts = validate(fitted, bench, 6).as_dict()
    assert facts["mape"] == facts["worst"] == 0
    assert facts["present_mape"] == 0.5
    assert facts["forms"][INTEGER]["speed"] == facts["forms"][FLOAT]["speed"] == 2.0
    assert [note.split(": the")[0] for note in facts["notes"]] == ["not comparable: int8", "not comparable: float32"]


def test_only_a_steady_reference_at_another_speed_is_not_comparable() -> None:
    costs = Cost(1.0, 1e6)
    point = Compared(SPACE.smallest(), INTEGER, costs, costs, 1.0)
    assert not Report((point,), {INTEGER: 1.09}, 0.01).notes
    assert not Report((point,), {INTEGER: 1.5}, 0.2).notes  # busy
    (note,) = Report((point,), {INTEGER: 0.8}, 0.01).notes
    assert note.startswith("not comparable: int8: the reference network takes 0.800 times what it took")


def test_errors_are_those_of_the_points() -> None:
    subnet = SPACE.smallest()

    def point(executed: str, predicted: float, measured: float) -> Compared:
        costs = (Cost(ms, 2e6 * ms) for ms in (predicted, measured))
        return Compared(subnet, executed, *costs, 2.0 * measured)

    report = Report((point("a", 1.1, 1.0), point("a", 0.8, 1.0), point("b", 2.0, 2.0)), {"a": 1.0, "b": 1.5}, 0.01)
    facts = report.as_dict()
    assert (facts["mape"], facts["worst"], facts["memory_mape"], facts["n"]) == (0.1, 0.2, 0.1, 3)
    assert facts["forms"]["a"]["mape"] == 0.15
    assert facts["forms"]["b"] == {
        "mape": 0,
        "worst": 0,
        "present_mape": 0.5,
        "present_worst": 0.5,
        "memory_mape": 0,
        "memory_worst": 0,
        "n": 1,
        "speed": 1.5,
    }
    assert not facts["busy"]


def test_tables_of_other_conditions_are_refused_by_name(table: LookUpTable, runtime: ProfiledRuntime) -> None:
    here = detect()
    check_table(table, here, runtime, 1)
    check_table(table.model_copy(update={"runtime": "onnxruntime cpu"}), here, runtime)  # as tables were called once
    elsewhere = table.device.model_copy(update={"fingerprint": "another, 64 cores"})
    for other, message in (
        ({"device": elsewhere}, r"measured on another device \(another, 64 cores\); this one is "),
        ({"versions": {**table.versions, "onnxruntime": "0.1"}}, "measured with onnxruntime 0.1, installed is "),
        ({"runtime": "tensorrt"}, "measured on tensorrt, "),
        ({"threads": 7}, "measured with 7 threads, "),
    ):
        with pytest.raises(TableError, match=f"table here: {message}"):
            check_table(table.model_copy(update=other), here, runtime, 1)
    with pytest.raises(TableError, match="table orin_nx_16gb: modelled, not measured"):
        check_table(modelled_table(ORIN_NX_16GB, SPACE), here, runtime)
    with pytest.raises(TableError, match="table here: measured on onnxruntime, not openvino"):
        checked_runtime(table, here, "openvino")


def test_another_driver_and_a_runtime_that_is_gone_are_refused_by_name(
    table: LookUpTable, runtime: ProfiledRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = detect()
    assert checked_runtime(table, here, "onnxruntime", 1).name == "onnxruntime"
    newer = replace(runtime, versions={**runtime.versions, "driver": "581.2"})
    older = table.model_copy(update={"versions": {**table.versions, "driver": "570.1"}})
    check_table(older, here, replace(newer, versions=older.versions))
    with pytest.raises(TableError, match=r"measured with driver 570\.1, installed is 581\.2"):
        check_table(older, here, newer)
    monkeypatch.setattr("training.profile_runtime.distribution_version", lambda _: None)
    with pytest.raises(
        TableError, match=r"FILE: measured on this .* onnxruntime, .* the Python package onnxruntime is not"
    ):
        checked_runtime(table, here, label="FILE")


def test_fewer_than_two_networks_and_a_foreign_space_are_refused(
    table: LookUpTable, runtime: ProfiledRuntime, no_processes: None
) -> None:
    bench = Workbench(SPACE, GRAPHS, SETTINGS, runtime)
    with pytest.raises(ValidationError, match="expected at least 2 networks, got 1"):
        validate(table, bench, 1)
    other = SearchSpace(diffusion_policy_t_shape(POLICY, 6), SPACE.config)
    with pytest.raises(TableError, match="6 tokens"):
        validate(table, replace(bench, space=other), 2)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_a_larger_network_is_larger() -> None:
    policy = DiffusionPolicyTConfig(depth=2, heads=4, dim=256, horizon=6)
    graphs = DiffusionPolicyTGraphs(policy, 5)
    small = variant_of(graphs, [BlockSize(1, 64, FLOAT)], 10)
    few, many = (variant_of(graphs, [BlockSize(4, 1024, FLOAT)] * count, 10) for count in (1, 6))
    difference = engine_growth("onnxruntime", 1, small, many) - engine_growth("onnxruntime", 1, small, few)
    weights = sum(map(len, many[0].values())) - sum(map(len, few[0].values()))
    assert 0.8 * weights < difference < 3 * weights


def test_a_process_that_fails_says_why() -> None:
    files, inputs = variant_of(GRAPHS, [BlockSize(1, 32, FLOAT)], 10)
    broken = ({**files, "denoiser": b"damaged"}, inputs)
    with pytest.raises(MeasurementError, match=r"could not be measured: .*denoiser\.onnx"):
        engine_growth("onnxruntime", 1, (files, inputs), broken)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = Path(__file__).parents[2] / "config" / "training" / "pusht_keypoints.yaml"
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    document["policy"] = POLICY.model_dump(mode="json")
    document["executed_actions"] = 4
    tables = [str(tmp_path / "orin.json"), str(tmp_path / "here.json")]
    document["supernet"] = {"warm_start": "pusht_keypoints", "space": SECTION, "tables": tables}
    path = tmp_path / "supernet.yaml"
    path.write_text(yaml.safe_dump(document))
    save_table(tmp_path / "orin.json", modelled_table(ORIN_NX_16GB, SPACE))
    return path


def test_the_command_finds_the_table_of_this_device_and_draws(
    tmp_path: Path,
    config: Path,
    table: LookUpTable,
    no_processes: None,
    in_process: Callable[[str], Callable[..., tuple[int, str, str]]],
) -> None:
    file = tmp_path / "here.json"
    save_table(file, table)
    before = file.read_bytes()
    run = in_process("profile")
    options = ("--config", config, "--validate", 4, "--runs", 5, "--warm-ups", 0)
    code, out, _ = run(*options, "--json")
    facts = json.loads(out)
    assert code == 0
    assert {"mape", "worst", "memory_mape", "n", "forms"} <= set(facts)
    assert facts["n"] == 4 == len(facts["subnets"])
    assert (tmp_path / "here_validation.png").read_bytes().startswith(b"\x89PNG")
    assert file.read_bytes() == before
    code, out, _ = run(*options, "--plot", tmp_path / "other.svg")
    assert "all, 4 random subnets: latency off by" in out
    assert "at most (at the present speed " in out
    assert b"<svg" in (tmp_path / "other.svg").read_bytes()


def test_the_command_refuses_before_it_measures(
    tmp_path: Path,
    config: Path,
    table: LookUpTable,
    in_process: Callable[[str], Callable[..., tuple[int, str, str]]],
) -> None:
    run = in_process("profile")

    def refused(*arguments: object) -> str:
        code, _, errors = run("--config", config, *arguments)
        assert code != 0
        return errors

    assert "--validate: no table at hand was measured on this device" in refused("--validate", 2)
    assert "--validate: expected at least 2, got 1" in refused("--validate", 1)
    assert "modelled, not measured" in refused("--validate", 2, "--table", tmp_path / "orin.json")
    save_table(tmp_path / "old.json", table.model_copy(update={"versions": {"onnxruntime": "0.1"}}))
    assert "measured with onnxruntime 0.1" in refused("--validate", 2, "--table", tmp_path / "old.json")
    assert "--out: expected the file" in refused()


def test_a_picture_that_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    costs = Cost(1.0, 1e6)
    report = Report((Compared(SPACE.smallest(), INTEGER, costs, costs, 1.0),), {INTEGER: 1.0}, 0.0)
    with pytest.raises(PlotError, match=r"plot: .*x\.abacus"):
        plot_report(report, "title", tmp_path / "x.abacus")
    assert not list(tmp_path.iterdir())
    assert issubclass(PlotError, UserError)
    assert Precision.INT in SPACE.precisions
