"""A message is taken, and its cost told, on both executors."""

from __future__ import annotations

import json

import pytest

from dcqfa_ros.bench import executor
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.cli import main


def test_both_executors_are_measured_as_often_and_the_ratio_is_that_of_their_medians() -> None:
    said: list[str] = []
    bench = executor.run_executor_bench(seconds=1.0, rate=100.0, rounds=1, progress=said.append)
    assert len(bench.stream_us) == len(bench.rclpy_us) == 1
    assert min(*bench.stream_us, *bench.rclpy_us) > 0.0
    assert bench.ratio == bench.rclpy_us[0] / bench.stream_us[0]
    assert all(count >= 0.9 * 90 for count in bench.received.values()), "a second less what is not counted yet"
    assert [line.split(": ")[1].split()[0] for line in said] == list(executor.EXECUTORS)


def test_messages_that_did_not_arrive_are_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_LEAST_SHARE", 10.0)
    with pytest.raises(BenchError, match="cannot keep up with 100 per second"):
        executor.run_executor_bench(seconds=0.5, rate=100.0, rounds=1)


@pytest.mark.parametrize("option", ["--seconds", "--rate", "--rounds"])
def test_values_out_of_range_are_refused_by_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "executor", option, "0", "--json"]) != 0
    assert option.strip("-") in capsys.readouterr().err


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = executor.ExecutorBench(
        [100.0], [300.0], 3.0, 400.0, {"stream": 1, "rclpy": 1}, "10 subscriptions", 0.1, 0.0
    )
    monkeypatch.setattr(executor, "run_executor_bench", lambda *_: bench)
    assert main(["bench", "executor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == 3.0
    assert main(["bench", "executor"]) == 0
    assert "ratio of the medians 3.00" in capsys.readouterr().out
