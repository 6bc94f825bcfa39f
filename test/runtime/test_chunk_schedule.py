"""Delay from measured latencies, consumption as the arm tells it, and what a session makes of both."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.runtime.chunk_buffer import ChunkBuffer
from dcqfa_ros.runtime.chunk_delay import DelayEstimator
from dcqfa_ros.runtime.chunk_schedule import Chunking, ChunkSchedule
from dcqfa_ros.runtime.chunking import Continuation, Method
from dcqfa_ros.runtime.consumption import Consumed, ConsumptionLog, Report
from dcqfa_ros.runtime.policy_session import Episode, PolicySession, SessionHooks
from dcqfa_ros.runtime.synchronizer import Frame, ObservationSynchronizer
from test.runtime.conftest import tiny_spec

PERIOD = 100_000_000
SPEC, _ = tiny_spec()


# delay


def test_warm_up_runs_do_not_count_towards_the_delay() -> None:
    delay = DelayEstimator()
    assert (delay.actions(PERIOD), delay.counted) == (0, 0)
    delay.begin()
    assert not delay.add(0.9, "fp32")
    assert delay.actions(PERIOD) == 9, "until a run counts, the warm-up stands in"
    assert delay.add(0.15, "fp32") and delay.actions(PERIOD) == 2
    delay.begin()  # an episode
    assert not delay.add(5.0, "fp32") and delay.actions(PERIOD) == 2
    assert not delay.add(3.0, "w8a8"), "the first after an exchange"
    assert delay.actions(PERIOD) == 30 and delay.counted == 0
    assert delay.add(0.05, "w8a8") and delay.actions(PERIOD) == 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=150), st.integers(10_000_000, 500_000_000))
def test_the_delay_covers_the_95th_percentile_rounded_up(latencies: list[float], period: int) -> None:
    delay = DelayEstimator()
    for latency in [9.0, *latencies]:
        delay.add(latency, "fp32")
    p95 = float(np.percentile(latencies[-100:], 95))
    assert delay.actions(period) == math.ceil(p95 * 1e9 / period - 1e-9)
    assert delay.actions(period) * period >= p95 * 1e9 - 1


def test_a_latency_of_whole_periods_is_no_further_action() -> None:
    delay = DelayEstimator()
    for _ in range(3):
        delay.add(0.3, "fp32")
    assert delay.actions(PERIOD) == 3


# consumption


def report(stamp: int, consumed: int, *, episode: int = 1, buffered: int = 5, begun: int | None = None) -> Report:
    return Report(episode, stamp * PERIOD, consumed, (stamp if begun is None else begun) * PERIOD, buffered, 0)


def test_what_the_arm_tells_counts_also_where_it_starved() -> None:
    log = ConsumptionLog(PERIOD)
    log.begin(1, 10 * PERIOD)
    assert log.at(12 * PERIOD, 0.0) == Consumed(2, None, False), "one action per period, where nothing is told"
    for stamp, consumed in ((10, 0), (11, 1), (12, 2), (13, 2), (14, 2), (15, 3)):
        log.note(report(stamp, consumed))
    for stamp, consumed in ((10, 0), (11, 1), (12, 2), (13, 2), (14, 2)):
        assert log.at(stamp * PERIOD, 0.0).actions == consumed
    assert log.at(14 * PERIOD + 1, 0.0).actions == 2, "no action is begun between two"
    assert log.at(15 * PERIOD, 0.0) == Consumed(3, 5, True)


def test_an_observation_waits_for_the_arm_only_where_it_may_have_begun_another_action() -> None:
    log = ConsumptionLog(PERIOD)
    log.begin(1, 0)
    log.note(report(5, 5))
    begin = time.monotonic()
    assert log.at(5 * PERIOD + PERIOD // 2, 5.0) == Consumed(5, 5, True)
    assert time.monotonic() - begin < 2.0
    threading.Timer(0.05, log.note, [report(6, 5)]).start()
    assert log.at(6 * PERIOD, 20.0).actions == 5
    assert log.at(7 * PERIOD, 0.01) == Consumed(6, None, False), "estimated from the last word"


def test_an_arm_that_says_when_it_begins_the_next_action_is_not_waited_for_while_it_has_some() -> None:
    log = ConsumptionLog(PERIOD)
    log.begin(1, 0)
    stamp, begun = 5 * PERIOD + PERIOD // 2, 5 * PERIOD + PERIOD // 4
    log.note(Report(1, stamp, 5, begun, 2, 0, begun + PERIOD))
    assert log.at(begun + PERIOD - 1, 0.0) == Consumed(5, 2, True)
    assert log.at(begun + PERIOD, 0.0) == Consumed(6, None, True)
    assert log.at(begun + 3 * PERIOD - 1, 0.0) == Consumed(7, None, True)
    assert not log.at(begun + 3 * PERIOD, 0.0).told, "what it has by then it has not told"


def test_what_is_buffered_is_not_counted_on_where_a_shorter_chunk_is_on_its_way() -> None:
    log = ConsumptionLog(PERIOD)
    log.begin(1, 0)
    log.note(Report(1, 8 * PERIOD, 8, 8 * PERIOD, 6, 0, 9 * PERIOD))
    assert log.at(11 * PERIOD, 0.0, most=14) == Consumed(11, None, True)
    assert log.at(10 * PERIOD, 0.0, most=10) == Consumed(10, None, True)
    assert not log.at(11 * PERIOD, 0.0, most=10).told
    assert log.at(11 * PERIOD, 0.0, most=0) == Consumed(11, None, True), "actions that were sent by another"


def test_an_arm_that_has_consumed_all_it_was_sent_is_not_waited_for() -> None:
    log = ConsumptionLog(PERIOD)
    log.begin(1, 0)
    log.note(report(5, 5, buffered=0))
    assert log.at(9 * PERIOD, 0.0, most=5) == Consumed(5, 0, True)
    assert not log.at(9 * PERIOD, 0.0, most=6).told, "a chunk is on its way"
    log.note(report(10, 6, buffered=2))
    assert not log.at(14 * PERIOD, 0.0, most=6).told, "it has actions that were not sent from here"
    begin = time.monotonic()
    assert not log.at(4 * PERIOD, 20.0, most=5).told, "it will say nothing of what was before its first word"
    assert time.monotonic() - begin < 10.0


def test_words_of_older_episodes_say_nothing_and_those_of_the_next_may_come_early() -> None:
    log = ConsumptionLog(PERIOD)
    log.begin(3, 0)
    log.note(report(5, 4, episode=2))
    assert not log.tells
    log.note(report(20, 0, episode=4))
    log.begin(4, 20 * PERIOD)
    assert log.tells and log.at(20 * PERIOD, 0.0) == Consumed(0, 5, True)
    log.note(report(19, 9, episode=4))
    assert log.at(20 * PERIOD, 0.0).actions == 0, "an older word came later"


# schedule


class Arm:
    """An arm in virtual time: one control period at a time, chunks after a delay."""

    def __init__(self, schedule: ChunkSchedule, tells: bool) -> None:
        self.schedule, self.tells = schedule, tells
        self.buffer = ChunkBuffer(2)
        self.step = 0
        self.known = {0: 0}
        self.executed: list[float] = []
        schedule.consumption.begin(1, 0)
        schedule.begin(0)
        self.tell()

    def tell(self) -> None:
        if self.tells:
            self.schedule.consumption.note(report(self.step, self.buffer.consumed, buffered=self.buffer.remaining))

    def periods(self, count: int) -> None:
        for _ in range(count):
            action = self.buffer.next()
            if action is not None:
                self.executed.append(float(action[0]))
            self.step += 1
            self.known[self.step] = self.buffer.consumed
            self.tell()

    def infer(self, delay: int, lost: bool = False) -> bool:
        """Infer on the present observation where that is due; its chunk comes ``delay`` periods later."""
        stamp = self.step
        inference = self.schedule.due(stamp * PERIOD) if stamp * PERIOD >= self.schedule.wake_ns else None
        if inference is None:
            return False
        if self.tells:
            assert inference.first == self.known[stamp], "the arm counts otherwise"
        first = self.known[stamp]
        numbers = np.arange(first, first + inference.actions, dtype=np.float32)
        self.periods(delay if self.buffer.remaining or self.executed else 0)
        published = self.schedule.take(inference, stamp * PERIOD, np.stack([numbers, numbers], axis=1))
        self.schedule.sent(inference, published, 1.0, delay * PERIOD / 1e9, "fp32")
        if not lost:
            self.buffer.push(first, published.actions)
        return True


@settings(deadline=None, max_examples=25)
@given(
    method=st.sampled_from([Method.SYNCHRONOUS, Method.ASYNCHRONOUS, Method.ENSEMBLE, Method.SOFT]),
    horizon=st.integers(0, 15),
    delays=st.lists(st.integers(0, 20), min_size=3, max_size=8),
    losses=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_the_policy_counts_as_the_arm_does_whatever_starves_or_is_lost(
    method: Method, horizon: int, delays: list[int], losses: list[bool]
) -> None:
    schedule = ChunkSchedule(SPEC.action, PERIOD)
    schedule.configure(Chunking(method, horizon))
    arm = Arm(schedule, tells=True)
    for delay, lost in zip(delays, losses, strict=False):
        for _ in range(60):
            if arm.infer(delay, lost):
                break
            arm.periods(1)
        else:
            raise AssertionError("the arm waits for ever")
    arm.periods(20)
    np.testing.assert_allclose(arm.executed, np.arange(len(arm.executed)), rtol=1e-6)


@pytest.mark.parametrize("tells", [True, False])
def test_synchronous_execution_infers_every_executed_actions(tells: bool) -> None:
    arm = Arm(ChunkSchedule(SPEC.action, PERIOD), tells)
    inferred = []
    for _ in range(33):
        if arm.infer(0):
            inferred.append(arm.step)
        arm.periods(1)
    assert inferred == [0, 8, 16, 24, 32]
    assert arm.schedule.values()["consumption"] == ("told by the arm" if tells else "estimated: the arm publishes none")


def test_an_arm_that_tells_nothing_and_ran_dry_is_counted_from_what_was_published() -> None:
    arm = Arm(ChunkSchedule(SPEC.action, PERIOD), tells=False)
    assert arm.infer(0)
    arm.periods(20)  # 8 actions, 12 periods without one
    assert arm.infer(0) and arm.schedule.values()["starved_actions"] == "12"
    arm.periods(8)
    assert arm.infer(0)
    assert arm.executed == list(range(16))


# session


class SlowHost:
    """Takes its time, and remembers what it was asked to continue."""

    active = "fp32"
    engine = "onnxruntime/fp32"

    def __init__(self, latency_s: float) -> None:
        self.latency_s = latency_s
        self.continuations: list[Continuation | None] = []

    def predict(self, _: Any, seed: int, chunk: int, steps: int | None, **more: Any) -> tuple[np.ndarray, str]:
        self.continuations.append(more["continuation"])
        time.sleep(self.latency_s)
        return np.full((more["actions"], 2), float(chunk), np.float32), self.active


class Cell:
    """An arm in real time, 50 Hz, and the session that serves it."""

    def __init__(self, chunking: Chunking, latency_s: float) -> None:
        self.period_ns = 20_000_000
        self.host = SlowHost(latency_s)
        self.advice: list[str] = []
        self.problems: list[str] = []
        self.buffer, self.lock = ChunkBuffer(2), threading.Lock()
        self.known: dict[int, int] = {}
        hooks = SessionHooks(
            publish=self.take,
            problem=self.problems.append,
            lost=self.problems.append,
            steps=lambda: None,
            ageless=lambda: True,
            chunking=lambda: chunking,
            advice=self.advice.append,
        )
        observations = ObservationSynchronizer(SPEC.observations)
        self.session = PolicySession(SPEC, self.host, observations, self.period_ns, hooks)  # type: ignore[arg-type]
        self.halt = threading.Event()
        self.threads = [threading.Thread(target=self.session.run, args=(self.halt,)), threading.Thread(target=self.run)]
        self.session.begin(Episode(1, 0, seed=1))
        for thread in self.threads:
            thread.start()

    def take(self, frame: Frame, actions: np.ndarray, _: float) -> None:
        with self.lock:
            self.buffer.push(self.known[frame.stamp_ns], actions)

    def run(self) -> None:
        step = 0
        while not self.halt.is_set():
            now, stamp = time.monotonic_ns(), step * self.period_ns
            with self.lock:
                begun = self.buffer.remaining > 0 or step > 0
                self.known[stamp] = self.buffer.consumed
                told = Report(1, stamp, self.buffer.consumed, stamp, self.buffer.remaining, self.buffer.starved)
            self.session.consumed(told)
            for key, spec in SPEC.observations.items():
                self.session.observations.add(key, stamp, np.zeros(spec.shape, np.float32), now)
            self.halt.wait(self.period_ns / 1e9)
            with self.lock:
                if begun:
                    self.buffer.next()
            step += begun


@pytest.fixture
def cell() -> Iterator[Callable[..., Cell]]:
    cells: list[Cell] = []

    def make(chunking: Chunking, latency_s: float) -> Cell:
        cells.append(Cell(chunking, latency_s))
        return cells[-1]

    yield make
    for made in cells:
        made.halt.set()
        for thread in made.threads:
            thread.join(5)
            assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("method", [Method.ASYNCHRONOUS, Method.SOFT, Method.ENSEMBLE])
def test_a_slow_policy_does_not_leave_the_arm_without_actions(cell: Callable[..., Cell], method: Method) -> None:
    made = cell(Chunking(method, horizon=7), latency_s=0.07)  # 3.5 periods: less than the horizon
    until(lambda: made.session.chunks >= 8)
    figures = made.session.figures()
    assert figures["starved_actions"] == "0" and not made.problems
    assert int(figures["delay"]) >= 4 and figures["consumption"] == "told by the arm"
    assert float(figures["latency_p95_ms"]) >= 70.0
    continued = made.host.continuations
    assert continued[0] is None and all((c is not None) == method.continues for c in continued[1:])
    if method.continues:
        last = continued[-1]
        assert last is not None and last.frozen == min(len(last.previous), 1 + int(figures["delay"]))


def test_a_slow_policy_starves_the_arm_where_it_is_synchronous(cell: Callable[..., Cell]) -> None:
    made = cell(Chunking(), latency_s=0.07)
    until(lambda: made.session.chunks >= 4)
    assert int(made.session.figures()["starved_actions"]) >= 6
    numbers = [made.known[stamp] for stamp in sorted(made.known)]
    assert numbers == sorted(numbers)


def test_a_delay_that_does_not_fit_is_cut_and_said_once(cell: Callable[..., Cell]) -> None:
    made = cell(Chunking(Method.ASYNCHRONOUS, horizon=8, delay=12), latency_s=0.0)
    until(lambda: made.session.chunks >= 3)
    assert made.advice == ["delay 12 exceeds half of the 15 actions of a chunk: taken as 7"]
    assert made.session.figures()["timing_changed"] == made.advice[0]


def test_an_exchange_of_the_variant_keeps_the_plan(cell: Callable[..., Cell]) -> None:
    made = cell(Chunking(Method.SOFT, horizon=5), latency_s=0.01)
    until(lambda: made.session.chunks >= 3)
    made.host.active, made.host.engine = "w8a8", "onnxruntime/w8a8"
    seen = len(made.host.continuations)
    until(lambda: len(made.host.continuations) >= seen + 3)
    assert all(c is not None for c in made.host.continuations[1:]) and not made.problems
    assert made.session.figures()["starved_actions"] == "0"


def test_a_plan_that_cannot_be_ends_the_commands_by_name(cell: Callable[..., Cell]) -> None:
    made = cell(Chunking(Method.TRAINED), latency_s=0.0)
    until(lambda: made.problems)
    assert "diffusion.prefix is 0" in made.problems[0] and made.session.chunks == 0
