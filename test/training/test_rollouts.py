from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.noise import chunk_noise
from dcqfa_ros.runtime.observations import ObservationLayout
from dcqfa_ros.sim.pusht import PushTWorld
from training.evaluate import find, roll_out
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.rollouts import answers, record
from training.rollouts_bench import Options, RolloutBenchError, bench_rollouts
from training.rollouts_group import Job, Kit, RolloutError, flat_state, load_flat_state
from training.rollouts_ray import RayWorkers
from training.rollouts_workers import LocalWorkers, OwnProcess, open_workers
from training.search.ray_executor import LOSSES
from training.supernet_checkpoint import TrainedSupernet, load_supernet

SEEDS = (3, 5)


@pytest.fixture(scope="module")
def supernet(supernet_run: Path) -> TrainedSupernet:
    """The tiny supernet."""
    return load_supernet(supernet_run)


@pytest.fixture(scope="module")
def kit(supernet: TrainedSupernet) -> Kit:
    """Two denoising steps; the teacher is the supernet's own full-precision network."""
    state, policy = supernet.network.state_dict(), supernet.meaning.config.policy
    teacher = {name: state[name].numpy() for name in DiffusionPolicyT(policy).state_dict()}
    return Kit(policy, supernet.meaning.specification(), 2, teacher)


@pytest.fixture(scope="module")
def weights(supernet: TrainedSupernet) -> np.ndarray:
    """All weights in one array."""
    return flat_state(supernet.network)


def normalised(kit: Kit, observation: dict[str, np.ndarray]) -> np.ndarray:
    """Observations key -> (To, *shape), raw, as the network reads them, (To, Do)."""
    keys = ObservationLayout(kit.spec).keys
    return np.concatenate([key.normalizer.normalize(observation[key.name]).reshape(2, -1) for key in keys], axis=1)


def start_of(kit: Kit, seed: int) -> np.ndarray:
    """Normalised observation (To, Do) of a seed's start."""
    world = PushTWorld()
    world.reset(seed)
    return normalised(kit, {name: np.stack([value] * 2) for name, value in world.observation().items()})


@pytest.fixture
def job(supernet: TrainedSupernet, kit: Kit) -> Job:
    """Three calls in two worlds, closed loop, the teacher asked nothing."""
    starts = np.stack([start_of(kit, seed) for seed in SEEDS])
    nobody = np.zeros((3, 2), bool)
    return Job(supernet.space.parse("w4a4"), np.stack([starts] * 3), 3, True, SEEDS, 0, nobody, nobody)


# Groups --------------------------------------------------------------------------------------------------------------


def test_a_group_runs_the_policy_as_evaluation_does(
    supernet_run: Path, kit: Kit, weights: np.ndarray, job: Job
) -> None:
    found = OwnProcess(kit).run(weights, [job])[0]
    with find(str(supernet_run), "w4a4").open() as policy:
        run = record(policy, SEEDS, 2, steps=2, limit=24)
    for n in range(len(SEEDS)):
        for call in range(3):
            seen = {name: values[n, call] for name, values in run.observations.items()}
            expected = normalised(kit, seen)
            # the start is put together from its key points: equal to some thousandths of a pixel, not bit for bit
            assert np.allclose(found.observation[call * 2 + n], expected, atol=2e-4), (n, call)
    assert found.path.shape == (6, 2, 9, 2) and not found.known.any() and found.teacher_calls == 0


def test_paths_begin_with_the_calls_noise_and_states_follow_the_horizon(
    kit: Kit, weights: np.ndarray, job: Job
) -> None:
    found = OwnProcess(kit).run(weights, [replace(job, horizon=1, first_call=7)])[0]
    horizon = (kit.spec.action.horizon, 2)
    for call in range(3):
        for n, seed in enumerate(SEEDS):
            assert np.array_equal(found.path[call * 2 + n, 0], chunk_noise(seed, 7 + call, horizon)[:9])
            assert np.allclose(found.observation[call * 2 + n], job.starts[call, n], atol=2e-4)
    longer = OwnProcess(kit).run(weights, [job])[0]
    assert not np.allclose(longer.observation[2:], found.observation[2:], atol=2e-4)


