"""Chunks on an arm: merged by actions consumed, bounded, refused with a reason, stopped by the deadman."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.drivers.protocols import ArmObservation, DriverError
from dcqfa_ros.runtime.arm_executor import (
    ArmExecutor,
    ArmRefusedError,
    ArmSettings,
    Refusal,
)
from dcqfa_ros.safety.lease import CommandLease
from dcqfa_ros.safety.limits import BoxLimit
from dcqfa_ros.safety.stops import Stop, StopCode

PERIOD = 100_000_000
SETTINGS = ArmSettings(period_ns=PERIOD, command_timeout_s=1.0, observation_max_age_s=0.5, max_steps=50)


class RecordingArm:
    """A driver that notes what it was told."""

    name = "recording arm"

    def __init__(self, done_at: int = 10_000) -> None:
        self.done_at = done_at
        self.actions: list[tuple[float, ...]] = []
        self.holds = 0
        self.closed = False
        self._set(0)

    def _set(self, step: int) -> ArmObservation:
        zero = np.zeros(2, np.float32)
        self.seen = ArmObservation(
            0, step, zero, np.zeros((9, 2), np.float32), zero, 0.5, float(step >= self.done_at), step >= self.done_at
        )
        return self.seen

    def connect(self) -> None:
        pass

    def reset(self, seed: int) -> ArmObservation:
        return self._set(0)

    def observe(self) -> ArmObservation:
        return self.seen

    def step(self, action) -> ArmObservation:
        self.actions.append(tuple(action))
        return self._set(self.seen.step + 1)

    def hold(self) -> ArmObservation:
        self.holds += 1
        return self._set(self.seen.step + 1)

    def close(self) -> None:
        self.closed = True


def executor(arm: RecordingArm | None = None, **changes) -> ArmExecutor:
    limits = BoxLimit(("x", "y"), (0.0, 0.0), (512.0, 512.0))
    core = ArmExecutor(
        arm or RecordingArm(), limits, CommandLease(("policy", "teleop"), "policy"), replace(SETTINGS, **changes)
    )
    core.connect(0)
    return core


def chunk(first: float, n: int = 4) -> np.ndarray:
    return np.stack([np.arange(first, first + n), np.zeros(n)], axis=1)


def armed(arm: RecordingArm | None = None, **changes) -> tuple[ArmExecutor, int]:
    core = executor(arm, **changes)
    return core, core.arm(stamp_ns=10**18, now_ns=0).stamp_ns


def test_a_disarmed_arm_never_moves_whatever_is_sent():
    core = executor()
    assert core.submit("policy", 0, PERIOD, chunk(0), 0) is Refusal.DISARMED
    for tick in range(5):
        assert not core.tick(tick * PERIOD).advanced
    assert core.driver.actions == [] and core.driver.holds == 0


def test_actions_are_executed_in_order_one_per_tick():
    core, stamp = armed()
    assert core.submit("policy", stamp, PERIOD, chunk(10), 0) is None
    for tick in range(4):
        assert core.tick(tick * PERIOD).advanced
    assert [a[0] for a in core.driver.actions] == [10, 11, 12, 13]


def test_a_later_chunk_replaces_what_is_left_and_skips_what_was_consumed():
    core, stamp = armed()
    core.submit("policy", stamp, PERIOD, chunk(0, 8), 0)
    seen = core.tick(0).stamp_ns  # one action consumed when this observation was published
    core.tick(0)  # one more before the next chunk arrives
    assert core.submit("policy", seen, PERIOD, chunk(100, 8), 0) is None
    core.tick(0)
    assert [a[0] for a in core.driver.actions] == [0, 1, 101]


def test_the_cell_waits_for_the_first_chunk_and_holds_when_a_later_one_is_late():
    core, stamp = armed()
    assert not core.tick(0).advanced and core.starved == 0
    core.submit("policy", stamp, PERIOD, chunk(0, 1), 0)
    core.tick(0)
    late = core.tick(PERIOD)
    assert late.advanced and late.starved and core.driver.holds == 1 and core.starved == 1


def test_the_deadman_disarms_and_nothing_moves_after_it():
    core, stamp = armed()
    core.submit("policy", stamp, PERIOD, chunk(0, 1), 0)
    core.tick(0)
    moved = len(core.driver.actions) + core.driver.holds
    core.tick(1_000_000_001)
    assert not core.armed and core.stop.code is StopCode.COMMAND_TIMEOUT
    core.tick(2_000_000_000)
    assert len(core.driver.actions) + core.driver.holds == moved
    assert core.submit("policy", stamp, PERIOD, chunk(0), 0) is Refusal.DISARMED


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_chunk_that_is_not_finite_disarms_and_names_source_and_dimension(bad):
    core, stamp = armed()
    actions = chunk(0)
    actions[2, 1] = bad
    assert core.submit("policy", stamp, PERIOD, actions, 0) is Refusal.MALFORMED
    assert core.stop.code is StopCode.NOT_FINITE and "'policy'" in core.stop.text and "'y'" in core.stop.text
    assert core.driver.actions == []


def test_each_refusal_has_its_reason_and_is_counted():
    core, stamp = armed()
    assert core.submit("teleop", stamp, PERIOD, chunk(0), 0) is Refusal.SOURCE
    assert core.submit("policy", stamp + 1, PERIOD, chunk(0), 0) is Refusal.UNKNOWN_OBSERVATION
    assert core.submit("policy", stamp, PERIOD, chunk(0), 600_000_000) is Refusal.OLD_OBSERVATION
    assert core.submit("policy", stamp, 2 * PERIOD, chunk(0), 0) is Refusal.PERIOD
    assert core.submit("policy", stamp, PERIOD, np.zeros((4, 3)), 0) is Refusal.MALFORMED
    core.submit("policy", stamp, PERIOD, chunk(0, 2), 0)
    core.tick(0), core.tick(0)
    assert core.submit("policy", stamp, PERIOD, chunk(0, 2), 0) is Refusal.CONSUMED
    assert all(core.refused[r.value] == 1 for r in Refusal if r is not Refusal.DISARMED)


def test_an_episode_ends_at_success_and_needs_a_reset_before_the_next_arming():
    core, stamp = armed(RecordingArm(done_at=2))
    core.submit("policy", stamp, PERIOD, chunk(0), 0)
    core.tick(0), core.tick(0)
    assert not core.armed and core.stop.code is StopCode.SUCCESS
    with pytest.raises(ArmRefusedError, match="reset_cell"):
        core.arm(0, 0)
    core.reset(1)
    core.arm(0, 0)
    assert core.episode == 2


def test_an_episode_ends_at_the_step_limit():
    core, stamp = armed(max_steps=3)
    core.submit("policy", stamp, PERIOD, chunk(0), 0)
    for _ in range(3):
        core.tick(0)
    assert core.stop.code is StopCode.STEP_LIMIT


def test_an_armed_cell_cannot_be_reset_and_arming_twice_is_refused():
    core, _ = armed()
    with pytest.raises(ArmRefusedError, match="disarm"):
        core.reset(1)
    with pytest.raises(ArmRefusedError, match="already"):
        core.arm(0, 0)


def test_the_first_stop_reason_is_kept():
    core, _ = armed()
    assert core.disarm(Stop(StopCode.OPERATOR, "first"))
    assert not core.disarm(Stop(StopCode.SHUTDOWN, "second"))
    assert core.stop.text == "first"


def test_a_chunk_of_an_earlier_episode_is_unknown_after_rearming():
    core, stamp = armed()
    core.disarm(Stop(StopCode.OPERATOR, ""))
    core.reset(0)
    core.arm(stamp_ns=2 * 10**18, now_ns=0)
    assert core.submit("policy", stamp, PERIOD, chunk(0), 0) is Refusal.UNKNOWN_OBSERVATION


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), max_size=30))
def test_the_arm_never_repeats_or_skips_an_action_however_late_chunks_come(schedule):
    """Action n of every chunk is labelled with the step it is meant for, so what is executed must be 0, 1, 2, ..."""
    core, stamp = armed(max_steps=10_000, command_timeout_s=60.0, observation_max_age_s=60.0)
    stamps = [(stamp, 0)]
    for ticks, length in schedule:
        origin, consumed = stamps[-1]
        core.submit("policy", origin, PERIOD, chunk(consumed, length), 0)
        for _ in range(ticks):
            stamps.append((core.tick(0).stamp_ns, len(core.driver.actions)))
    assert [a[0] for a in core.driver.actions] == list(range(len(core.driver.actions)))


def test_in_lockstep_nothing_ages_however_long_a_chunk_takes():
    core = executor()
    stamp = core.arm(stamp_ns=10**18, now_ns=0, lockstep=True).stamp_ns
    late = 100 * 10**9
    assert core.submit("policy", stamp, PERIOD, chunk(0), late) is None
    assert core.tick(late).advanced and core.armed


def test_a_driver_that_fails_disarms_with_that_reason():
    arm = RecordingArm()
    core, stamp = armed(arm)
    core.submit("policy", stamp, PERIOD, chunk(0), 0)
    arm.step = lambda _: (_ for _ in ()).throw(DriverError("cable pulled"))
    with pytest.raises(DriverError):
        core.tick(0)
    assert core.snapshot().stop == Stop(StopCode.DRIVER, "cable pulled") and not core.stop.code.normal


def test_the_period_that_stops_the_arm_says_so_once():
    core, stamp = armed(max_steps=1)
    core.submit("policy", stamp, PERIOD, chunk(0), 0)
    assert core.tick(0).stopped.code is StopCode.STEP_LIMIT
    assert core.tick(0).stopped is None


def test_stamps_never_go_back_even_when_episodes_run_ahead_of_the_clock():
    core = executor()
    seen = []
    for _ in range(3):
        tick = core.arm(stamp_ns=10**18, now_ns=0, lockstep=True)  # the clock stands still
        core.submit("policy", tick.stamp_ns, PERIOD, chunk(0), 0)
        seen += [tick.stamp_ns, *(core.tick(0).stamp_ns for _ in range(4))]
        core.disarm(Stop(StopCode.OPERATOR, ""))
        core.reset(0)
        seen.append(core.tick(0).stamp_ns)
    assert seen == sorted(set(seen))
