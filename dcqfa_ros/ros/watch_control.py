"""The selector's watch as part of a node: parameters, samples, the decisions it publishes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from dcqfa_ros.devices.health import Health, HealthReader
from dcqfa_ros.devices.ladder import LOAD_MARGIN, Ladder
from dcqfa_ros.devices.watch import Action, Cause, Decision, Watch
from dcqfa_ros.devices.watch_limits import MIB, WatchLimits
from dcqfa_ros.ros.diagnostics import Level, Status, from_message, to_message
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.ros.watch_samples import SampleCollector

OFF, PROPOSE, SWITCH = MODES = ("off", "propose", "switch")
PARAMETERS = (
    *("watch", "watch_share_down", "watch_share_up", "watch_window_s", "watch_hold_down_s", "watch_hold_up_s"),
    *(
        "watch_dwell_s",
        "watch_prove_s",
        "watch_wait_most_s",
        "watch_starved_share",
        "watch_missed_share",
        "watch_temperature_c",
    ),
    *("watch_memory_low_mb", "watch_memory_ok_mb", "watch_quality_margin", "steps_allowed", "steps_unrecorded"),
)
"""Parameters that begin the watch anew when they are set."""
_KEPT_DECISIONS = 5

Switch = Callable[[Decision, str], None]


class WatchControl:
    """Watches policy, arm and device for a selector.

    Decisions are published as events and, latched, on ``proposal``; where ``watch`` is ``switch`` the owner is told.
    """

    def __init__(self, node: ManagedNode, switch: Switch, again: Callable[[], None]) -> None:
        """Declare the parameters on ``node``.

        Args:
            node: the node.
            switch: called with a decision that is to be carried out, and the engine that ran before.
            again: called when a parameter was set: the owner decides anew and calls :meth:`begin`.
        """
        self._node, self._switch = node, switch
        d = WatchLimits()
        add = node.add_parameter
        add("watch", PROPOSE, "what to do with what the watch finds: off, propose, or switch", choices=MODES)
        add("watch_period_s", 1.0, "time between two looks, s", minimum=0.1, maximum=4.0, read_only=True)
        add("watch_share_down", d.share_down, "go cheaper above this share of the budget (p95)", minimum=0.0)
        add("watch_share_up", d.share_up, "go back below this share of the budget (expected p95)", minimum=0.0)
        add("watch_window_s", d.window_s, "latencies and misses of this long count, s", minimum=0.5)
        add("watch_hold_down_s", d.hold_down_s, "for how long something must be too much, s", minimum=0.0)
        add("watch_hold_up_s", d.hold_up_s, "for how long going back must look possible, s", minimum=0.0)
        add("watch_dwell_s", d.dwell_s, "least time between two changes, s", minimum=0.0)
        add("watch_prove_s", d.prove_s, "going back failed if it is undone within this time, s", minimum=0.0)
        add("watch_wait_most_s", d.wait_most_s, "watch_hold_up_s doubles with failures up to this, s", minimum=0.0)
        add("watch_starved_share", d.starved_share, "share of the arm's ticks without an action; 0: any", minimum=0.0)
        add("watch_missed_share", d.missed_share, "share of the arm's ticks that are missed; 0: any", minimum=0.0)
        add("watch_temperature_c", 0.0, "go cheaper at this temperature; 0: at the device's own limit", minimum=0.0)
        add("watch_memory_low_mb", d.memory_low_bytes >> 20, "least free memory, MiB; 0: any", minimum=0)
        add("watch_memory_ok_mb", d.memory_ok_bytes >> 20, "memory to leave free when going back, MiB", minimum=0)
        add("watch_quality_margin", LOAD_MARGIN, "under load a score may be lower than the best by this", minimum=0.0)
        add("steps_allowed", [0], "denoising steps to choose from under load; [0]: none but the choice's")
        add("steps_unrecorded", False, "use steps with which no score is recorded")
        for name in PARAMETERS:
            if name != "watch":
                node.on_parameter(name, None, lambda _: node.post(again))
        node.on_parameter("watch", _among_modes, lambda _: node.post(again))
        self._forget()

    def _forget(self) -> None:
        self._watch: Watch | None = None
        self._decision: Decision | None = None
        self._told: tuple[Any, ...] = ()
        self._recent: deque[str] = deque(maxlen=_KEPT_DECISIONS)
        self._ladder: Ladder | None = None
        self._health: Health | None = None

    @property
    def mode(self) -> str:
        """``off``, ``propose`` or ``switch``."""
        return str(self._node.parameter("watch"))

    @property
    def steps_allowed(self) -> list[int]:
        """Numbers of steps that may be used, other than the choice's."""
        return [int(steps) for steps in self._node.parameter("steps_allowed") if steps != 0]

    def limits(self) -> WatchLimits:
        """Return the thresholds as the parameters are.

        Raises:
            WatchError: they make no sense together.
        """
        value = self._node.parameter
        low = int(value("watch_memory_low_mb")) * MIB
        return WatchLimits(
            share_down=value("watch_share_down"),
            share_up=value("watch_share_up"),
            window_s=value("watch_window_s"),
            hold_down_s=value("watch_hold_down_s"),
            hold_up_s=value("watch_hold_up_s"),
            dwell_s=value("watch_dwell_s"),
            prove_s=value("watch_prove_s"),
            wait_most_s=value("watch_wait_most_s"),
            starved_share=value("watch_starved_share"),
            missed_share=value("watch_missed_share"),
            temperature_c=value("watch_temperature_c"),
            memory_low_bytes=low,
            memory_ok_bytes=int(value("watch_memory_ok_mb")) * MIB,
            gpu_memory_low_bytes=low,
        )

    # lifecycle

    def setup(self) -> None:
        """Create the publisher, and listen."""
        self._forget()
        self._samples = SampleCollector(lambda text: self._node.event(Level.WARN, text))
        self._publisher = self._node.create_interface_publisher("proposal")
        self._node.create_guarded_subscription("diagnostics", self._on_diagnostics)

    def start(self) -> None:
        """Begin to look."""
        self._reader, self._looked_s = HealthReader(), time.monotonic()
        self._node.create_guarded_timer(float(self._node.parameter("watch_period_s")), self._look)

    def stop(self) -> None:
        """Look no more."""
        reader = getattr(self, "_reader", None)
        if reader is not None:
            reader.close()
        self._watch = None

    def teardown(self) -> None:
        """Forget everything."""
        self._forget()

    def begin(self, ladder: Ladder, limits: WatchLimits) -> None:
        """Watch from now on with this ladder; what was learnt with the one before is forgotten."""
        self._ladder, self._decision, self._told = ladder, None, ()
        self._watch = None
        if self.mode != OFF and ladder.rungs:
            self._watch = Watch(ladder, limits, performs=self.mode == SWITCH)
        text = "the watch is off" if self.mode == OFF else "nothing is decided yet"
        self._publish(Decision(Action.STAY, None, Cause.NONE, text))

    # at work

    def _on_diagnostics(self, message: Any) -> None:
        now = time.monotonic()
        for report in from_message(message):
            refusal = self._samples.take(report, now)
            if refusal is not None and self._watch is not None:
                self._watch.refused(refusal.engine, refusal.reason)

    def _look(self) -> None:
        now = time.monotonic()
        self._health, self._looked_s = self._reader.read(now - self._looked_s), now
        watch = self._watch
        if watch is None:
            return
        proposed, present = watch.asked, watch.present
        decision = self._decision = watch.feed(self._samples.sample(now, self._health))
        if decision.action is not Action.STAY:
            self._tell(decision, "" if present is None else present.label)
            if self.mode == SWITCH:
                self._switch(decision, "" if present is None else present.engine)
        elif proposed is not None and watch.asked is None:
            taken = watch.present is not None and watch.present == proposed
            text = f"{proposed.label} runs" if taken else f"no longer proposed: {proposed.label}; {decision.reason}"
            self._node.event(Level.OK, text, action=decision.action.value, cause=decision.cause.value)
            self._publish(decision)

    def _tell(self, decision: Decision, present: str) -> None:
        assert decision.target is not None
        verb = "switching" if self.mode == SWITCH else "proposed"
        way = "go cheaper" if decision.action is Action.CHEAPER else "go back"
        text = f"{verb}: {way} from {present} to {decision.target.label}: {decision.reason}"
        self._recent.append(f"{time.strftime('%H:%M:%S')} {text}")
        level = Level.WARN if decision.action is Action.CHEAPER else Level.OK
        self._node.event(level, text, **self._values(decision))
        self._publish(decision)

    def _values(self, decision: Decision) -> dict[str, str]:
        target = decision.target
        return {
            "action": decision.action.value,
            "cause": decision.cause.value,
            "variant": "" if target is None else target.variant,
            "runtime": "" if target is None else target.runtime,
            "steps": "" if target is None else str(target.steps),
            "watch": self.mode,
            **decision.figures,
        }

    def _publish(self, decision: Decision) -> None:
        node = self._node
        level = Level.WARN if decision.action is Action.CHEAPER else Level.OK
        health = {} if self._health is None else self._health.figures()
        status = Status(level, "proposal", decision.reason, {**self._values(decision), **health})
        stamp = node.get_clock().now().to_msg()
        self._publisher.publish(to_message(node.get_name(), node.get_fully_qualified_name(), [status], stamp))

    def status(self) -> list[Status]:
        """Report what is watched, the thresholds, when going back is allowed, and the last decisions."""
        if self._ladder is None:
            return []
        decision, watch, health = self._decision, self._watch, self._health
        asked = None if watch is None else watch.asked
        limits = {} if watch is None else watch.limits.as_values()
        values = {
            "watch": self.mode,
            "cause": "" if decision is None else decision.cause.value,
            "asked": "" if asked is None else asked.label,
            **({} if decision is None else decision.figures),
            **({} if health is None else health.figures()),
            "latencies": "each chunk's" if self._samples.per_chunk else "medians of the episode: slow to react",
            "ladder": "; ".join(rung.label for rung in self._ladder.rungs),
            "refused": "" if watch is None else "; ".join(f"{e}: {why}" for e, why in watch.refusals.items()),
            "wait_s": "" if watch is None else f"{watch.wait_s:g}",
            **{f"limit.{key}": text for key, text in limits.items()},
            **{f"left_out.{label}": why for label, why in self._ladder.left_out.items()},
            **{f"decision.{i}": text for i, text in enumerate(reversed(self._recent))},
        }
        if watch is None:
            text = "the watch is off" if self.mode == OFF else "nothing to watch: no variant fits this device"
            return [Status(Level.OK, "watch", text, values)]
        if decision is None:
            return [Status(Level.OK, "watch", "no sample yet", values)]
        worry = decision.cause not in (Cause.NONE, Cause.BLOCKED, Cause.RELIEF)
        return [Status(Level.WARN if worry else Level.OK, "watch", decision.reason, values)]


def _among_modes(value: str) -> str | None:
    return None if value in MODES else f"expected one of {', '.join(MODES)}, got {value!r}"
