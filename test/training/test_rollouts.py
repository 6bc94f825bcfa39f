from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from training.evaluate import find
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.rollouts import record
from training.rollouts_group import GroupRunner, Job, Kit, RolloutError, flat_state, load_flat_state
from training.rollouts_ray import RayWorkers
from training.rollouts_workers import LocalWorkers, OwnProcess, open_workers
from training.search.ray_executor import LOSSES
from training.signals import stop_on_signal
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
    """Two processes, ended with the test; each takes seconds to import PyTorch."""
    workers = LocalWorkers(kit, 2)
    yield workers
    workers.close()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch on two threads, as a distillation has it by default."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def struck(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals], None]:
    """Return what sends a signal to every further process of multiprocessing as soon as there is one."""
    original = multiprocessing.util.spawnv_passfds

    def strike(number: signal.Signals) -> None:
        def spawn(path: bytes, arguments: list[Any], descriptors: list[int]) -> int:
            found = original(path, arguments, descriptors)
            if "--multiprocessing-fork" in arguments:  # not the resource tracker
                os.kill(found, number)
            return found

        monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn)

    return strike


def same(first: Any, second: Any) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("observation", "path", "known"))


def test_two_processes_collect_what_this_one_does_and_end_when_one_is_lost(
    kit: Kit, weights: np.ndarray, job: Job, crew: LocalWorkers, two_threads: None
) -> None:
    jobs = [job, replace(job, first_call=9), replace(job, horizon=1)]
    expected = open_workers(kit, len(jobs), 1, None).run(weights, jobs)
    assert all(map(same, crew.run(weights, jobs), expected))
    assert len(multiprocessing.active_children()) == 2
    os.kill(crew._processes[0].pid, signal.SIGKILL)
    crew._processes[0].join()
    with pytest.raises(RolloutError, match="ended early"):
        crew.run(weights, jobs)
    assert not multiprocessing.active_children()


def test_ctrl_c_while_processes_start_leaves_them_alone(
    kit: Kit, weights: np.ndarray, job: Job, crew: LocalWorkers, struck: Callable[[signal.Signals], None]
) -> None:
    """It reaches every process of the terminal; the parent ends its step, for which it needs them."""
    struck(signal.SIGINT)
    assert len(crew.run(weights, [job, job])) == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@pytest.mark.timeout(60)
def test_processes_that_are_killed_while_they_start_are_told_of(
    kit: Kit, weights: np.ndarray, job: Job, struck: Callable[[signal.Signals], None]
) -> None:
    large = replace(kit, teacher={"more than a pipe holds": np.zeros(2**20)})
    struck(signal.SIGKILL)
    with pytest.raises(RolloutError, match="ended early"):
        LocalWorkers(large, 2).run(weights, [job, job])
    assert not multiprocessing.active_children()


