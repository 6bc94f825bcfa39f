"""selector_node: detects its device, ranks a bundle's variants and runtimes against budgets, publishes choice and why.

It runs on the policy's host. ``choice`` is latched: who joins late gets it. It is decided again when the node is
activated and whenever one of the budget parameters is set, also to the value it has. While active it watches policy,
arm and device, and proposes (``proposal``) or, where ``watch`` is ``switch``, chooses what is cheaper under load, and
what was chosen first afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.devices.capabilities import runtimes
from dcqfa_ros.devices.detect import detect
from dcqfa_ros.devices.ladder import build_ladder
from dcqfa_ros.devices.quality import MARGIN
from dcqfa_ros.devices.records import LocalRecords, RecordsError, load_records
from dcqfa_ros.devices.select import Choice, budget_for, choose
from dcqfa_ros.devices.watch import Action, Decision
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.ros.diagnostics import Level, Status, to_message
from dcqfa_ros.ros.node import ManagedNode, run_node
from dcqfa_ros.ros.watch_control import WatchControl
from dcqfa_ros.runtime.engines import AUTO, RUNTIMES, runtime_facts

STATUS_NAME = "selector"
BUDGETS = (
    "control_rate",
    "denoising_steps",
    "engine_threads",
    "budget_latency_ms",
    "budget_memory_mb",
    "quality_margin",
)
"""Parameters that decide again when they are set."""


class SelectorError(UserError):
    """The node's parameters name no bundle; says what to set."""


class SelectorNode(ManagedNode):
    """Publishes which variant of the bundle this device should run."""

    NODE_NAME: ClassVar[str] = "selector_node"

    def declare(self) -> None:
        """Declare the parameters."""
        add = self.add_parameter
        add("bundle", "", "bundle whose variants are ranked: a name in models/ or a folder", read_only=True)
        add("control_rate", 0.0, "actions per second; 0: the bundle's own", minimum=0.0, maximum=10_000.0)
        add("denoising_steps", 0, "denoising steps per chunk; 0: the bundle's own", minimum=0, maximum=10_000)
        add("engine_threads", 1, "threads of the engine", minimum=1, maximum=64)
        add("runtime", AUTO, f"runtime to consider: {', '.join(RUNTIMES)}, or {AUTO}: all", read_only=True)
        add("budget_latency_ms", 0.0, "time a chunk may take, ms; 0: that of its executed actions", minimum=0.0)
        add("budget_memory_mb", 0.0, "memory a variant may take, MiB; 0: half of the free memory", minimum=0.0)
        add("quality_margin", MARGIN, "a score may be lower than the best by this much", minimum=0.0, maximum=1e6)
        for name in BUDGETS:
            self.on_parameter(name, None, lambda _: self.post(self._decide))  # after the new value is stored
        self._watching = WatchControl(self, self._take, self._decide)
        self._spec: BundleSpec | None = None
        self._choice: Choice | None = None
        self._status: Status | None = None  # as published last
        self._notes: tuple[str, ...] = ()
        self._versions: dict[str, str | None] = {}

    def setup(self) -> None:
        """Read the bundle's description; its weights are the policy node's to check.

        Raises:
            SelectorError: no bundle is named.
            BundleError: the bundle is missing, damaged or not of this version.
            EngineError: parameter runtime names none.
        """
        if self.parameter("runtime") != AUTO:
            runtime_facts(self.parameter("runtime"))
        name = self.parameter("bundle")
        if not name:
            raise SelectorError("parameter bundle is empty, expected the name or the folder of a bundle")
        self._spec = load_bundle(find_bundle(name), verify=False).spec
        self._publisher = self.create_interface_publisher("choice")
        self._watching.setup()

    def start(self) -> None:
        """Decide, publish, and begin to watch."""
        self._decide()
        self._watching.start()

    def stop(self, reason: str) -> None:  # noqa: ARG002 - the base class publishes the reason
        """Watch no more; the choice stands."""
        self._watching.stop()

    def teardown(self) -> None:
        """Forget the bundle and the choice."""
        self._watching.teardown()
        self._spec, self._choice, self._status, self._notes = None, None, None, ()

    def _decide(self) -> None:
        """Look at the device, choose and publish; values that make no sense together leave the last choice standing."""
        if self._spec is None or not self.is_active:
            return
        device = detect()
        notes = list(device.notes)
        try:
            local = load_records()
        except RecordsError as error:
            local = LocalRecords()
            notes.append(f"measurements are not used: {error}")
        found = runtimes(device)
        common: dict[str, Any] = {
            "runtime": self.parameter("runtime"),
            "quality_margin": self.parameter("quality_margin"),
            "available": found,
        }
        try:
            budget = budget_for(
                self._spec,
                device,
                self.parameter("control_rate"),
                self.parameter("budget_latency_ms"),
                self.parameter("budget_memory_mb"),
            )
            choice = choose(
                self._spec,
                device,
                budget,
                local,
                steps=self.parameter("denoising_steps"),
                threads=self.parameter("engine_threads"),
                **common,
            )
            limits = self._watching.limits()
            ladder = build_ladder(
                self._spec,
                device,
                budget,
                local,
                choice=choice,
                steps_allowed=self._watching.steps_allowed,
                allow_unrecorded=self.parameter("steps_unrecorded"),
                load_margin=self.parameter("watch_quality_margin"),
                **common,
            )
        except UserError as error:
            self.event(Level.ERROR, f"no new choice: {error}", bundle=self._spec.name)
            return
        self._choice, self._notes = choice, tuple(notes)
        self._versions = {runtime.name: runtime.version for runtime in found}
        status = choice_status(choice, self._notes)
        self._publish(status)
        self.event(status.level, choice.reason, variant=choice.variant or "", device=choice.device)
        for note in self._notes:
            self.event(Level.WARN, note)
        self._watching.begin(ladder, limits)

    def _publish(self, status: Status) -> None:
        self._status = status
        stamp = self.get_clock().now().to_msg()
        self._publisher.publish(to_message(self.get_name(), self.get_fully_qualified_name(), [status], stamp))

    def _take(self, decision: Decision, present: str) -> None:
        """Publish what the watch decided as the choice."""
        if self._choice is not None:
            self._publish(watched_status(self._choice, decision, present, self._versions, self._notes))

    def status(self) -> Sequence[Status]:
        """Report the choice that stands, and the watch."""
        return [*([] if self._status is None else [self._status]), *self._watching.status()]


