"""The guided routine: an operator brings the arm to several orientations, readings are taken while it stands still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dcqfa_ros.safety.tool_load_files import Recorded
from dcqfa_ros.safety.tool_load_identification import (
    IdentificationError,
    Standstill,
    directions,
    excitation,
    standstill,
)

HINTS = (
    "the tool straight down",
    "the tool tilted by 60 to 90 degrees to the front",
    "the tool tilted by 60 to 90 degrees to the left",
    "the tool tilted by 60 to 90 degrees to the right",
    "the tool tilted by 60 to 90 degrees to the back, or turned by 180 degrees about its axis",
    "the tool as far up as the arm allows",
)
"""What to ask the operator for; any orientations do as long as they differ widely."""


class Readings(Protocol):
    """Where readings come from while the operator waits."""

    def record(self, count: int) -> list[Recorded]:
        """Return ``count`` readings that come from now on.

        Raises:
            UserError: readings or poses do not come; the message says which and what to start.
        """


def guide(
    source: Readings,
    ask: Callable[[str], str],
    say: Callable[[str], None],
    *,
    wanted: int = len(HINTS),
    samples: int = 200,
    sensor_rotation: tuple[float, ...] = (0.0, 0.0, 0.0, 1.0),
) -> tuple[list[Standstill], list[Recorded]]:
    """Lead through ``wanted`` standstills, or more where they do not determine the load.

    Args:
        source: of the readings.
        ask: shows a question and returns the answer; ``q`` ends early.
        say: shows a line.
        wanted: how many standstills to take.
        samples: readings per standstill.
        sensor_rotation: orientation of the sensor's frame in the tool frame.

    Returns:
        The standstills and all their readings.

    Raises:
        IdentificationError: the operator ended before the orientations determine the load, or tried three times as
            often as wanted.
        UserError: readings or poses do not come.
    """
    taken: list[Standstill] = []
    readings: list[Recorded] = []
    missing = "no standstill yet"
    for _ in range(3 * wanted):
        if len(taken) >= wanted and not missing:
            return taken, readings
        hint = HINTS[len(taken) % len(HINTS)]
        try:
            answer = ask(
                f"standstill {len(taken) + 1} of {wanted}: {hint}, free and still; Enter to record, q to end: "
            )
        except EOFError:
            answer = "q"
        if answer.strip().lower() == "q":
            break
        new = source.record(samples)
        one = standstill([r.orientation for r in new], [r.wrench for r in new])
        if one.problem:
            say(f"not used: {one.problem}; keep the arm still and the tool free, and record again")
            continue
        taken.append(one)
        readings += [Recorded(r.orientation, r.wrench, str(len(taken))) for r in new]
        force, torque, missing = excitation(directions(taken, sensor_rotation))
        say(
            f"recorded {one.readings} readings; condition {force:.3g} (mass), {torque:.3g} (centre of mass)"
            + (f"; still missing: {missing}" if missing else "")
        )
    if missing:
        raise IdentificationError(f"poor excitation after {len(taken)} standstills: {missing}")
    return taken, readings
