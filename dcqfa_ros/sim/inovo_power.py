"""Power supply, safety circuits and drives of an emulated Inovo controller, with the times they take."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.sim.rosbridge_server import RequestError

Floats = NDArray[np.float64]

PSU_ENABLE_S = 5.0
ROBOT_ENABLE_S = 1.0
_DISABLED, _ENABLING, _ENABLED = 1, 2, m.ARM_ENABLED


class EmulatedPower:
    """What has to be on before the arm moves. Not thread-safe.

    ``active`` of a safety circuit means that motion is allowed, ``circuit_complete`` that it can be reset. Both
    circuits start open but complete, as after switching on.
    """

    def __init__(self, *, time_scale: float = 1.0, ready: bool = False) -> None:
        """Start off, or with everything on if ``ready``; ``time_scale`` shortens the times."""
        self._scale = time_scale
        self.estop_active = self.safe_stop_active = ready
        self.estop_complete = self.safe_stop_complete = True
        self.bus = m.BUS_ON if ready else "BUS_OFF"
        self.arm = _ENABLED if ready else _DISABLED
        self.fault_code = 0
        self._left_s = 0.0

    @property
    def allows_motion(self) -> bool:
        """Whether the drives execute demands."""
        return self.arm == _ENABLED and self.estop_active and self.safe_stop_active and not self.fault_code

    def step(self, seconds: float) -> None:
        """Advance by ``seconds``."""
        if self._left_s <= 0.0:
            return
        self._left_s -= seconds
        if self._left_s <= 0.0:
            if self.bus == "BUS_ENABLING":
                self.bus = m.BUS_ON
            elif self.arm == _ENABLING:
                self.arm = _ENABLED

    def press_estop(self) -> None:
        """Open the emergency stop circuit: power goes."""
        self.estop_active = self.estop_complete = False
        self._off()

    def release_estop(self) -> None:
        """Close the emergency stop circuit again; it still has to be reset."""
        self.estop_complete = True

    def trip(self) -> None:
        """Open the safe stop: the drives brake and switch off, the bus stays on."""
        self.safe_stop_active = False
        self._drives_off()

    def fail(self, code: int) -> None:
        """Report a fault: power goes."""
        self.fault_code = code
        self._off()

    def serve(self, service: str) -> bool:
        """Carry out a Trigger service; returns whether it is one of these.

        Raises:
            RequestError: it is refused.
        """
        if service == m.SAFE_STOP_TRIP:
            self.trip()
        elif service == m.SAFE_STOP_RESET:
            self._require(self.safe_stop_complete, "the safe stop circuit is open")
            self.safe_stop_active = True
        elif service == m.ESTOP_RESET:
            self._require(self.estop_complete, "the emergency stop circuit is open")
            self.estop_active = True
        elif service == m.RESET_FAULT:
            self.fault_code = 0
        elif service == m.PSU_ENABLE:
            self._require(self.estop_active, "the emergency stop is active")
            self._require(not self.fault_code, f"fault {self.fault_code}")
            if self.bus != m.BUS_ON:
                self._begin("BUS_ENABLING", self.arm, PSU_ENABLE_S)
        elif service == m.ROBOT_ENABLE:
            self._require(self.bus == m.BUS_ON, "the bus is off")
            self._require(self.estop_active and self.safe_stop_active, "a safety circuit is open")
            if self.arm != _ENABLED:
                self._begin(self.bus, _ENABLING, ROBOT_ENABLE_S)
        elif service in (m.ROBOT_DISABLE, m.ROBOT_RESET):
            self._drives_off()
        elif service == m.PSU_DISABLE:
            self._off()
        else:
            return False
        return True

    def messages(self, header: m.Message) -> dict[str, m.Message]:
        """Return the state topics."""
        powered = self.arm == _ENABLED
        return {
            m.PSU_STATUS: {
                "header": header,
                "voltage": 48.0 if self.bus == m.BUS_ON else 0.0,
                "current": 1.2 if powered else 0.1,
                "state": self.bus,
                "fault_code": self.fault_code,
            },
            m.ROBOT_STATE: {
                "header": header,
                "driver_state": m.DRIVER_ACTIVE if powered else "Idle",
                "drives_powered": powered,
                "can_enable": self.bus == m.BUS_ON and self.estop_active and self.safe_stop_active,
                "speed_limited": False,
            },
            m.ESTOP_STATE: {"active": self.estop_active, "circuit_complete": self.estop_complete},
            m.SAFE_STOP_STATE: {"active": self.safe_stop_active, "circuit_complete": self.safe_stop_complete},
        }

    def arm_message(self, header: m.Message, joints: Floats, velocities: Floats) -> m.Message:
        """Return the ``ArmState``."""
        state = m.JOINT_FAULT if self.fault_code else (2 if self.arm == _ENABLED else 1)
        joint = {
            "state": state,
            "age": 0,
            "status": 0,
            "torque": 0.0,
            "current": 0.0,
            "motor_temp": 35.0,
            "drive_temp": 33.0,
            "joint_temp": 31.0,
        }
        return {
            "header": header,
            "enabled": self.arm == _ENABLED,
            "state": self.arm,
            "joint_states": [
                {**joint, "position": p, "velocity": v}
                for p, v in zip(joints.tolist(), velocities.tolist(), strict=True)
            ],
        }

    def _begin(self, bus: str, arm: int, seconds: float) -> None:
        self.bus, self.arm = bus, arm
        self._left_s = max(seconds * self._scale, 1e-6)

    def _drives_off(self) -> None:
        self.arm = _DISABLED
        if self.bus != "BUS_ENABLING":
            self._left_s = 0.0

    def _off(self) -> None:
        self._left_s = 0.0
        self.bus, self.arm = "BUS_OFF", _DISABLED

    @staticmethod
    def _require(condition: bool, reason: str) -> None:
        if not condition:
            raise RequestError(reason)
