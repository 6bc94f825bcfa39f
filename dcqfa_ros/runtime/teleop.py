"""From keys and gamepad axes to wanted twists: what the operator asks for, before any limit of the arm.

Whoever lets go stops: a gamepad moves the arm only while its dead-man button is held, a keyboard only while the
terminal repeats the key. Times are monotonic nanoseconds given by the caller; nothing here knows ROS or a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.errors import UserError

AXES = ("vx", "vy", "vz", "wx", "wy", "wz")
NO_AXIS = -1
OPEN, CLOSED = 1.0, 0.0
SCALE_STEP = 1.25
SCALE_RANGE = (0.05, 1.0)
_NS = 1_000_000_000
_ESCAPE = 0x1B


class TeleopError(UserError, ValueError):
    """A mapping that cannot work, or a message from a gamepad that does not fit its mapping."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asks for now.

    Attributes:
        direction: (6,) float64, share of full speed per axis (:data:`AXES`), each -1..1; zero when not engaged.
        engaged: the dead-man button is held, or a key repeats.
    """

    direction: NDArray[np.float64]
    engaged: bool


def _still() -> Wish:
    return Wish(np.zeros(6), engaged=False)


def twist(wish: Wish, linear_speed: float, angular_speed: float, scale: float) -> NDArray[np.float64]:
    """Return the twist (6,) in m/s and rad/s that ``wish`` asks for.

    Diagonal motion is no faster than motion along an axis: ``linear_speed`` (m/s) and ``angular_speed`` (rad/s) bound
    the norms, and ``scale`` (0..1) reduces both.
    """
    parts = []
    for direction, speed in ((wish.direction[:3], linear_speed), (wish.direction[3:], angular_speed)):
        norm = float(np.linalg.norm(direction))
        parts.append(direction * (speed * scale / max(1.0, norm)))
    return np.concatenate(parts)


def bounded_scale(scale: float) -> float:
    """Return ``scale`` within :data:`SCALE_RANGE`."""
    return min(max(scale, SCALE_RANGE[0]), SCALE_RANGE[1])


# Gamepad and SpaceMouse ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JoyMapping:
    """Which axes and buttons of ``sensor_msgs/Joy`` mean what.

    Attributes:
        axes: index of the axis per entry of :data:`AXES`; -1: that direction is not used.
        signs: factor per entry, 1 or -1 (or smaller, to slow one direction down).
        deadzone: deflection below which an axis counts as centred, 0 to below 1.
        dead_man: index of the button that must be held.
        open_button: index of the button that opens the gripper; -1: none.
        close_button: the same for closing.
    """

    axes: tuple[int, ...]
    signs: tuple[float, ...]
    deadzone: float
    dead_man: int
    open_button: int = NO_AXIS
    close_button: int = NO_AXIS

    def __post_init__(self) -> None:
        """Check the mapping.

        Raises:
            TeleopError: names the field, what was expected and what it is.
        """
        if len(self.axes) != len(AXES) or any(a < NO_AXIS for a in self.axes):
            raise TeleopError(f"joy.axes: expected 6 axis numbers ({', '.join(AXES)}), -1 for none, got {self.axes}")
        if all(a == NO_AXIS for a in self.axes):
            raise TeleopError("joy.axes: no axis is used: name at least one")
        if len(self.signs) != len(AXES) or not np.isfinite(self.signs).all() or np.abs(self.signs).max() > 1.0:
            raise TeleopError(f"joy.signs: expected 6 factors from -1 to 1, got {self.signs}")
        if not 0.0 <= self.deadzone < 1.0:
            raise TeleopError(f"joy.deadzone: expected 0 <= deadzone < 1, got {self.deadzone}")
        if self.dead_man < 0:
            raise TeleopError(f"joy.dead_man_button: expected a button number, got {self.dead_man}; it is not optional")
        buttons = [b for b in (self.dead_man, self.open_button, self.close_button) if b != NO_AXIS]
        if len(set(buttons)) != len(buttons) or min(buttons) < 0:
            raise TeleopError(f"joy buttons: expected different numbers, -1 for none, got {buttons}")


@dataclass
class Gamepad:
    """State of a gamepad or SpaceMouse behind ``joy``.

    The dead-man button counts only after it was seen released: a button stuck or held while the node starts, or while
    the gamepad comes back after a silence, moves nothing.
    """

    mapping: JoyMapping
    timeout_s: float
    messages: int = 0
    refused: int = 0
    _direction: NDArray[np.float64] = field(default_factory=lambda: np.zeros(6))
    _held: bool = False
    _trusted: bool = False
    _heard_ns: int | None = None
    _pressed: frozenset[int] = frozenset()

    def receive(self, axes: Sequence[float], buttons: Sequence[int], now_ns: int) -> float | None:
        """Take one message over; returns the gripper opening (0 or 1) when its button was pressed just now.

        Raises:
            TeleopError: too few axes or buttons, or a value that is not finite; the gamepad counts as let go.
        """
        if self.is_silent(now_ns):
            self._trusted = False
        self._heard_ns = now_ns
        self.messages += 1
        try:
            direction = self._deflection(axes)
            pressed = self._buttons(buttons)
        except TeleopError:
            self.refused += 1
            self._held, self._trusted = False, False
            raise
        held = self.mapping.dead_man in pressed
        self._trusted = self._trusted or not held
        self._held = held and self._trusted
        self._direction = direction
        new, self._pressed = pressed - self._pressed, pressed
        if not self._held:
            return None
        if self.mapping.close_button in new:
            return CLOSED
        return OPEN if self.mapping.open_button in new else None

    def _deflection(self, axes: Sequence[float]) -> NDArray[np.float64]:
        m = self.mapping
        values = np.asarray(axes, dtype=np.float64)
        highest = max(m.axes)
        if values.ndim != 1 or len(values) <= highest:
            raise TeleopError(f"joy: {len(values)} axes, but joy.axes uses number {highest}: is it another device?")
        used = np.array([0.0 if a == NO_AXIS else values[a] for a in m.axes])
        if not np.isfinite(used).all():
            raise TeleopError("joy: an axis is not a finite number")
        used = np.clip(used, -1.0, 1.0)
        beyond = np.maximum(np.abs(used) - m.deadzone, 0.0) / (1.0 - m.deadzone)
        return np.sign(used) * beyond * np.asarray(m.signs)

    def _buttons(self, buttons: Sequence[int]) -> frozenset[int]:
        highest = max(self.mapping.dead_man, self.mapping.open_button, self.mapping.close_button)
        if len(buttons) <= highest:
            raise TeleopError(f"joy: {len(buttons)} buttons, but number {highest} is used: is it another device?")
        return frozenset(i for i, value in enumerate(buttons) if value)

    def is_silent(self, now_ns: int) -> bool:
        """Whether nothing was heard for ``timeout_s``."""
        return self._heard_ns is None or now_ns - self._heard_ns > self.timeout_s * _NS

    def wish(self, now_ns: int) -> Wish:
        """What the operator asks for at ``now_ns``; nothing once the gamepad is silent."""
        if not self._held or self.is_silent(now_ns):
            return _still()
        return Wish(self._direction.copy(), engaged=True)


# Keyboard ------------------------------------------------------------------------------------------------------------


class KeyAction(Enum):
    """What a key asks for beside motion."""

    STOP = "stop"
    ARM = "arm"
    RESET = "reset"
    GRIPPER = "gripper"
    FASTER = "faster"
    SLOWER = "slower"
    FRAME = "frame"
    QUIT = "quit"


MOTION_KEYS: dict[str, tuple[int, float]] = {
    "w": (0, 1.0), "s": (0, -1.0), "a": (1, 1.0), "d": (1, -1.0), "r": (2, 1.0), "f": (2, -1.0),
    "u": (3, 1.0), "o": (3, -1.0), "i": (4, 1.0), "k": (4, -1.0), "j": (5, 1.0), "l": (5, -1.0),
}  # fmt: skip
"""Key -> index in :data:`AXES` and sign."""

ACTION_KEYS: dict[str, KeyAction] = {
    " ": KeyAction.STOP,
    "\x1b": KeyAction.STOP,
    "m": KeyAction.ARM,
    "x": KeyAction.RESET,
    "g": KeyAction.GRIPPER,
    "+": KeyAction.FASTER,
    "=": KeyAction.FASTER,
    "-": KeyAction.SLOWER,
    "t": KeyAction.FRAME,
    "q": KeyAction.QUIT,
}

KEYBOARD_HELP = """\
  w/s  x + -     u/o  turn about x + -     g      gripper open/close    m      take the command lease and arm
  a/d  y + -     i/k  turn about y + -     +/-    faster/slower         space  stop and disarm (Esc too)
  r/f  z + -     j/l  turn about z + -     t      world/tool frame      x      reset a latched stop
                                                                        q      quit
