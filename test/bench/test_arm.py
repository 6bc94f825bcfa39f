"""The benchmarks of the arm measure what they say, on real processes, and refuse what cannot be measured."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from dcqfa_ros.bench.arm import repeat, run_arm_bench, summarize
from dcqfa_ros.bench.conditions import Conditions
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bench.stop import run_stop_bench
from dcqfa_ros.cli import main

QUIET = Conditions(0.1, 0.0, "other, nice 0")


def test_percentiles_are_those_of_the_latencies_and_the_conditions_are_told() -> None:
    values = list(np.linspace(1.0, 3.0, 201))
    result = summarize(values, 5.0, 100.0, "a to b", QUIET, repeated=2)
    assert (result.p50_ms, result.p99_ms, result.max_ms) == (2.0, 2.98, 3.0)
    assert (result.trials, result.repeated, result.limit_ms, result.problem) == (201, 2, 5.0, None)
    busy = summarize(values, 5.0, 100.0, "a to b", dataclasses.replace(QUIET, load_1min=1000.0))
    assert "load 1000.0" in str(busy.problem)
    with pytest.raises(BenchError, match="nothing was measured: a to b"):
        summarize([], 5.0, 100.0, "a to b", QUIET)


def test_a_trial_that_something_else_ended_is_begun_again_and_counted() -> None:
    outcomes = iter([1.0, BenchError("stopped"), 2.0])

    def trial(_: int) -> float:
        outcome = next(outcomes)
        if isinstance(outcome, BenchError):
            raise outcome
        return outcome

    assert repeat(2, trial) == ([1.0, 2.0], 1)

    def never(_: int) -> float:
        raise BenchError("stopped")

    with pytest.raises(BenchError, match="stopped"):
        repeat(2, never)


@pytest.mark.parametrize("run", [run_arm_bench, run_stop_bench])
def test_values_out_of_range_are_refused(run: object) -> None:
    with pytest.raises(BenchError, match="trials: expected 1 to"):
        run(0)
    with pytest.raises(BenchError, match="rate: expected 20 to 500"):
        run(1, float("nan"))


@pytest.mark.parametrize("what", ["arm", "stop"])
def test_the_command_measures_a_real_graph(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", what, "--trials", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trials"] == 2 == len(result["latencies_ms"])
    # No figure is a test, but nothing is faster than the wire or slower than the search for the frame.
    assert 0.0 < result["p50_ms"] <= result["p99_ms"] <= result["max_ms"] < 5000.0
