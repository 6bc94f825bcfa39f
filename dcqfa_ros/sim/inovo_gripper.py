"""A Robotiq gripper as the Inovo controller shows it."""

from __future__ import annotations

from dcqfa_ros.drivers import inovo_messages as m


class EmulatedGripper:
    """A gripper that opens and closes at constant speed and stalls on an object. Not thread-safe."""

    def __init__(self, *, speed: float = 1.0, activation_s: float = 1.0) -> None:
        """Start open and not activated; ``speed`` is in full strokes per second."""
        self.speed, self.activation_s = speed, activation_s
        self.position, self.target = 1.0, 1.0
        self.activated, self.stalled = False, False
        self.object_at: float | None = None
        self._activating_s: float | None = None

    @property
    def reached(self) -> bool:
        """Whether it stands where it was asked to."""
        return abs(self.position - self.target) < 1e-6

    def activate(self) -> None:
        """Start the activation, which takes ``activation_s``."""
        if not self.activated and self._activating_s is None:
            self._activating_s = self.activation_s

    def power_off(self) -> None:
        """Lose the activation."""
        self.activated, self._activating_s, self.stalled = False, None, False
        self.target = self.position

    def go(self, opening: float) -> None:
        """Move to an opening, 0 closed .. 1 open."""
        self.target, self.stalled = min(1.0, max(0.0, opening)), False

    def step(self, seconds: float) -> bool:
        """Advance by ``seconds``; returns whether a movement has just ended."""
        if self._activating_s is not None:
            self._activating_s -= seconds
            if self._activating_s <= 0.0:
                self._activating_s, self.activated = None, True
            return False
        if not self.activated or self.reached or self.stalled:
            return False
        reach = self.speed * seconds
        position = self.position + max(-reach, min(reach, self.target - self.position))
        if self.object_at is not None and self.target < self.object_at <= self.position + 1e-9:
            position = max(position, self.object_at)
            self.stalled = position <= self.object_at + 1e-9
        self.position = position
        return self.stalled or self.reached

    def message(self, header: m.Message) -> m.Message:
        """Return its ``GripperState``."""
        return {
            "header": header,
            "position": self.position,
            "target_position": self.target,
            "current": 0.4 if self.stalled else 0.0,
            "stalled": self.stalled,
            "reached_goal": self.activated and self.reached,
            "activated": self.activated,
            "safety_switch_triggered": False,
        }
