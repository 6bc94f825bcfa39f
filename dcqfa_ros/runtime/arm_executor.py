"""Execution of time-stamped chunks on an arm, without ROS: what ``arm_node`` wraps.

One control period takes one action from the chunk buffer, bounds it, and hands it to the driver. Chunks are merged by
the number of actions already consumed: a chunk belongs to the observation whose stamp it carries, and the executor
knows how many actions had been consumed when it published that observation. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.protocols import ArmDriver, ArmObservation, DriverError
from dcqfa_ros.runtime.chunk_buffer import ChunkBuffer
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.safety.deadman import Deadman
from dcqfa_ros.safety.lease import CommandLease
from dcqfa_ros.safety.limits import BoxLimit, NotFiniteActionError
from dcqfa_ros.safety.stops import Stop, StopCode

STAMPS_REMEMBERED = 512  # observations whose stamps a chunk may still refer to
PERIOD_TOLERANCE = 0.01  # relative difference between a chunk's action period and the control period


class ArmMode(str, Enum):
    """Whether commands move the arm."""

    DISARMED = "disarmed"
    ARMED = "armed"


class Refusal(str, Enum):
    """Why a chunk was not accepted."""

    DISARMED = "disarmed"
    SOURCE = "source_without_lease"
    UNKNOWN_OBSERVATION = "unknown_observation"
    OLD_OBSERVATION = "old_observation"
    PERIOD = "wrong_period"
    MALFORMED = "malformed"
    CONSUMED = "already_consumed"


class ArmRefusedError(RuntimeError):
    """A request that the arm's present state does not allow; the message says what to do first."""


@dataclass(frozen=True, slots=True)
class Tick:
    """What one control period did.

    Attributes:
        observation: of the arm afterwards.
        stamp_ns: its stamp.
        advanced: whether the arm was driven.
        starved: whether it had to hold for want of an action.
        stopped: the stop that this period caused.
        consumed: actions of the episode consumed by the observation.
        buffered: actions that are left.
    """

    observation: ArmObservation
    stamp_ns: int
    advanced: bool
    starved: bool
    stopped: Stop | None = None
    consumed: int = 0
    buffered: int = 0


@dataclass(frozen=True, slots=True)
class ArmSnapshot:
    """The executor's state at one moment."""

    mode: ArmMode
    stop: Stop
    episode: int
    step: int
    stamp_ns: int
    starved: int


@dataclass(frozen=True, slots=True)
class ArmSettings:
    """Timing of the executor: control period in nanoseconds, time-outs in seconds."""

    period_ns: int
    command_timeout_s: float
    observation_max_age_s: float
    max_steps: int