def test_the_teacher_is_recorded_where_asked_and_executed_where_it_acts(
    kit: Kit, weights: np.ndarray, job: Job
) -> None:
    asked, acts = np.zeros((3, 2), bool), np.zeros((3, 2), bool)
    asked[0, 0] = acts[1, 1] = True
    own = OwnProcess(kit)
    plain = own.run(weights, [job])[0]
    only_asked = own.run(weights, [replace(job, teacher_asked=asked)])[0]
    acting = own.run(weights, [replace(job, teacher_asked=asked, teacher_acts=acts)])[0]
    assert np.array_equal(plain.observation, only_asked.observation)
    assert only_asked.known.tolist() == [True] + [False] * 5 and only_asked.teacher_calls == 1
    assert acting.known.tolist() == [True, False, False, True, False, False] and acting.teacher_calls == 2
    assert np.abs(acting.teacher[3]).max() > 0 and not acting.teacher[~acting.known].any()
    assert np.array_equal(acting.observation[:5], plain.observation[:5])
    assert not np.array_equal(acting.observation[5], plain.observation[5])
    with pytest.raises(RolloutError, match="given none"):
        OwnProcess(replace(kit, teacher=None)).run(weights, [replace(job, teacher_asked=asked)])


def test_an_open_group_shows_demonstrations_as_they_are(kit: Kit, weights: np.ndarray, job: Job) -> None:
    starts = np.random.default_rng(0).uniform(-1, 1, job.starts.shape).astype(np.float32)
    found = OwnProcess(kit).run(weights, [replace(job, starts=starts, closed=False)])[0]
    assert np.array_equal(found.observation, starts.reshape(6, *starts.shape[2:]))


def test_a_world_whose_task_is_done_starts_anew(
    kit: Kit, weights: np.ndarray, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OwnProcess(kit)
    own.run(weights, [job])
    original = PushTWorld.step

    def step(world: PushTWorld, action: Any) -> Any:
        found = original(world, action)
        world._running = False
        return replace(found, done=True)

    monkeypatch.setattr(PushTWorld, "step", step)
    found = own.run(weights, [job])[0]
    assert found.restarts == 4
    assert np.allclose(found.observation, job.starts.reshape(6, *job.starts.shape[2:]), atol=2e-4)


def test_actions_that_are_not_finite_are_refused(kit: Kit, weights: np.ndarray, job: Job) -> None:
    broken = weights.copy()
    broken[:] = np.nan
    with pytest.raises(RolloutError, match="not finite"):
        OwnProcess(kit).run(broken, [job])


def test_weights_travel_in_one_array(supernet: TrainedSupernet, kit: Kit) -> None:
    other = ElasticDiffusionPolicyT(kit.policy)
    load_flat_state(other, flat_state(supernet.network))
    for name, value in supernet.network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


# Workers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def crew(kit: Kit) -> Iterator[LocalWorkers]:
    """One process, ended with the test; each takes seconds to import PyTorch."""
    workers = LocalWorkers(kit, 1)
    yield workers
    workers.close()


def same(first: Any, second: Any) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("observation", "path", "known"))


