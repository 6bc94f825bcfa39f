"""Named quality-of-service profiles of the graph and their translation to rclpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the table and its documentation are usable without a ROS 2 installation
    from rclpy.qos import QoSProfile

Reliability = Literal["reliable", "best_effort"]
RELIABILITIES: tuple[Reliability, ...] = ("reliable", "best_effort")


@dataclass(frozen=True)
class Profile:
    """One quality of service: history is always "keep last ``depth``"."""

    reliability: Reliability
    transient_local: bool
    depth: int
    purpose: str


PROFILES: dict[str, Profile] = {
    "sensor": Profile("best_effort", False, 5, "measurements of which only the newest counts"),
    "stream": Profile("reliable", False, 50, "observations and commands of which none may be lost (lockstep)"),
    "events": Profile("reliable", False, 50, "diagnostics and judgements"),
    "latched": Profile("reliable", True, 1, "the present value, also for those who join late"),
    "image": Profile("best_effort", False, 5, "pictures; a reader may be 150 ms late at 30 Hz and lose none"),
    "service": Profile("reliable", False, 10, "the default of ROS 2 services"),
}


def profile(name: str) -> Profile:
    """Return the profile called ``name``.

    Raises:
        KeyError: there is none; the message lists the names.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise KeyError(f"unknown QoS profile {name!r}; known: {', '.join(PROFILES)}") from None


def qos(name: str, reliability: str | None = None) -> QoSProfile:
    """Return the rclpy profile called ``name``; ``reliability`` ("reliable" or "best_effort") replaces its own.

    Best-effort publishers do not match reliable subscriptions, so a foreign driver may need the override.

    Raises:
        KeyError: unknown profile.
        ValueError: unknown reliability.
    """
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

    chosen = profile(name)
    kind = chosen.reliability if reliability is None else reliability
    if kind not in RELIABILITIES:
        raise ValueError(f"reliability: expected one of {', '.join(RELIABILITIES)}, got {kind!r}")
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=chosen.depth,
        reliability=ReliabilityPolicy.RELIABLE if kind == "reliable" else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if chosen.transient_local else DurabilityPolicy.VOLATILE,
    )
