"""When a policy infers, and when it must send nothing more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dcqfa_ros.runtime.errors import PolicyError, WorkerDiedError
from dcqfa_ros.runtime.policy_session import Episode, PolicySession, SessionHooks
from dcqfa_ros.runtime.synchronizer import ObservationSynchronizer
from test.runtime.conftest import tiny_spec

PERIOD = 100_000_000
SPEC, _ = tiny_spec()


class FakeHost:
    """Answers at once, or raises what it is told to."""

    active = "fp32"
    engine = "onnxruntime/fp32"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.before: Callable[[], None] = lambda: None

    def predict(
        self, observation: Any, seed: int, chunk: int, steps: int | None, **more: Any
    ) -> tuple[np.ndarray, str]:
        self.asked.append((seed, chunk))
        self.before()
        if self.error is not None:
            raise self.error
        return np.zeros((more["actions"], 2), np.float32), "fp32"


class Bench:
    """A session whose thread runs, and what it did."""

    def __init__(self, ageless: bool) -> None:
        self.host = FakeHost()
        self.sent: list[int] = []
        self.problems: list[str] = []
        self.lost: list[str] = []
        hooks = SessionHooks(
            publish=lambda frame, *_: self.sent.append(frame.stamp_ns),
            problem=self.problems.append,
            lost=self.lost.append,
            steps=lambda: None,
            ageless=lambda: ageless,
        )
        observations = ObservationSynchronizer(SPEC.observations)
        self.session = PolicySession(SPEC, self.host, observations, PERIOD, hooks)
        self.halt = threading.Event()
        self.thread = threading.Thread(target=self.session.run, args=(self.halt,))
        self.thread.start()

    def observe(self, step: int) -> None:
        for key, spec in SPEC.observations.items():
            value = np.full(spec.shape, float(step))
            self.session.observations.add(key, step * PERIOD, value, time.monotonic_ns())

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, (self.sent, self.problems, self.lost)
            time.sleep(0.002)


@pytest.fixture
def start() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(ageless: bool = True) -> Bench:
        benches.append(Bench(ageless))
        return benches[-1]

    yield make
    for bench in benches:
        bench.halt.set()
        bench.thread.join(5)
        assert not bench.thread.is_alive()


def test_a_chunk_is_inferred_whenever_the_executed_actions_are_used_up(start):
    bench = start()
    bench.session.begin(Episode(1, 10 * PERIOD, seed=7))
    for step in range(10, 35):
        bench.observe(step)
        if (step - 10) % 8 == 0:
            bench.until(lambda step=step: bench.sent and bench.sent[-1] == step * PERIOD)
    assert bench.sent == [10 * PERIOD, 18 * PERIOD, 26 * PERIOD, 34 * PERIOD]
    assert bench.host.asked == [(7, 0), (7, 1), (7, 2), (7, 3)]


def test_the_next_episode_counts_chunks_anew_and_never_uses_older_observations(start):
    bench = start()
    bench.session.begin(Episode(1, 0, seed=1))
    bench.observe(0)
    bench.until(lambda: len(bench.sent) == 1)
    assert bench.session.end(1) and bench.session.figures()["chunks"] == "1"
    bench.session.begin(Episode(2, 5 * PERIOD, seed=2))
    bench.session.begin(Episode(2, 99 * PERIOD, seed=9))  # told twice: begins once
    bench.observe(5)
    bench.until(lambda: len(bench.sent) == 2)
    assert bench.sent[-1] == 5 * PERIOD and bench.host.asked[-1] == (2, 0)


def test_a_chunk_that_is_ready_after_the_disarming_is_not_sent(start):
    bench = start()
    bench.host.before = lambda: bench.session.end(1)
    bench.session.begin(Episode(1, 0, seed=1))
    bench.observe(0)
    bench.until(lambda: bench.host.asked)
    bench.until(lambda: bench.session._episode is None)
    time.sleep(0.05)
    assert bench.sent == [] and bench.session.figures()["chunks"] == "0"


@pytest.mark.parametrize(("error", "lost"), [(PolicyError("bad action"), False), (WorkerDiedError("gone", -9), True)])
def test_an_engine_that_refuses_or_dies_ends_the_commands_of_the_episode(start, error, lost):
    bench = start()
    bench.host.error = error
    bench.session.begin(Episode(1, 0, seed=1))
    bench.observe(0)
    bench.until(lambda: bench.problems and (bench.lost or not lost))
    time.sleep(0.05)
    assert bench.sent == [] and bench.problems == [str(error)] and bench.lost == ([str(error)] if lost else [])


def test_observations_that_stop_coming_are_named_once(start):
    bench = start(ageless=False)
    bench.session.begin(Episode(1, 0, seed=1))
    bench.observe(0)
    bench.until(lambda: len(bench.sent) == 1)
    bench.until(lambda: bench.problems)
    time.sleep(0.3)
    assert len(bench.problems) == 1 and "ms old, its limit is 300 ms" in bench.problems[0]
    bench.observe(8)
    time.sleep(0.05)
    assert len(bench.sent) == 1


def test_an_episode_that_began_elsewhere_has_no_figures_here(start):
    assert not start().session.end(3)