def test_one_worker_runs_on_one_thread_as_several_do(
    kit: Kit, weights: np.ndarray, job: Job, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    run = GroupRunner.run
    monkeypatch.setattr(
        GroupRunner, "run", lambda runner, job: threads.append(torch.get_num_threads()) or run(runner, job)
    )
    open_workers(kit, 1, None, None).run(weights, [job])
    OwnProcess(kit).run(weights, [job])
    assert threads == [1, 2] and torch.get_num_threads() == 2


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
    """The part of Ray that is used, in this process. Actors begin where there are CPUs; the newest job ends first."""

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.connected: tuple[str, dict[str, Any]] | None = None
        self.cpus = 8
        self.shipped: list[Any] = []
        self.begun: set[int] = set()  # numbers of actors
        self.actors = self.killed = self.answers = self.silent = 0
        self.fails: Callable[[int, str], Exception | None] = lambda number, method: None
        self.lost = False  # the connection

    def init(self, address: str, **options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())  # as Ray's
        self.connected = (address, options)

    def shutdown(self) -> None:
        self.connected, self.begun = None, set()

    def put(self, value: Any) -> Any:
        if self.lost:
            raise ConnectionError("gone")
        self.shipped.append(value)
        return value

    def remote(self, num_cpus: int) -> Callable[[type], Any]:
        assert num_cpus == 1

        def make(cls: type) -> Any:
            return SimpleNamespace(remote=lambda *arguments: self._actor(cls, arguments))

        return make

    def _actor(self, cls: type, arguments: tuple[Any, ...]) -> Any:
        self.actors += 1
        actor, number = cls(*arguments), self.actors

        def method(name: str) -> Any:
            return SimpleNamespace(remote=lambda *given: Reference(name, number, lambda: getattr(actor, name)(*given)))

        return SimpleNamespace(begin=method("begin"), run=method("run"))

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        able = [ref for ref in refs if ref.actor in self.begun or len(self.begun) < self.cpus]
        if not able or self.silent > 0:
            self.silent -= 1
            return [], refs
        done = next((ref for ref in able if ref.method == "begin"), able[-1])
        self.begun.add(done.actor)
        return [done], [ref for ref in refs if ref is not done]

    def get(self, ref: Any) -> Any:
        error = self.fails(self.answers, ref.method)
        self.answers += 1
        if error is not None:
            self.begun.discard(ref.actor)
            raise error
        return ref.get()

    def kill(self, actor: Any) -> None:
        self.killed += 1


@dataclass(eq=False)
class Reference:
    method: str
    actor: int
    get: Callable[[], Any]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    """A stand-in for the module ``ray``."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    yield fake
    torch.set_num_threads(threads)  # actors run in this process


def test_a_cluster_collects_the_same_and_the_kit_travels_once(
    ray: FakeRay, kit: Kit, weights: np.ndarray, job: Job
) -> None:
    jobs = [job, replace(job, first_call=4), replace(job, horizon=1)]
    workers = open_workers(kit, 3, 2, "local")
    assert isinstance(workers, RayWorkers) and workers.count == 2 and ray.connected is None
    found = [workers.run(weights, jobs) for _ in range(2)]
    assert ray.connected is not None and ray.connected[0] == "local" and ray.actors == 2
    assert [value is kit for value in ray.shipped] == [True, False, False]
    expected = OwnProcess(kit, 1).run(weights, jobs)
    assert all(map(same, found[0], expected)) and all(map(same, found[1], expected))
    workers.close()
    assert ray.connected is None


def test_a_cluster_with_fewer_cpus_than_groups_does_the_work_with_those(
    ray: FakeRay, kit: Kit, weights: np.ndarray, job: Job
) -> None:
    ray.cpus = 1
    workers = RayWorkers(kit, "auto", 3)
    assert len(workers.run(weights, [job] * 3)) == 3 and len(ray.begun) == 1 and ray.actors == 3
    ray.cpus = 2
    assert len(workers.run(weights, [job] * 3)) == 3 and len(ray.begun) == 2 and ray.actors == 3


def test_a_long_job_is_waited_for_but_actors_that_never_begin_are_not(
    ray: FakeRay, kit: Kit, weights: np.ndarray, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = RayWorkers(kit, "auto", 1)
    workers.run(weights, [job])
    monkeypatch.setattr("training.rollouts_ray.START_SECONDS", 0.0)
    ray.silent = 5
    assert len(workers.run(weights, [job])) == 1 and ray.silent == 0
    ray.cpus = 0
    with pytest.raises(RolloutError, match="no worker answered within 0 s; `ray status`"):
        RayWorkers(kit, "auto", 1).run(weights, [job])
    assert ray.connected is None


def test_what_a_lost_actor_was_running_is_given_to_another(
    ray: FakeRay, kit: Kit, weights: np.ndarray, job: Job
) -> None:
    lost = ["run", "begin"]
    ray.fails = lambda number, method: RayError("actor died") if lost and lost[0] == method and lost.pop(0) else None
    workers = RayWorkers(kit, "local", 2)
    assert len(workers.run(weights, [job, job])) == 2
    assert (ray.actors, ray.killed) == (4, 2) and not lost
    for dies in ("begin", "run"):
        ray.fails = lambda number, method, dies=dies: RayError("actor died") if method == dies else None  # type: ignore[misc]
        with pytest.raises(RolloutError, match=f"{LOSSES + 1} workers in a row"):
            RayWorkers(kit, "local", 1).run(weights, [job])
    ray.fails = lambda number, method: RayTaskError("Traceback\nValueError: boom")
    with pytest.raises(RolloutError, match=r"a worker failed .ValueError: boom"):
        workers.run(weights, [job])
    ray.fails = lambda number, method: None
    assert len(workers.run(weights, [job])) == 1  # connected anew


def test_a_connection_that_is_lost_between_rounds_is_told_of(
    ray: FakeRay, kit: Kit, weights: np.ndarray, job: Job
) -> None:
    workers = RayWorkers(kit, "auto", 1)
    workers.run(weights, [job])
    ray.lost = True
    with pytest.raises(RolloutError, match=r"--ray auto: the connection was lost \(gone\)"):
        workers.run(weights, [job])


def test_a_cluster_does_not_take_the_runs_signal_away(ray: FakeRay, kit: Kit, weights: np.ndarray, job: Job) -> None:
    with stop_on_signal() as stop:
        RayWorkers(kit, "local", 1).run(weights, [job])
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5.0)


def test_an_address_that_is_none_is_refused(ray: FakeRay, kit: Kit) -> None:
    del ray
    with pytest.raises(RolloutError, match="--ray somewhere: expected auto"):
        open_workers(kit, 2, None, "somewhere")


def test_without_ray_an_address_is_refused(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"requirements/ray\.txt"):
        open_workers(kit, 2, None, "local")
