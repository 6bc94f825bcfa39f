from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcqfa_ros.sim.pusht import PushTWorld
from training.evaluate import LAST_SEED, find, roll_out
from training.rollouts import answers, record
from training.rollouts_bench import Options, RolloutBenchError, _Contender, bench_rollouts

SEEDS = (3, 5)


# Whole runs ----------------------------------------------------------------------------------------------------------


def test_recorded_runs_score_as_evaluation_does(supernet_run: Path) -> None:
    with find(str(supernet_run), "w8a8").open() as policy:
        run = record(policy, SEEDS, 2, steps=2)
        scores = roll_out(policy, SEEDS, 2, 2)
        again = answers(policy, run, steps=2)
    assert run.scores.tolist() == list(scores.scores) and run.steps.tolist() == list(scores.steps)
    assert run.states.shape == (2, 301, 5) and run.actions.shape == (2, 38, 8, 2)
    assert np.allclose(again, run.actions, atol=0.05)
    world = PushTWorld()
    world.reset(SEEDS[0])
    for step in range(16):
        world.step(run.actions[0].reshape(-1, 2)[step])
    assert np.array_equal(world.state, run.states[0, 16])


def test_a_run_that_ends_within_a_chunk_has_as_many_states_as_steps(supernet_run: Path) -> None:
    with find(str(supernet_run), "w4a4").open() as policy:
        run = record(policy, SEEDS, 2, steps=1, limit=12)
    assert run.steps.tolist() == [12, 12] and run.calls.tolist() == [2, 2]
    assert run.states.shape[1] == 13 and run.called.all()


# Benchmark -----------------------------------------------------------------------------------------------------------


def test_the_benchmark_collects_the_same_in_three_ways(supernet_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    time = _Contender.time
    monkeypatch.setattr(_Contender, "time", lambda way, *given: time(way, *given) * 0.0 + 1.0 / way.threads)
    options = Options(worlds=4, calls=2, rounds=2, denoising_steps=2, workers=1)
    report = bench_rollouts(supernet_run, "w4a4", options)
    assert report.states == 8 and len(report.rounds_ratio) == 2 and report.ratio > 0.0
    assert (report.one_by_one.batch, report.batched.batch, report.parallel.batch) == (1, 4, 4)
    # a process of its own has one thread, whatever number is faster in this one
    assert (report.one_by_one.threads, report.batched.threads) == (2, 2)
    assert (report.parallel.processes, report.parallel.threads) == (1, 1) and report.first_call_px < 0.05
    assert not multiprocessing.active_children() and torch.get_num_threads() == threads
    with pytest.raises(RolloutBenchError, match="--variant w2a2"):
        bench_rollouts(supernet_run, "w2a2", options)
    with pytest.raises(RolloutBenchError, match=r"--denoising-steps 101: .* takes 1 to 100"):
        bench_rollouts(supernet_run, "w4a4", replace(options, denoising_steps=101))


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"worlds": 0}, "--worlds"),
        ({"rounds": 0}, "--rounds"),
        ({"denoising_steps": 0}, "--denoising-steps"),
        ({"workers": 5, "worlds": 4}, "--workers 5"),
        ({"first_seed": -1}, "--seed"),
        ({"first_seed": LAST_SEED, "worlds": 2}, "--seed"),
    ],
)
def test_impossible_benchmarks_are_refused(fields: dict[str, int], option: str) -> None:
    with pytest.raises(RolloutBenchError, match=f"^{option}: |^{option} "):
        Options(**fields)


def test_the_last_seeds_that_there_are_serve() -> None:
    assert Options(first_seed=LAST_SEED - 1, worlds=2).worlds == 2