def test_processes_collect_what_this_one_does_and_end_when_lost(
    kit: Kit, weights: np.ndarray, job: Job, crew: LocalWorkers
) -> None:
    jobs = [job, replace(job, first_call=9), replace(job, horizon=1)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = OwnProcess(kit).run(weights, jobs)
    torch.set_num_threads(threads)
    assert all(map(same, crew.run(weights, jobs), expected))
    for process in crew._processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with pytest.raises(RolloutError, match="ended early"):
        crew.run(weights, jobs)
    assert not multiprocessing.active_children()


def test_no_more_workers_than_groups_and_one_is_this_process(kit: Kit) -> None:
    assert isinstance(open_workers(kit, 4, 1, None), OwnProcess) and isinstance(
        open_workers(kit, 1, 8, None), OwnProcess
    )
    assert open_workers(kit, 3, 8, None).count == 3


class RayError(Exception):
    actor_init_failed = False


class RayTaskError(RayError):
    pass


class FakeRay:
    """The part of Ray that is used, in this process; the newest task ends first."""

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.connected: tuple[str, dict[str, Any]] | None = None
        self.shipped: list[Any] = []
        self.actors = self.killed = self.answers = 0
        self.fails: Callable[[int], Exception | None] = lambda number: None

    def init(self, address: str, **options: Any) -> None:
        self.connected = (address, options)

    def shutdown(self) -> None:
        self.connected = None

    def put(self, value: Any) -> Any:
        self.shipped.append(value)
        return value

    def remote(self, num_cpus: int) -> Callable[[type], Any]:
        assert num_cpus == 1

        def make(cls: type) -> Any:
            def start(*arguments: Any) -> Any:
                self.actors += 1
                actor = cls(*arguments)
                run = SimpleNamespace(remote=lambda *given: SimpleNamespace(get=lambda: actor.run(*given)))
                return SimpleNamespace(run=run)

            return SimpleNamespace(remote=start)

        return make

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return refs[-1:], refs[:-1]

    def get(self, ref: Any) -> Any:
        error = self.fails(self.answers)
        self.answers += 1
        if error is not None:
            raise error
        return ref.get()

    def kill(self, actor: Any) -> None:
        self.killed += 1


class Hashable(SimpleNamespace):
    """References are keys."""

    __hash__ = object.__hash__


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A stand-in for the module ``ray``."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules[__name__], "SimpleNamespace", Hashable)
    return fake


def test_a_cluster_collects_the_same_and_the_kit_travels_once(
    ray: FakeRay, kit: Kit, weights: np.ndarray, job: Job
) -> None:
    jobs = [job, replace(job, first_call=4), replace(job, horizon=1)]
    threads = torch.get_num_threads()
    workers = open_workers(kit, 3, 2, "local")
    assert isinstance(workers, RayWorkers) and workers.count == 2 and ray.connected is None
    found = [workers.run(weights, jobs) for _ in range(2)]
    assert ray.connected is not None and ray.connected[0] == "local" and ray.actors == 2
    assert [value is kit for value in ray.shipped] == [True, False, False]
    expected = OwnProcess(kit).run(weights, jobs)
    torch.set_num_threads(threads)
    assert all(map(same, found[0], expected)) and all(map(same, found[1], expected))
    workers.close()
    assert ray.connected is None


def test_what_a_lost_actor_was_running_is_given_to_another(
    ray: FakeRay, kit: Kit, weights: np.ndarray, job: Job
) -> None:
    ray.fails = lambda number: RayError("actor died") if number == 0 else None
    workers = RayWorkers(kit, "local", 2)
    assert len(workers.run(weights, [job, job])) == 2
    assert (ray.actors, ray.killed) == (3, 1)
    ray.fails = lambda number: RayError("actor died")
    with pytest.raises(RolloutError, match=f"{LOSSES + 1} workers in a row"):
        workers.run(weights, [job])
    ray.fails = lambda number: RayTaskError("Traceback\nValueError: boom")
    with pytest.raises(RolloutError, match=r"a worker failed .ValueError: boom"):
        workers.run(weights, [job])


def test_an_address_that_is_none_is_refused(ray: FakeRay, kit: Kit) -> None:
    del ray
    with pytest.raises(RolloutError, match="--ray somewhere: expected auto"):
        open_workers(kit, 2, None, "somewhere")


def test_without_ray_an_address_is_refused(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"requirements/ray\.txt"):
        open_workers(kit, 2, None, "local")


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


def test_the_benchmark_collects_the_same_in_three_ways(supernet_run: Path) -> None:
    options = Options(worlds=4, calls=2, rounds=2, denoising_steps=2, workers=1)
    report = bench_rollouts(supernet_run, "w4a4", options)
    assert report.states == 8 and len(report.rounds_ratio) == 2 and report.ratio > 0.0
    assert (report.one_by_one.batch, report.batched.batch, report.parallel.batch) == (1, 4, 4)
    assert report.parallel.processes == 1 and report.first_call_px < 0.05
    assert not multiprocessing.active_children()
    with pytest.raises(RolloutBenchError, match="--variant w2a2"):
        bench_rollouts(supernet_run, "w2a2", options)


@pytest.mark.parametrize("fields", [{"worlds": 0}, {"rounds": 0}, {"workers": 5, "worlds": 4}, {"first_seed": -1}])
def test_impossible_benchmarks_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(RolloutBenchError, match="--"):
        Options(**fields)