def choice_status(choice: Choice, notes: Sequence[str] = ()) -> Status:
    """Return the status published in ``choice``.

    Values: ``variant`` and ``runtime`` (both empty when nothing fits), ``runtime_version``, ``basis`` (measured,
    predicted, modelled), ``device``, ``budget_ms``, ``budget_mb``, ``steps``, ``threads``, ``quality_margin``,
    ``ranking`` (accepted ``<runtime>/<variant>``, best first), ``rejected``, ``candidate.<runtime>/<variant>`` (why it
    has its rank or was rejected), ``runtime.<variant>`` (the best runtime of a variant that fits),
    ``unavailable.<runtime>`` (why nothing runs on it) and ``notes``.
    """
    memory = choice.budget.memory_bytes
    values = {
        "variant": choice.variant or "",
        "basis": choice.basis or "",
        "device": choice.device,
        "runtime": choice.runtime or "",
        "runtime_version": choice.runtime_version or "",
        "budget_ms": f"{choice.budget.latency_ms:.1f}",
        "budget_mb": "" if memory is None else str(memory >> 20),
        "steps": str(choice.steps),
        "threads": str(choice.threads),
        "quality_margin": f"{choice.quality_margin:g}",
        "ranking": ",".join(c.engine for c in choice.ranking if c.accepted),
        "rejected": ",".join(c.engine for c in choice.ranking if not c.accepted),
        **{f"candidate.{c.engine}": c.reason for c in choice.ranking},
        **{f"runtime.{c.variant}": choice.runtime_of(c.variant) or "" for c in choice.ranking if c.accepted},
        **{f"unavailable.{name}": why for name, why in choice.left_out.items()},
        "notes": "; ".join(notes),
    }
    return Status(Level.OK if choice.variant else Level.ERROR, STATUS_NAME, choice.reason, values)


def watched_status(
    choice: Choice, decision: Decision, present: str, versions: Mapping[str, str | None], notes: Sequence[str] = ()
) -> Status:
    """Return the status published in ``choice`` when the watch changes what is to run.

    The values of :func:`choice_status`, where ``variant``, ``runtime``, ``runtime_version``, ``basis``, ``steps`` are
    those of the decision's target and ``ranking`` begins with it and with ``present``, the engine that runs: where the
    target is refused, that one goes on. ``watch`` (``cheaper`` or ``back``) and ``cause`` say that the watch decided.
    """
    target = decision.target
    if target is None:
        raise ValueError("a decision to stay changes no choice")
    status = choice_status(choice, notes)
    ranked = {c.engine: c for c in choice.ranking if c.accepted}
    order = dict.fromkeys((target.engine, *([present] if present in ranked else []), *ranked))
    known = next((c for c in choice.ranking if c.engine == target.engine), None)
    values = {
        **status.values,
        "variant": target.variant,
        "runtime": target.runtime,
        "runtime_version": versions.get(target.runtime) or "",
        "basis": (known.basis if known is not None else None) or "",
        "steps": str(target.steps),
        "ranking": ",".join(order),
        "watch": decision.action.value,
        "cause": decision.cause.value,
    }
    level = Level.WARN if decision.action is Action.CHEAPER else Level.OK
    return replace(status, level=level, message=f"{target.label}: {decision.reason}", values=values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node; see ``run_node`` for the exit code."""
    return run_node(SelectorNode, argv)


if __name__ == "__main__":
    sys.exit(main())
