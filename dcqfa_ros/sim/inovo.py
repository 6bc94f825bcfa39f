"""An Inovo arm and its controller, emulated behind a real rosbridge WebSocket on this host.

Kinematics and joint speed limits are those of the build; bring-up, safety circuits, gripper and actions behave as
documented. **The last jog is executed until told otherwise**: there is no time-out, as there may be none at the real
controller. Every motion frame is kept with the monotonic time at which its last byte was read.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.kinematics import JOINTS, inovo_kinematics
from dcqfa_ros.rotations import quaternion_of
from dcqfa_ros.sim.contact import ContactPlane, ToolLoad, cross
from dcqfa_ros.sim.inovo_commands import TRAJECTORY, EmulatedCommands
from dcqfa_ros.sim.inovo_gripper import EmulatedGripper
from dcqfa_ros.sim.inovo_motion import HOME, ArmMotion
from dcqfa_ros.sim.inovo_power import EmulatedPower
from dcqfa_ros.sim.inovo_services import EmulatedServices
from dcqfa_ros.sim.rosbridge_server import RequestError, RosbridgeServer

Floats = NDArray[np.float64]

_SLOW_EVERY = 10  # of the slow topics, in ticks


@dataclass(frozen=True, slots=True)
class MotionFrame:
    """A command for the arm as it came over the socket.

    Attributes:
        number: count since the start, from 0.
        stamp_ns: monotonic time at which its last byte was read.
        topic: of the command.
        moves: whether it asks for motion; False for a zero velocity and a cancel.
        values: linear and angular velocity (6,) of a Cartesian jog, joint velocities (6,) of a joint jog, else None.
        executed: whether the emulator took it: not in the wrong state, not malformed.
    """

    number: int
    stamp_ns: int
    topic: str
    moves: bool
    values: tuple[float, ...] | None
    executed: bool


class InovoEmulator:
    """A controller that clients reach at ``127.0.0.1:port``. Its own methods may be called from any thread."""

    def __init__(
        self,
        variant: str = "short",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        gripper: str = "robotiqd",
        tool_m: ArrayLike = (0.0, 0.0, 0.0),
        joints: ArrayLike = HOME,
        ready: bool = False,
        time_scale: float = 1.0,
        rate_hz: float = 100.0,
        contact: ContactPlane | None = None,
        load: ToolLoad | None = None,
        keep_frames: int = 20_000,
        seed: int = 0,
    ) -> None:
        """Prepare an emulator; nothing listens before ``start``.

        Args:
            variant: build of the arm.
            host: address to listen on.
            port: to listen on; 0 takes a free one.
            gripper: device name, empty without one.
            tool_m: position (3,) of the tool centre point in the frame of the flange, m.
            joints: start position (6,) rad.
            ready: power, drives and gripper are on from the start.
            time_scale: of bring-up times, 1 as long as the real ones.
            rate_hz: of motion, joint states and pose.
            contact: a surface that the tool can touch.
            load: weight of the tool, felt by :meth:`wrench`.
            keep_frames: how many motion frames are kept.
            seed: of the jitter.

        Raises:
            KinematicsError: there is no such build.
        """
        self.variant, self.gripper_name = variant, gripper
        self.kinematics = inovo_kinematics(variant).with_tool(tool_m)
        self.server = RosbridgeServer(self, host=host, port=port, seed=seed)
        self.power = EmulatedPower(time_scale=time_scale, ready=ready)
        self.gripper = EmulatedGripper(activation_s=time_scale)
        self.gripper.activated = ready
        self.motion = ArmMotion(self.kinematics, joints)
        self.contact, self.load = contact, load
        self.controller = TRAJECTORY
        self.sequence_state = 0
        self.services = EmulatedServices(self)
        self.lock = threading.RLock()
        self.commands = EmulatedCommands(self)
        self._period_s = 1.0 / rate_hz
        self._frames: deque[MotionFrame] = deque(maxlen=keep_frames)
        self._numbers = itertools.count()
        self._arrived = threading.Condition()
        self._running = threading.Event()
        self._thread: threading.Thread | None = None
        self._wrench = (np.zeros(3), np.zeros(3))
        self._sequence = itertools.count()
        self.failure: BaseException | None = None

    def start(self) -> InovoEmulator:
        """Listen, and let time run; returns the emulator.

        Raises:
            DriverError: the port is taken.
        """
        self.server.start()
        self._running.set()
        self._thread = threading.Thread(target=self._run, name="emulated arm", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Drop the clients and stop listening; the state stays. Safe to call more than once."""
        self._running.clear()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.server.stop()

    def __enter__(self) -> InovoEmulator:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server.port

    @property
    def frames(self) -> list[MotionFrame]:
        """The motion frames kept so far, oldest first."""
        with self._arrived:
            return list(self._frames)

    def wait_for_frame(
        self, wanted: Callable[[MotionFrame], bool], timeout_s: float = 5.0, after: int = -1
    ) -> MotionFrame:
        """Wait for a frame with a number above ``after`` that ``wanted`` accepts.

        Raises:
            TimeoutError: none came.
        """
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while True:
                for frame in self._frames:
                    if frame.number > after and wanted(frame):
                        return frame
                left = deadline - time.monotonic()
                if left <= 0.0:
                    raise TimeoutError(f"no such motion frame within {timeout_s:g} s ({len(self._frames)} kept)")
                self._arrived.wait(left)

    @property
    def joints(self) -> Floats:
        """Joint positions (6,) rad."""
        with self.lock:
            return self.motion.joints.copy()

    @property
    def joint_velocities(self) -> Floats:
        """Joint velocities (6,) rad/s."""
        with self.lock:
            return self.motion.velocities.copy()

    @property
    def twist(self) -> Floats:
        """The jog (6,) m/s and rad/s that is being executed; zero when none is."""
        with self.lock:
            return self.motion.twist.copy() if self.motion.is_free else np.zeros(6)

    @property
    def position(self) -> Floats:
        """Position (3,) m of the tool centre point in ``world``."""
        return self.kinematics.forward(self.joints)[0]

    @property
    def is_moving(self) -> bool:
        """Whether any joint turns."""
        return bool(np.abs(self.joint_velocities).max() > 1e-4)

    def wrench(self) -> tuple[Floats, Floats]:
        """Return force (3,) N and torque (3,) N m of contact and weight on the tool, at and in the flange's frame."""
        return self._wrench

    def sensor_wrench(self, _: int = 0) -> list[float]:
        """Return :meth:`wrench` as six numbers: the source of an emulated force/torque sensor on the flange."""
        force, torque = self._wrench
        return [*force.tolist(), *torque.tolist()]

    def trip(self) -> None:
        """Trip the safe stop."""
        with self.lock:
            self.power.trip()

    def press_estop(self) -> None:
        """Press the emergency stop."""
        with self.lock:
            self.power.press_estop()

    def release_estop(self) -> None:
        """Release the emergency stop; it can then be reset."""
        with self.lock:
            self.power.release_estop()

    def set_fault(self, code: int) -> None:
        """Report a fault of the power supply."""
        with self.lock:
            self.power.fail(code)

    def drop_connections(self, refuse_for_s: float = 0.0) -> None:
        """Drop every client without a word; the arm goes on with its last jog."""
        self.server.drop_connections(refuse_for_s)

    def pause(self) -> None:
        """Hang: keep the connections but read and send nothing; the arm goes on with its last jog."""
        self.server.pause()

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self.server.resume()

    def mute(self, topics: Iterable[str]) -> None:
        """Publish nothing on these topics from now on; an empty list ends it."""
        self.server.mute(topics)

    def set_delay(self, latency_s: float, jitter_s: float = 0.0) -> None:
        """Delay every frame in both directions by ``latency_s`` plus up to ``jitter_s``; orders are kept."""
        self.server.latency_s, self.server.jitter_s = latency_s, jitter_s

    def receive(self, topic: str, message: m.Message, stamp_ns: int) -> None:
        """Take a message of a client (for the server)."""
        handler = self.commands.motion_topics.get(topic)
        if handler is None:
            gripper = self.commands.gripper_topics.get(topic)
            if gripper is not None:
                with self.lock:
                    gripper(message)
            return
        moves, values, executed = True, None, False
        try:
            values, executed = handler(message)
            moves = bool(np.any(values)) if values is not None else not topic.endswith("/cancel")
        except m.MessageError as error:
            raise RequestError(f"{topic}: {error}") from None
        finally:
            with self._arrived:
                self._frames.append(MotionFrame(next(self._numbers), stamp_ns, topic, moves, values, executed))
                self._arrived.notify_all()

    def serve(self, service: str, arguments: m.Message) -> m.Message:
        """Answer a service (for the server)."""
        return self.services.serve(service, arguments)

    def switch(self, controller: str) -> None:
        """Select a controller group (for the services); the demand of the one before ends."""
        with self.lock:
            if controller != self.controller:
                self.commands.abort("another controller was selected")
                self.motion.halt()
            self.controller = controller

    def _run(self) -> None:
        last = due = time.monotonic()
        tick = 0
        try:
            while self._running.is_set():
                now = time.monotonic()
                with self.lock:
                    self._step(min(now - last, 0.2))
                    messages = self._messages(tick)
                for topic, message in messages.items():
                    self.server.publish(topic, message)
                last, tick = now, tick + 1
                due = max(due + self._period_s, now)
                time.sleep(max(0.0, due - time.monotonic()))
        except BaseException as error:
            self.failure = error
            raise

    def _step(self, seconds: float) -> None:
        self.power.step(seconds)
        self.motion.is_free = self.power.allows_motion
        if not self.motion.is_free:
            self.commands.abort("the arm was stopped")
            self.motion.halt()
        if self.power.bus != m.BUS_ON:
            self.gripper.power_off()
        if self.motion.step(seconds):
            self.commands.path_ended()
        if self.gripper.step(seconds):
            self.commands.gripper_ended()

    def _messages(self, tick: int) -> dict[str, m.Message]:
        header = {"seq": next(self._sequence), "stamp": m.ros_now(), "frame_id": "world"}
        joints, velocities = self.motion.joints, self.motion.velocities
        position, rotation = self.kinematics.forward(joints)
        twist = self.kinematics.jacobian(joints) @ velocities
        self._feel(joints, position, twist[:3])
        messages: dict[str, m.Message] = {
            m.JOINT_STATES: {
                "header": {**header, "frame_id": ""},
                "name": list(m.JOINT_NAMES),
                "position": joints.tolist(),
                "velocity": velocities.tolist(),
                "effort": [0.0] * JOINTS,
            },
            m.TCP_POSE: {
                "header": header,
                "pose": {"position": m.vector(position), "orientation": m.quaternion(quaternion_of(rotation))},
            },
        }
        if tick % (_SLOW_EVERY // 2) == 0:
            speed = {"linear": float(np.linalg.norm(twist[:3])), "angular": float(np.linalg.norm(twist[3:]))}
            messages[m.TCP_SPEED] = {"header": header, "speed": speed}
            if self.gripper_name:
                messages[m.gripper_topic(self.gripper_name, "gripper_state")] = self.gripper.message(header)
        if tick % _SLOW_EVERY == 0:
            messages |= self.power.messages(header)
            messages[m.ARM_STATE] = self.power.arm_message(header, joints, velocities)
            messages[m.RUNTIME_STATE] = {"header": header, "state": self.sequence_state, "active_blocks": []}
            self.commands.publish_status()
        return messages

    def _feel(self, joints: Floats, position: Floats, velocity: Floats) -> None:
        force, torque = np.zeros(3), np.zeros(3)
        if self.contact is not None or self.load is not None:
            flange, rotation = self.kinematics.flange(joints)
            if self.contact is not None:
                force = rotation.T @ self.contact.force(position, velocity)
                torque = cross(rotation.T @ (position - flange), force)
            if self.load is not None:
                weight = self.load.weight(rotation)
                force, torque = force + weight, torque + cross(self.load.centre, weight)
        self._wrench = (force, torque)