The arm moves while a key is held and repeats; a tap moves it a little."""


@dataclass
class Keyboard:
    """State of a keyboard behind a terminal, which says only that a key was pressed or repeats, never that it is up.

    Bytes that arrive together count as one key when they are all the same key, and as nothing otherwise: pasted text
    must neither move nor arm anything. Stop keys always count.
    """

    timeout_s: float
    _direction: NDArray[np.float64] = field(default_factory=lambda: np.zeros(6))
    _until_ns: int = 0

    def feed(self, data: bytes, now_ns: int) -> KeyAction | None:
        """Take over what the terminal sent; returns the action asked for, if any. Bytes without meaning are ignored."""
        keys = _keys(data)
        if not keys:
            return None
        if any(ACTION_KEYS.get(key) is KeyAction.STOP for key in keys):
            self.release()
            return KeyAction.STOP
        key = keys[0]
        if any(other != key for other in keys):
            self.release()
            return None
        if key in MOTION_KEYS:
            axis, sign = MOTION_KEYS[key]
            self._direction = np.zeros(6)
            self._direction[axis] = sign
            self._until_ns = now_ns + int(self.timeout_s * _NS)
            return None
        return ACTION_KEYS.get(key)

    def release(self) -> None:
        """Forget the key."""
        self._until_ns = 0

    def wish(self, now_ns: int) -> Wish:
        """What the operator asks for at ``now_ns``; nothing once the key stopped repeating."""
        return Wish(self._direction.copy(), engaged=True) if now_ns < self._until_ns else _still()


def _keys(data: bytes) -> list[str]:
    """Split bytes of a terminal into keys; sequences of function keys and non-ASCII characters become "?"."""
    keys: list[str] = []
    i = 0
    while i < len(data):
        byte, i = data[i], i + 1
        if byte == _ESCAPE and i < len(data) and data[i] in b"[O":  # an arrow or function key, not Esc
            i += 1
            while i < len(data) and not 0x40 <= data[i] <= 0x7E:
                i += 1
            i += 1
            keys.append("?")
        else:
            keys.append(chr(byte) if byte < 0x80 else "?")
    return keys