class ArmExecutor:
    """Chunk buffer, limits, lease and deadman in front of an arm driver."""

    def __init__(self, driver: ArmDriver, limits: BoxLimit, lease: CommandLease, settings: ArmSettings) -> None:
        """Put limits, lease and deadman in front of ``driver``; nothing is connected yet."""
        self.driver, self.limits, self.lease, self.settings = driver, limits, lease, settings
        self.mode = ArmMode.DISARMED
        self.stop = Stop(StopCode.NEVER_ARMED, "not armed since start")
        self.episode = 0
        self.refused: dict[str, int] = dict.fromkeys((r.value for r in Refusal), 0)
        self.accepted = 0
        self.starved = 0
        self._condition = threading.Condition(threading.RLock())
        self._buffer = ChunkBuffer(len(limits.names))
        self._deadman = Deadman(settings.command_timeout_s)
        self._lockstep = False  # the cell waits for commands: neither observations nor the deadman age
        self._begun = False  # a chunk was accepted since arming
        self._published: OrderedDict[int, tuple[int, int]] = OrderedDict()  # stamp -> (consumed, monotonic ns)
        self._origin_ns = 0  # stamp of step 0
        self._newest_ns = 0  # newest stamp published: stamps never go back, also not from one episode to the next
        self._now: ArmObservation | None = None

    @property
    def armed(self) -> bool:
        """Whether commands move the arm."""
        return self.mode is ArmMode.ARMED

    @property
    def step(self) -> int:
        """Steps done in the present episode."""
        return self._now.step if self._now else 0

    @property
    def stamp_ns(self) -> int:
        """Stamp of the present observation: start of the episode plus steps times the period."""
        return self._origin_ns + self.step * self.settings.period_ns

    def snapshot(self) -> ArmSnapshot:
        """Mode, last stop, episode, step and starved ticks, all of one moment."""
        with self._condition:
            return ArmSnapshot(self.mode, self.stop, self.episode, self.step, self.stamp_ns, self.starved)

    def connect(self, seed: int) -> ArmObservation:
        """Connect the driver and put the cell into the start state of ``seed``; the arm stays disarmed.

        Raises:
            DriverError: the arm cannot be reached.
        """
        with self._condition:
            self.driver.connect()
            return self.reset(seed)

    def close(self) -> None:
        """Disarm and release the driver."""
        self.disarm(Stop(StopCode.SHUTDOWN, "node shut down"))
        with self._condition:
            self.driver.close()

    def reset(self, seed: int) -> ArmObservation:
        """Put the cell into the start state of ``seed``.

        Raises:
            ArmRefusedError: the arm is armed.
        """
        with self._condition:
            if self.armed:
                raise ArmRefusedError("the arm is armed: call ~/disarm before ~/reset_cell")
            self._published.clear()
            self._now = self.driver.reset(seed)
            self._begin_at(self._newest_ns + self.settings.period_ns)
            return self._now

    def _begin_at(self, stamp_ns: int) -> None:
        """Give the present observation the stamp ``stamp_ns``, or the next one that was not used yet."""
        stamp = max(stamp_ns, self._newest_ns + self.settings.period_ns)
        self._origin_ns = stamp - self.step * self.settings.period_ns

    def arm(self, stamp_ns: int, now_ns: int, *, lockstep: bool = False) -> Tick:
        """Accept commands from now on: an episode begins.

        Its first observation carries ``stamp_ns``, or a later stamp where the cell's time has run ahead (in lockstep an
        episode takes less time than it counts).

        In ``lockstep`` the cell waits for commands, so observations do not age and the deadman is the caller's.

        Raises:
            ArmRefusedError: already armed, or the cell's episode is over and needs a reset first.
        """
        with self._condition:
            if self.armed:
                raise ArmRefusedError("already armed")
            if self._now is None or self._now.done:
                raise ArmRefusedError("the episode in the cell is over: call ~/reset_cell first")
            self._begin_at(stamp_ns)
            self._buffer.clear()
            self._begun = False
            self._published.clear()
            self.episode += 1
            self._lockstep = lockstep
            self.starved = 0
            self.mode = ArmMode.ARMED
            self._deadman.feed(now_ns)
            return self._publishable(now_ns, advanced=False, starved=False)

    def disarm(self, stop: Stop) -> bool:
        """Stop obeying commands; returns whether the arm was armed. The first reason stays until the next arming."""
        with self._condition:
            was = self.armed
            if was:
                self.mode, self.stop = ArmMode.DISARMED, stop
                self._buffer.clear()
                self._deadman.disable()
                self._condition.notify_all()
            return was

    def submit(
        self, source: str, stamp_ns: int, period_ns: int, actions: NDArray[np.floating], now_ns: int
    ) -> Refusal | None:
        """Offer a chunk (n, D) computed from the observation with ``stamp_ns``.

        NaN and infinities disarm the arm: a policy that produced them must not go on.

        Returns:
            None when accepted, else why not (also counted in ``refused``).
        """
        with self._condition:
            refusal = self._examine(source, stamp_ns, period_ns, actions, now_ns)
            if refusal is not None:
                self.refused[refusal.value] += 1
                return refusal
            self.accepted += 1
            self._condition.notify_all()
            return None

    def _examine(
        self, source: str, stamp_ns: int, period_ns: int, actions: NDArray[np.floating], now_ns: int
    ) -> Refusal | None:
        if not self.lease.admits(source):
            return Refusal.SOURCE
        if not self.armed:
            return Refusal.DISARMED
        known = self._published.get(stamp_ns)
        if known is None:
            return Refusal.UNKNOWN_OBSERVATION
        consumed, seen_ns = known
        if not self._lockstep and now_ns - seen_ns > self.settings.observation_max_age_s * 1e9:
            return Refusal.OLD_OBSERVATION
        if abs(period_ns - self.settings.period_ns) > PERIOD_TOLERANCE * self.settings.period_ns:
            return Refusal.PERIOD
        if actions.ndim != 2 or actions.shape[1] != len(self.limits.names) or not len(actions):
            return Refusal.MALFORMED
        if not np.isfinite(actions).all():
            row, column = np.argwhere(~np.isfinite(actions))[0]
            name = self.limits.names[column]
            self.disarm(Stop(StopCode.NOT_FINITE, f"action {row} of a chunk from {source!r} is not finite in {name!r}"))
            return Refusal.MALFORMED
        try:
            self._buffer.push(consumed, actions)
        except PolicyError:  # shape and values are checked above: what is left is that it came too late
            return Refusal.CONSUMED
        self._begun = True
        return None

    def wait_for_command(self, timeout_s: float) -> bool:
        """Block until an action is buffered (True), the arm is disarmed, or the time-out passes (False)."""
        with self._condition:
            self._condition.wait_for(lambda: self._buffer.remaining > 0 or not self.armed, timeout_s)
            return self.armed and self._buffer.remaining > 0

    def tick(self, now_ns: int) -> Tick:
        """Run one control period.

        Disarmed: the observation only. Armed but without any chunk yet: the cell waits. Armed and out of actions: the
        arm holds, the period counts as starved, and the deadman disarms it after its time-out.

        Raises:
            DriverError: the arm cannot be read or moved; it is disarmed.
        """
        with self._condition:
            armed = self.armed
            try:
                advanced, starved = self._advance(now_ns) if armed else (False, False)
                if not armed:
                    self._now = self.driver.observe()
            except DriverError as error:
                self.disarm(Stop(StopCode.DRIVER, str(error)))
                raise
            stopped = self.stop if armed and not self.armed else None
            return self._publishable(now_ns, advanced=advanced, starved=starved, stopped=stopped)

    def _advance(self, now_ns: int) -> tuple[bool, bool]:
        """One armed period; returns whether the arm was driven and whether it had to hold for want of an action."""
        if not self._lockstep and self._deadman.expired(now_ns):
            seconds = self.settings.command_timeout_s
            self.disarm(Stop(StopCode.COMMAND_TIMEOUT, f"no usable command for {seconds:g} s"))
            return False, False
        action = self._buffer.next()
        if action is None:
            if not self._begun:
                return False, False
            self.starved += 1
            self._now = self.driver.hold()
        else:
            try:
                bounded = self.limits.apply(action)
            except NotFiniteActionError as error:  # cannot pass submit(); kept as the last gate before the arm
                self.disarm(Stop(StopCode.NOT_FINITE, str(error)))
                return False, False
            self._deadman.feed(now_ns)
            self._now = self.driver.step(bounded)
        self._finish_episode(self._now)
        return True, action is None

    def _finish_episode(self, now: ArmObservation) -> None:
        if now.score >= 1.0 and now.done:
            self.disarm(Stop(StopCode.SUCCESS, f"the cell's goal was reached in {now.step} steps"))
        elif now.done or now.step >= self.settings.max_steps:
            self.disarm(Stop(StopCode.STEP_LIMIT, f"{now.step} steps done, the episode's limit"))

    def _publishable(self, now_ns: int, *, advanced: bool, starved: bool, stopped: Stop | None = None) -> Tick:
        now, stamp = self._now, self.stamp_ns
        assert now is not None
        self._newest_ns = max(self._newest_ns, stamp)
        if stamp not in self._published:
            self._published[stamp] = (self._buffer.consumed, now_ns)
            while len(self._published) > STAMPS_REMEMBERED:
                self._published.popitem(last=False)
        elif not self._begun:
            self._published[stamp] = (0, now_ns)  # the cell waits: its observation is measured again
        return Tick(now, stamp, advanced, starved, stopped, self._published[stamp][0], self._buffer.remaining)
