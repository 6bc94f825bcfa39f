"""The last stage before the arm: every velocity passes :class:`SafetyStage`, which bounds it or says why to stop.

There is no way to make a stage without limits and no switch to pass it by. It has no clock and no threads; the caller
serialises the calls (see ``dcqfa_ros.runtime.arm_stream``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.arm_protocol import ArmReadiness, ArmState
from dcqfa_ros.safety.cartesian_limits import LimitError, TwistLimiter
from dcqfa_ros.safety.force_guard import ForceGuard
from dcqfa_ros.safety.joint_limits import JointLimits
from dcqfa_ros.safety.limits import NotFiniteActionError
from dcqfa_ros.safety.stops import Stop, StopCode, StopLatch

Floats = NDArray[np.float64]

JOINT_SHARE = 0.9  # of the joints' limits that commands are planned for; the rest is for what follows from ramps
OUTSIDE_M = 0.02  # how far outside the box a move of the controller's own may be measured
OVERSPEED = 1.5  # measured speed over the commanded one, at which a move is stopped
STEP_RAD = 0.05  # between the places at which a joint trajectory is examined
_READINESS = {
    ArmReadiness.DISCONNECTED: StopCode.ARM_LOST,
    ArmReadiness.STOPPED: StopCode.ESTOP,
    ArmReadiness.SAFE_STOPPED: StopCode.SAFE_STOP,
    ArmReadiness.FAULT: StopCode.ARM_FAULT,
    ArmReadiness.OFF: StopCode.ARM_OFF,
}


@dataclass(frozen=True, slots=True)
class Ages:
    """Largest ages, seconds; what is older stops the arm. Hard maxima: see :data:`MAXIMUM_AGES`.

    Attributes:
        state: of the arm's joint positions.
        wrench: of the newest wrench.
        camera: of the newest picture of each watched camera.
        command: of the command being executed.
        observation: of the observation that a policy's command rests on.
    """

    state: float
    wrench: float
    camera: float
    command: float
    observation: float

    def __post_init__(self) -> None:
        """Refuse ages that are absent, not positive or beyond the hard maximum.

        Raises:
            LimitError: names the age.
        """
        for field in fields(self):
            value, maximum = getattr(self, field.name), MAXIMUM_AGES[field.name]
            if not (isinstance(value, (int, float)) and 0.0 < value <= maximum):
                raise LimitError(f"age of {field.name}: expected above 0 and at most {maximum:g} s, got {value}")


MAXIMUM_AGES = {"state": 0.5, "wrench": 0.5, "camera": 2.0, "command": 2.0, "observation": 5.0}


@dataclass(frozen=True, slots=True)
class Command:
    """A wanted twist.

    Attributes:
        twist: (6,) (vx, vy, vz, wx, wy, wz) of the tool centre point in ``world``, m/s and rad/s.
        received_ns: monotonic time at which it came.
        observed_ns: monotonic time of the observation it rests on; None for commands of people.
    """

    twist: Floats
    received_ns: int
    observed_ns: int | None = None


@dataclass
class Watch:
    """Something that must keep coming while the arm is armed."""

    code: StopCode
    name: str
    maximum_s: float
    seen_ns: int | None = None

    def late(self, now_ns: int, armed_ns: int) -> Stop | None:
        """Return the stop for one that is missing; what never came counts as missing."""
        if self.seen_ns is None:
            return Stop(self.code, f"{self.name} has never come")
        age = (now_ns - max(self.seen_ns, armed_ns)) / 1e9
        if age > self.maximum_s:
            return Stop(self.code, f"no {self.name} for {age:.3f} s, limit {self.maximum_s:g} s")
        return None


class SafetyStage:
    """Limits, force guard, health and the stop latch in front of one arm.

    Attributes:
        latch: the stops.
        limiter, joints, guard: the limits; ``guard`` is None only on an arm without a force/torque sensor.
    """

    def __init__(
        self,
        limiter: TwistLimiter,
        joints: JointLimits | None,
        guard: ForceGuard | None,
        ages: Ages,
        cameras: Iterable[str] = (),
        latch: StopLatch | None = None,
    ) -> None:
        """Put the limits together.

        Args:
            limiter: of the twist stream.
            joints: None only for an arm whose controller keeps its own joint limits (a servo behind ROS 2 topics).
            guard: None only for an arm without a force/torque sensor.
            ages: largest ages.
            cameras: names of the cameras that a policy needs.
            latch: of the stage before, where this one takes its place: what is latched stays so.
        """
        self.limiter, self.joints, self.guard, self.ages = limiter, joints, guard, ages
        self.latch = latch or StopLatch()
        self._wrench = Watch(StopCode.WRENCH_LOST, "wrench", ages.wrench) if guard is not None else None
        self._cameras = {
            name: Watch(StopCode.CAMERA_LOST, f"picture of camera {name}", ages.camera) for name in cameras
        }
        self._armed_ns = 0

    # Signs of life

    def feed_wrench(self, force: Floats, torque: Floats, now_ns: int) -> Stop | None:
        """Take in a contact wrench in ``world`` at the tool centre point; returns the stop it causes."""
        if self.guard is None or self._wrench is None:
            return None
        stop = self.guard.feed(force, torque)
        if math.isfinite(float(force.sum()) + float(torque.sum())):  # otherwise it says nothing of the contact
            self._wrench.seen_ns = now_ns
        return stop

    def feed_camera(self, name: str, now_ns: int) -> None:
        """Note a picture of camera ``name``; cameras that are not watched are ignored."""
        if name in self._cameras:
            self._cameras[name].seen_ns = now_ns

    # Stops

    def begin(self, now_ns: int) -> None:
        """The arm was armed: at rest, ages count from now."""
        self._armed_ns = now_ns
        self.limiter.reset()

    def rest(self) -> None:
        """The arm was brought to rest outside the stream (zero twist, or a move): the next twist starts from 0."""
        self.limiter.reset()

    def check(self, state: ArmState, now_ns: int, *, cameras: bool) -> Stop | None:
        """Return why the arm must not move now: its own state, or the health of what it relies on.

        Args:
            state: of the arm.
            now_ns: monotonic time.
            cameras: whether the commands come from someone who looks through the cameras.
        """
        if state.readiness is not ArmReadiness.READY:
            return Stop(_READINESS[state.readiness], state.detail or state.readiness.value)
        if not self.hears(state, now_ns):
            age = (now_ns - state.stamp_ns) / 1e9
            return Stop(StopCode.ARM_LOST, f"no joint positions or pose for {age:.3f} s, limit {self.ages.state:g} s")
        watches = [*([self._wrench] if self._wrench else []), *(self._cameras.values() if cameras else ())]
        for watch in watches:
            stop = watch.late(now_ns, self._armed_ns)
            if stop is not None:
                return stop
        return None

    def hears(self, state: ArmState, now_ns: int) -> bool:
        """Whether the arm is connected and its state is of now: then it has heard what it was told before."""
        connected = state.readiness is not ArmReadiness.DISCONNECTED
        return connected and now_ns - state.stamp_ns <= self.ages.state * 1e9

    def refusal(self, state: ArmState, now_ns: int, *, cameras: bool) -> str | None:
        """Return why the arm cannot be armed: a latched stop, or what :meth:`check` finds. Health counts from now."""
        held = self.latch.held
        if held is not None:
            return f"stopped by {held.code.value}: {held.text}; call ~/reset_stop first"
        self._armed_ns = 0
        stop = self.check(state, now_ns, cameras=cameras)
        if stop is not None:
            return f"{stop.code.value}: {stop.text}"
        return self.guard.obstacle() if self.guard is not None else None

    def reset(self, state: ArmState, now_ns: int) -> Stop | None:
        """Take back the latched stop and return it; None where none was latched.

        Raises:
            StillStoppedError: its cause is still there; nothing has changed.
        """
        held = self.latch.held
        if held is None:
            return None
        if held.code in (StopCode.FORCE, StopCode.TORQUE) and self.guard is not None:
            obstacle = self.guard.obstacle()
            if obstacle is not None:
                raise StillStoppedError(f"the arm is still under load: {obstacle}")
        if held.code in (StopCode.ESTOP, StopCode.SAFE_STOP, StopCode.ARM_LOST, StopCode.ARM_FAULT):
            now = _READINESS.get(state.readiness)
            if now is not None and now is not StopCode.ARM_OFF:
                raise StillStoppedError(f"{now.value}: {state.detail or state.readiness.value}")
        if held.code is StopCode.WRENCH_LOST and self._wrench is not None:
            late = self._wrench.late(now_ns, 0)
            if late is not None:
                raise StillStoppedError(late.text)
        if self.guard is not None:
            self.guard.reset()
        self.limiter.reset()
        return self.latch.reset()

    # Commands

    def bound(
        self, command: Command | None, state: ArmState, now_ns: int, *, cameras: bool = False
    ) -> tuple[float, ...] | Stop:
        """Return the twist (6,) to send for this period, or why to stop (zero twist, nothing after it).

        Args:
            command: what is wanted; None brings the arm to rest within the limits.
            state: of the arm.
            now_ns: monotonic time.
            cameras: whether the commands come from someone who looks through the cameras.
        """
        held = self.latch.held
        if held is not None:
            return held
        stop = self.check(state, now_ns, cameras=cameras)
        if stop is not None:
            return stop
        wanted = np.zeros(6)
        if command is not None:
            stop = self._ages_of(command, now_ns)
            if stop is not None:
                return stop
            wanted = np.asarray(command.twist, np.float64)
        factor = self.guard.factor if self.guard is not None else 1.0
        return self._limited(wanted * factor, state, now_ns)

    def bound_retreat(self, velocity: Floats, state: ArmState, now_ns: int) -> tuple[float, ...] | Stop:
        """Return the twist to back away with after a contact stop, within all limits of a command."""
        stop = self.check(state, now_ns, cameras=False)
        if stop is not None:
            return stop
        return self._limited(np.concatenate([velocity, np.zeros(3)]), state, now_ns)

    def _ages_of(self, command: Command, now_ns: int) -> Stop | None:
        age = (now_ns - command.received_ns) / 1e9
        if not age <= self.ages.command:
            return Stop(StopCode.COMMAND_TIMEOUT, f"the command is {age:.3f} s old, limit {self.ages.command:g} s")
        if command.observed_ns is not None:
            age = (now_ns - command.observed_ns) / 1e9
            if not age <= self.ages.observation:
                limit = self.ages.observation
                return Stop(StopCode.OBSERVATION_AGE, f"the observation is {age:.3f} s old, limit {limit:g} s")
        return None

    def _limited(self, wanted: Floats, state: ArmState, now_ns: int) -> tuple[float, ...] | Stop:
        try:
            if self.joints is not None:
                wanted = wanted * self.joints.factor(state.joints, wanted, JOINT_SHARE, state.position)
            twist = self.limiter.bound(wanted, state.position, state.stamp_ns, now_ns)
            if self.joints is not None:
                factor = self.joints.factor(state.joints, np.array(twist), 1.0, state.position)
                if factor < 1.0:
                    self.limiter.scale_down(factor)
                    twist = self.limiter.velocity
        except NotFiniteActionError as error:
            return Stop(StopCode.NOT_FINITE, str(error))
        return twist

    # Moves that the controller plans itself

    def supervise_move(self, state: ArmState, now_ns: int, speed: float | None) -> Stop | None:
        """Return why a move under way must be stopped.

        Args:
            state: of the arm.
            now_ns: monotonic time.
            speed: largest speed of the move, m/s; None: only the limit of every command.
        """
        stop = self.check(state, now_ns, cameras=False)
        if stop is not None:
            return stop
        if not self.limiter.workspace.holds(state.position, OUTSIDE_M):
            place = ", ".join(f"{p:.3f}" for p in state.position)
            return Stop(StopCode.WORKSPACE, f"the move left the workspace: tool centre point at ({place}) m")
        limits = self.limiter.limits
        for what, velocity, limit, slack, unit in (
            ("moves", state.linear, min(limits.linear_speed, speed if speed is not None else math.inf), 0.02, "m/s"),
            ("turns", state.angular, limits.angular_speed, 0.1, "rad/s"),
        ):
            measured = float(np.linalg.norm(velocity))
            if not measured <= OVERSPEED * limit + slack:
                return Stop(StopCode.SPEED, f"the tool {what} at {measured:.3f} {unit}, limit {limit:g} {unit}")
        beyond = self.joints.beyond(state.joints, state.joint_velocities) if self.joints is not None else None
        return Stop(StopCode.JOINT_LIMIT, beyond) if beyond else None

    def refuse_pose(self, position: Floats, orientation: Floats, state: ArmState) -> str | None:
        """Return why a straight move to a pose may not begin; None where it may."""
        if not (np.isfinite(position).all() and np.isfinite(orientation).all()):
            return "position or orientation hold NaN or infinity"
        if abs(float(np.linalg.norm(orientation)) - 1.0) > 1e-3:
            return "the orientation is no unit quaternion"
        for name, place in (("goal", position), ("present position", state.position)):
            if not self.limiter.workspace.holds(place):
                return f"the {name} ({', '.join(f'{p:.3f}' for p in place)}) m is outside the workspace"
        return None

    def refuse_joints(self, times_s: Floats, positions: Floats, state: ArmState) -> str | None:
        """Return why a joint trajectory may not be followed; None where it may. The whole path is examined."""
        if self.joints is None:
            return "joint trajectories need joint limits and the arm's kinematics"
        problem = self.joints.check_path(times_s, positions, state.joints)
        return problem or self._refuse_path(self.joints, np.asarray(times_s), np.asarray(positions), state)

    def _refuse_path(self, joints: JointLimits, times_s: Floats, positions: Floats, state: ArmState) -> str | None:
        """Return where the tool centre point would leave the workspace or be too fast; None where it would not."""
        corners = np.vstack([state.joints, positions])
        moves = np.diff(corners, axis=0)
        counts = np.maximum(1, np.ceil(np.abs(moves).max(axis=1) / STEP_RAD)).astype(int)
        row = np.repeat(np.arange(len(counts)), counts)
        share = np.concatenate([np.arange(1, count + 1) / count for count in counts])
        path = np.vstack([state.joints, corners[row] + moves[row] * share[:, None]])
        places, turns = joints.places(state.joints, state.position, path)
        for place in places[1:]:
            if not self.limiter.workspace.holds(place):
                return f"the path leaves the workspace at ({', '.join(f'{p:.3f}' for p in place)}) m"
        seconds = (np.diff(times_s, prepend=0.0) / counts)[row]
        cosines = (np.einsum("nij,nij->n", turns[1:], turns[:-1]) - 1.0) / 2.0
        limits = self.limiter.limits
        for what, ways, limit, unit in (
            ("move", np.linalg.norm(np.diff(places, axis=0), axis=1), limits.linear_speed, "m/s"),
            ("turn", np.arccos(np.clip(cosines, -1.0, 1.0)), limits.angular_speed, "rad/s"),
        ):
            fastest = float((ways / seconds).max())
            if not fastest <= limit:
                return f"the tool would {what} at {fastest:.3f} {unit}, limit {limit:g} {unit}: allow more time"
        return None


class StillStoppedError(RuntimeError):
    """A stop cannot be reset: its cause is still there."""
