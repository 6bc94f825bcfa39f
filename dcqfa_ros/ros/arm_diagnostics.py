"""Diagnostics of the node of a six-axis arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcqfa_ros.drivers.arm_protocol import ArmReadiness
from dcqfa_ros.drivers.inovo import InovoArm
from dcqfa_ros.ros.diagnostics import Level, Status
from dcqfa_ros.ros.generic_arm import TopicArm
from dcqfa_ros.runtime.arm_activity import Activity
from dcqfa_ros.runtime.arm_stream import ArmStream
from dcqfa_ros.watchdog.client import WatchdogClient


def arm_status(
    stream: ArmStream, driver: InovoArm | TopicArm, watchdog: WatchdogClient | None, more: Mapping[str, str]
) -> list[Status]:
    """Return the diagnostics of an arm: ``arm`` for the control, with ``more``, and ``driver`` for the device."""
    now, stage = stream.snapshot(), stream.stage
    problem = watchdog.problem() if watchdog is not None else None
    values = {
        "activity": now.activity.value, "contact": now.contact, "latched": str(now.latched).lower(),
        "stop_code": now.stop.code.value, "episode": str(now.episode), "source": stream.lease.holder,
        "twists_sent": str(stream.sent), "starved": str(stream.player.starved),
        "watchdog": "none" if watchdog is None else problem or "ready",
        **{f"clamped.{k}": str(v) for k, v in stage.limiter.clamped.items()},
        "clamped.joints": str(stage.joints.clamped if stage.joints else 0),
        "slowed_by_contact": str(stage.guard.slowed if stage.guard else 0),
        **{f"refused.{k}": str(v) for k, v in stream.refused.items()},
        **{f"stops.{k}": str(v) for k, v in stage.latch.counts.items()},
        **stream.ticker.report(), **more,
    }  # fmt: skip
    text = now.activity.value if stream.armed else f"disarmed: {now.stop.text}"
    level = Level.ERROR if now.latched else Level.WARN if problem else Level.OK
    state = driver.state()
    ready = state.readiness is ArmReadiness.READY
    facts = driver.report() if isinstance(driver, InovoArm) else {}
    message = f"{driver.name}: {state.readiness.value}{f', {state.detail}' if state.detail else ''}"
    return [Status(level, "arm", text, values), Status(Level.OK if ready else Level.WARN, "driver", message, facts)]


def arm_state(stream: ArmStream) -> tuple[int, str, dict[str, Any]]:
    """Return level, text and values of the interface ``arm_state``: whether the arm is armed, and why it stopped."""
    now = stream.snapshot()
    armed = now.activity is not Activity.DISARMED
    stopped = now.latched or not armed  # a retreat is both armed and stopped
    values = {
        "state": "armed" if armed else "disarmed",
        "activity": now.activity.value,
        "episode": now.episode,
        "code": now.stop.code.value if stopped else "",
        "reason": now.stop.text if stopped else "",
        "latched": now.latched,
        "contact": now.contact,
        "source": stream.lease.holder,
        "seed": 0,
        "rate": "realtime",
        "step": stream.player.consumed,
        "missed_ticks": stream.ticker.missed,
        "missed_ticks_in_all": stream.ticker.missed_in_all,
        "starved_ticks": stream.player.starved,
    }
    text = "armed" if armed else f"disarmed: {now.stop.text}"
    return Level.ERROR if now.latched else Level.OK, text, values
