"""Driver of an Inovo arm: a ``CartesianArmDriver`` over the controller's rosbridge.

What is sent after a stop is nothing: ``send_twist`` and ``stop`` exclude each other, a stop overtakes what still waits,
and streaming belongs to one connection. After a loss the driver reconnects by itself, sends one zero twist and cancels
every goal (the controller may still execute the last demand: how long it does is not published), and stays inactive
until ``start_streaming`` is called again.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time

import numpy as np
from numpy.typing import ArrayLike

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.arm_protocol import ArmReadiness, ArmState, MotionOutcome
from dcqfa_ros.drivers.inovo_action import InovoAction, InovoMove
from dcqfa_ros.drivers.inovo_bring_up import bring_up, check_success, wait_for
from dcqfa_ros.drivers.inovo_goals import finite, joint_goal, straight_goal
from dcqfa_ros.drivers.inovo_state import InovoState
from dcqfa_ros.drivers.kinematics import ArmKinematics, inovo_kinematics
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.drivers.rosbridge import LinkError, RosbridgeClient, ServiceError
from dcqfa_ros.drivers.rosbridge_link import WebSocketLink

_TOOL_REACH_M = 0.6  # a tool centre point farther from the flange means another build of arm
_STALE_S = 0.5  # joint states and poses older than this say nothing of now
_GRIPPER_REPEAT_S = 0.3
_ZERO = (0.0, 0.0, 0.0)


class InovoArm:
    """An Inovo arm behind its controller."""

    def __init__(
        self,
        host: str,
        port: int = 9090,
        *,
        variant: str = "short",
        gripper: str = "robotiqd",
        tcp: str = "",
        jog_frame: str = "",
        claim: str = "dcqfa_ros",
        force_claim: bool = False,
        connect_timeout_s: float = 3.0,
        power_timeout_s: float = 15.0,
        enable_timeout_s: float = 10.0,
        ping_timeout_s: float = 2.0,
    ) -> None:
        """Prepare a driver; nothing is sent yet.

        Args:
            host: name or address of the controller.
            port: its rosbridge port.
            variant: build of the arm: ``short``, ``medium`` or ``long``.
            gripper: device name of the gripper, empty without one.
            tcp: identity of the tool centre point configured at the controller, empty for its default.
            jog_frame: frame that velocity demands are expressed in; empty is the controller's default, ``world``.
            claim: name under which control is claimed; empty to claim none.
            force_claim: take control from another user.
            connect_timeout_s: for the connection, and then for the first messages on all state topics.
            power_timeout_s: for the power supply, which takes about 5 s.
            enable_timeout_s: for the drives, which take about 1 s, and the gripper.
            ping_timeout_s: without answer to a ping, after which the connection counts as lost.

        Raises:
            KinematicsError: there is no such build.
        """
        self._name = f"Inovo arm at {host}:{port}"
        self.kinematics: ArmKinematics = inovo_kinematics(variant)
        self._variant, self._gripper, self._tcp, self._frame = variant, gripper, tcp, jog_frame
        self._claim, self._force_claim = claim, force_claim
        self._connect_timeout_s = connect_timeout_s
        self._power_timeout_s, self._enable_timeout_s = power_timeout_s, enable_timeout_s
        self.state_topics = InovoState(self.kinematics, gripper)
        self.client = RosbridgeClient(
            host, port, name=self._name, open_timeout_s=connect_timeout_s, ping_timeout_s=ping_timeout_s,
            on_connected=self._on_connected, on_lost=self._on_lost,
        )  # fmt: skip
        self._move = InovoAction(self.client, m.MOVE, m.MOVE_GOAL_TYPE)
        self._follow = InovoAction(self.client, m.FOLLOW, m.FOLLOW_GOAL_TYPE)
        # Held for moments only, while one frame is handed over; makes a stop final.
        self._motion = threading.RLock()
        self._streaming: WebSocketLink | None = None
        self._stops = 0
        self._opening: tuple[WebSocketLink, float, float] | None = None
        self._connected_once = False
        self._prepare_client()

    @property
    def name(self) -> str:
        """Short name for messages, such as ``Inovo arm at 192.168.1.7:9090``."""
        return self._name

    @property
    def is_streaming(self) -> bool:
        """Whether ``send_twist`` would send."""
        return self._streaming is not None and self._streaming is self.client.session

    @property
    def stops(self) -> int:
        """How often the arm was stopped or lost so far: a move that was decided on before such an end is void."""
        return self._stops

    def connect(self) -> None:
        """Open the transport, subscribe to the state and wait for the first one. Nothing moves.

        Raises:
            DriverError: the controller cannot be reached, a state topic is silent, or ``variant`` is another build.
        """
        if self.client.is_connected:
            return
        self.client.connect()
        try:
            wait_for(
                self.client,
                lambda: not self.state_topics.missing(),
                self._connect_timeout_s,
                lambda: (
                    f"connected, but nothing came within {self._connect_timeout_s:g} s on "
                    f"{', '.join(self.state_topics.missing())}: does the controller publish there, and is "
                    f"gripper {self._gripper!r} the name of its gripper?"
                ),
            )
            self._check_build()
        except DriverError:
            self.client.close()
            raise
        self._connected_once = True

    def bring_up(self) -> None:
        """Claim control, reset what may be reset, switch power and drives on, activate the gripper. Nothing moves.

        Raises:
            DriverError: a step was refused or timed out; it names the step and what to do.
        """
        self.stop()
        if self._claim:
            self.claim_control(force=self._force_claim)
        bring_up(
            self.client, self.state_topics, self._gripper,
            power_timeout_s=self._power_timeout_s, enable_timeout_s=self._enable_timeout_s,
        )  # fmt: skip

    def state(self) -> ArmState:
        """The newest state; ``readiness`` is DISCONNECTED (with the last known figures) while the transport is lost.

        Raises:
            DriverError: never connected.
        """
        if self.client.is_connected:
            readiness, detail = self.state_topics.readiness()
        else:
            readiness, detail = ArmReadiness.DISCONNECTED, self.client.loss_reason
        state = self.state_topics.snapshot(readiness, detail)
        if state is None:
            raise DriverError(f"{self._name}: never connected, call connect() first")
        return state

    def start_streaming(self) -> None:
        """Switch the controller to velocity commands and send a first zero twist; moves under way are cancelled.

        Raises:
            DriverError: the arm is not ready, runs a program of its own, refuses, or was stopped meanwhile.
        """
        session, stops = self._ready("stream velocities")
        self._end_moves("velocities are streamed instead")
        self._switch("velocity")
        with self._motion:
            self._still(session, stops)
            self._publish_jog(_ZERO, _ZERO, session)
            self._streaming = session

    def send_twist(self, linear: ArrayLike, angular: ArrayLike) -> int:
        """Hand one velocity demand (m/s and rad/s in ``world``) to the transport; returns its monotonic time, ns.

        Raises:
            ValueError: not three finite numbers each; nothing was sent.
            DriverError: the transport is lost, or streaming was not started by :meth:`start_streaming`.
        """
        message = m.jog(finite(linear, "linear", "m/s"), finite(angular, "angular", "rad/s"), self._frame, self._tcp)
        with self._motion:
            session = self._streaming
            if session is None:
                raise DriverError(f"{self._name}: not streaming: call start_streaming() first")
            return self.client.publish(m.CARTESIAN_JOG, message, session=session, latest=True)

    def stop(self) -> None:
        """Send zero twist at once, cancel moves, and end streaming: nothing is sent after it until it is started again.

        Never raises; where the transport is lost there is nothing to stop.
        """
        with self._motion:
            self._stops += 1
            self._streaming = None
            with contextlib.suppress(DriverError):
                self._publish_jog(_ZERO, _ZERO, None)
            self._end_moves("stopped")

    def trip_safe_stop(self, timeout_s: float = 0.5) -> None:
        """Stop, and trip the controller's safe stop ahead of everything that waits; motion then needs a reset.

        Args:
            timeout_s: to wait for the confirmation; 0 to wait for nothing.

        Raises:
            DriverError: the transport is lost, or the controller did not confirm; the arm may still move.
        """
        try:
            call = self.client.start_call(m.SAFE_STOP_TRIP, urgent=True)
        finally:
            self.stop()
        if timeout_s > 0.0:
            check_success(self._name, m.SAFE_STOP_TRIP, call.wait(timeout_s))

    def claim_control(self, *, force: bool = False) -> None:
        """Claim control of the arm among the controller's users.

        Raises:
            DriverError: another user has it (and ``force`` is not set); the message names it.
        """
        values = self.client.call_service(m.CLAIM_CONTROL, {"id": self._claim or "dcqfa_ros", "force": force})
        in_control = values.get("in_control")
        if not isinstance(in_control, bool):
            raise ServiceError(f"{self._name}: {m.CLAIM_CONTROL}: expected in_control, got {values!r:.80}")
        if not in_control:
            raise DriverError(
                f"{self._name}: {values.get('id_of_controller')!r} controls the arm: release it there, "
                "or set force_claim to take it"
            )

    def move_to_pose(
        self,
        position: ArrayLike,
        orientation: ArrayLike,
        *,
        speed: float,
        angular_speed: float,
        since: int | None = None,
    ) -> InovoMove:
        """Start a straight move of the tool centre point at most at ``speed`` m/s and ``angular_speed`` rad/s.

        Args:
            position: goal (3,), m.
            orientation: goal (4,), quaternion (x, y, z, w).
            speed: m/s.
            angular_speed: rad/s.
            since: :attr:`stops` when the move was decided on; None: now.

        Raises:
            ValueError: a number is not finite or a speed is out of range; nothing was sent.
            DriverError: the arm is not ready, refuses, or was stopped meanwhile.
        """
        goal = straight_goal(position, orientation, speed, angular_speed, self._tcp)
        return self._start(self._move, goal, "move to a pose", since)

    def follow_joints(self, times_s: ArrayLike, positions: ArrayLike, *, since: int | None = None) -> InovoMove:
        """Start following joint positions (n, 6) rad at ``times_s`` (n,) after now; ``since`` as for a pose.

        Raises:
            ValueError: shapes, times or numbers are wrong, or a joint would be faster than it can; nothing was sent.
            DriverError: the arm is not ready, refuses, or was stopped meanwhile.
        """
        goal = joint_goal(self.kinematics, self.state().joints, times_s, positions)
        return self._start(self._follow, goal, "follow joints", since)

    def move_gripper(self, opening: float) -> None:
        """Ask the gripper for an opening, 0 closed .. 1 open. Does not wait.

        A request that the gripper has already taken is not repeated: a repeated goal would make it start over.

        Raises:
            ValueError: not a number from 0 to 1; nothing was sent.
            DriverError: there is no gripper, or the transport is lost.
        """
        if not 0.0 <= opening <= 1.0:
            raise ValueError(f"opening: expected 0 (closed) to 1 (open), got {opening}")
        if not self._gripper:
            raise DriverError(f"{self._name}: there is no gripper: set its device name, such as robotiqd")
        session = self.client.session
        if session is None:
            raise LinkError(f"{self._name}: no connection: {self.client.loss_reason}")
        now = time.monotonic()
        if self._opening is not None and self._opening[:2] == (session, opening):
            taken = abs(self.state_topics.gripper.get("target_position", math.nan) - opening) < 0.01
            if taken or now - self._opening[2] < _GRIPPER_REPEAT_S:
                return
        if opening in (0.0, 1.0):
            goal: m.Message
            name, goal = "grip", {"action": m.RELEASE if opening else m.GRIP}
        else:
            name, goal = "gripper_command", {"command": {"position": float(opening), "max_effort": 0.0}}
        topic = m.gripper_topic(self._gripper, f"{name}/goal")
        self.client.publish(topic, m.action_goal(f"dcqfa_{time.time_ns()}", goal), session=session, latest=True)
        self._opening = (session, float(opening), now)

    def report(self) -> dict[str, str]:
        """Return facts for diagnostics: supply, drives, gripper, program, link."""
        link = self.client.statistics
        facts: dict[str, object] = {
            **self.state_topics.facts(),
            "streaming": self.is_streaming, "connections": link.connections, "losses": link.losses,
            "frames_sent": link.sent, "frames_superseded": link.superseded, "frames_refused": link.refused,
            "malformed": link.malformed + sum(self.state_topics.malformed.values()) + self._move.malformed
            + self._follow.malformed,
            "last_malformed": self.state_topics.last_malformed, "complaint": link.last_complaint,
            "round_trip_ms": round(link.round_trip_ms, 3),
        }  # fmt: skip
        return {key: str(value) for key, value in facts.items()}

    def close(self) -> None:
        """Stop, then release the transport. Safe to call at any time and more than once; ``connect`` works again."""
        self.stop()
        self._connected_once = False
        self.client.close()
        for action in (self._move, self._follow):
            action.end_all(MotionOutcome.LOST, "the connection was closed")
        self.state_topics.forget_readiness()

    def _prepare_client(self) -> None:
        state = self.state_topics
        for topic in (*state.required, *state.optional):
            self.client.subscribe(topic, state.callback(topic), type=state.type_of(topic))
        self.client.advertise(m.CARTESIAN_JOG, m.TYPES[m.CARTESIAN_JOG])
        for action in (self._move, self._follow):
            action.prepare()
        if self._gripper:
            self.client.advertise(m.gripper_topic(self._gripper, "grip/goal"), m.GRIP_GOAL_TYPE)
            self.client.advertise(m.gripper_topic(self._gripper, "gripper_command/goal"), m.GRIPPER_GOAL_TYPE)

    def _on_connected(self, session: WebSocketLink) -> None:
        """After a reconnection, end what the controller may still execute."""
        if self._connected_once:
            with contextlib.suppress(LinkError):
                self._publish_jog(_ZERO, _ZERO, session)
                for action in (self._move, self._follow):
                    action.cancel()

    def _on_lost(self, reason: str) -> None:
        with self._motion:
            self._streaming = None
            self._stops += 1
        self.state_topics.forget_readiness()
        for action in (self._move, self._follow):
            action.end_all(MotionOutcome.LOST, f"the connection was lost: {reason}")

    def _publish_jog(self, linear: ArrayLike, angular: ArrayLike, session: WebSocketLink | None) -> int:
        message = m.jog(linear, angular, self._frame, self._tcp)
        return self.client.publish(m.CARTESIAN_JOG, message, session=session, urgent=True)

    def _start(self, action: InovoAction, goal: m.Message, what: str, since: int | None) -> InovoMove:
        session, stops = self._ready(what)
        if since is not None:
            stops = since
        with self._motion:
            self._still(session, stops)
            if self._streaming is not None:
                self._streaming = None
                self._publish_jog(_ZERO, _ZERO, session)
        self._switch("trajectory")
        with self._motion:
            self._still(session, stops)
            return action.start(goal, session)

    def _ready(self, what: str) -> tuple[WebSocketLink, int]:
        with self._motion:
            session, stops = self.client.session, self._stops
        if session is None:
            raise LinkError(f"{self._name}: cannot {what}: no connection: {self.client.loss_reason}")
        readiness, detail = self.state_topics.readiness()
        if readiness is not ArmReadiness.READY:
            raise DriverError(f"{self._name}: cannot {what}: {readiness.value}: {detail}")
        for topic in (m.JOINT_STATES, m.TCP_POSE):
            age = self.state_topics.age_s(topic)
            if age > _STALE_S:
                raise DriverError(f"{self._name}: cannot {what}: nothing on {topic} for {age:.1f} s")
        if self.state_topics.values(m.RUNTIME_STATE).get("state") == m.SEQUENCE_RUNNING:
            raise DriverError(f"{self._name}: cannot {what}: a program runs on the controller: stop it there")
        return session, stops

    def _still(self, session: WebSocketLink, stops: int) -> None:
        if self._stops != stops or self.client.session is not session:
            raise DriverError(f"{self._name}: stopped or disconnected meanwhile: nothing was sent, start again")

    def _end_moves(self, why: str) -> None:
        for action in (self._move, self._follow):
            if action.is_busy:
                action.cancel_all(why)

    def _switch(self, controller: str) -> None:
        values = self.client.call_service(m.SWITCH_CONTROLLER, {"name": controller})
        check_success(self._name, f"{m.SWITCH_CONTROLLER} to {controller}", values)

    def _check_build(self) -> None:
        state = self.state()
        distance = float(np.linalg.norm(self.kinematics.flange(state.joints)[0] - state.position))
        if distance > _TOOL_REACH_M:
            raise DriverError(
                f"{self._name}: the tool centre point is {distance:.2f} m from where the flange of the build "
                f"{self._variant!r} is: set variant to the build of this arm (short, medium, long)"
            )
