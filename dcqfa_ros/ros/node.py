"""Base class of every node: a lifecycle node whose plain-Python hooks may raise, and which always stops with a reason.

rclpy swallows what a transition callback raises (no log line, no clean-up), ends the process when a parameter callback
or any other callback raises, and its signal handler invalidates the context before a node can say why it stops. Nodes
derived from :class:`ManagedNode` have none of these troubles.
"""

from __future__ import annotations

import gc
import os
import threading
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from dcqfa_ros.ros.diagnostics import LIFECYCLE, Level, Status
from dcqfa_ros.ros.guarded import GuardedNode, Refused, one_line
from dcqfa_ros.ros.process import SetupInterrupted, run_node

__all__ = ["ManagedNode", "Refused", "run_node"]

_DIAGNOSTICS_PERIOD_S = 1.0
_SCOPES = {"inactive": "setup", "active": "start"}  # what callbacks create lives as long as the state they ran in
_FLUSH = Duration(nanoseconds=200_000_000)


class ManagedNode(GuardedNode):
    """Lifecycle node with guarded callbacks, diagnostics and stop reasons.

    Subclasses set ``NODE_NAME`` and override :meth:`declare`, :meth:`setup`, :meth:`start`, :meth:`stop`,
    :meth:`teardown` and :meth:`status`. All of these run on the executor's thread. What the ``create_*`` methods make
    in ``setup()`` is destroyed after ``teardown()``; what is made while active is destroyed after ``stop()``.
    """

    NODE_NAME: ClassVar[str] = "node"

    def __init__(self, name: str | None = None, **kwargs: Any) -> None:
        """Create the node (unconfigured) and run :meth:`declare`; ``kwargs`` go to rclpy's ``LifecycleNode``."""
        super().__init__(name or self.NODE_NAME, **kwargs)
        self.exit_code = 0
        self.finish_reason: str | None = None
        self.in_setup = False
        self.instance = uuid.uuid4().hex
        self._label = "unconfigured"
        self._in_transition = False
        self._fault_in_transition: str | None = None
        self._running = False
        self._stop_reason = ""
        self._faulted = False
        self.create_timer(_DIAGNOSTICS_PERIOD_S, self.guard(self.publish_diagnostics), clock=self._steady)
        self.declare()
        self._guard_own_services()

    # Hooks -----------------------------------------------------------------------------------------------------------

    def declare(self) -> None:
        """Declare parameters (:meth:`add_parameter`, :meth:`on_parameter`); runs once, when the node is made."""

    def setup(self) -> None:
        """Acquire what the node needs (configure). Raise to refuse: the text is logged and :meth:`teardown` runs."""

    def start(self) -> None:
        """Begin the node's work (activate). Raise to refuse: :meth:`stop` runs and the node stays inactive."""

    def stop(self, reason: str) -> None:
        """Stop all work and motion now (deactivate, fault, signal). Must tolerate a half-done :meth:`start`."""

    def teardown(self) -> None:
        """Release everything (cleanup). Must tolerate a half-done :meth:`setup`."""

    def status(self) -> Sequence[Status]:
        """Return what to report at 1 Hz in ``diagnostics``."""
        return ()

    # State -----------------------------------------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether the node works: from just before :meth:`start` until just before :meth:`stop`."""
        return self._running

    @property
    def lifecycle_label(self) -> str:
        """Primary lifecycle state: unconfigured, inactive, active or finalized."""
        return self._label

    @property
    def stop_reason(self) -> str:
        """Why the node last stopped or refused to start; empty while it is active and before the first stop."""
        return self._stop_reason

    def lifecycle_status(self) -> Status:
        """Return the status every node reports about itself.

        Values: ``state`` (primary lifecycle state), ``instance`` (differs between any two processes), ``pid``,
        ``stop_reason``, ``faulted`` (the node stopped itself) and ``errors`` (exceptions caught so far).
        """
        values = {
            "state": self._label,
            "instance": self.instance,
            "pid": str(os.getpid()),
            "stop_reason": self._stop_reason,
            "faulted": str(self._faulted).lower(),
            "errors": str(self._error_count),
        }
        message = f"{self._label}: {self._stop_reason}" if self._stop_reason else self._label
        return Status(Level.ERROR if self._faulted else Level.OK, LIFECYCLE, message, values)

    def publish_diagnostics(self) -> None:
        """Publish :meth:`lifecycle_status` and :meth:`status` now; done at 1 Hz anyway."""
        try:
            own = list(self.status())
        finally:
            self._publish([self.lifecycle_status()])
        if own:
            self._publish(own)

    # Stopping --------------------------------------------------------------------------------------------------------

    def fault(self, reason: str) -> None:
        """Stop now, publish ``reason`` and deactivate, so that the manager sees it; any thread.

        From a thread other than the executor's (a control loop), the stop is handed to the executor and this returns
        at once: such a thread must end its own work after calling.
        """
        if threading.get_ident() != self._thread:
            self.post(lambda: self.fault(reason))
            return
        if self._in_transition:
            self._fault_in_transition = self._fault_in_transition or reason
            return
        was_active = self._label == "active"
        if not was_active and self._faulted and reason == self._stop_reason:
            return  # said already; a callback that raises at 30 Hz must not flood the log
        self._faulted = True
        self._halt(reason, Level.ERROR)
        if was_active:
            self._tolerate(self.trigger_deactivate, "deactivate")

    def finish(self, reason: str, exit_code: int = 0) -> None:
        """End the process from inside: :func:`run_node` shuts the node down with ``reason`` and returns ``exit_code``."""
        self.exit_code = exit_code
        self.finish_reason = reason
        self.wake()

    def shut_down(self, reason: str) -> None:
        """Stop with ``reason``, clean up, finalize, and wait until the last words are delivered (at most 0.2 s)."""
        self._halt(reason, Level.OK)
        for label, trigger in (
            ("active", self.trigger_deactivate),
            ("inactive", self.trigger_cleanup),
            ("unconfigured", self.trigger_shutdown),
        ):
            if self._label == label:
                self._tolerate(trigger, f"leaving {label}")
        self._tolerate(lambda: self._diagnostics.wait_for_all_acked(_FLUSH), "sending the last diagnostics")

    def destroy_node(self) -> None:
        """Destroy the node; calls of :meth:`event`, :meth:`post` and :meth:`wake` from other threads become harmless."""
        self._closed = True
        super().destroy_node()

    def _halt(self, reason: str, level: int) -> None:
        """Stop if running, and publish the reason; callbacks see the node inactive before :meth:`stop` begins."""
        was_running, self._running = self._running, False
        self._stop_reason = reason
        if was_running:
            self._tolerate(lambda: self.stop(reason), "stop")
            self._release("start")
        text = f"stopped: {reason}" if was_running else f"not active: {reason}"
        self.event(level, text, stop_reason=reason, was_active=str(was_running).lower())

    # Transitions, called by rclpy ------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run :meth:`setup`; on failure report it, run :meth:`teardown` and stay unconfigured."""
        try:
            self.in_setup = True
            try:
                problem = self._attempt(self.setup, "setup")
            finally:
                self.in_setup = False
        except SetupInterrupted as interruption:
            problem = str(interruption)
        if problem is None:
            return self._arrive("inactive")
        self._refuse(f"setup failed: {problem}")
        self._clean_up()
        return self._arrive("unconfigured", TransitionCallbackReturn.FAILURE)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run :meth:`start`; on failure report it, run :meth:`stop` and stay inactive."""
        # What exists now lives as long as the node. A full collection while it works would hold the interpreter for
        # 100 ms and miss control ticks, so it is done here, and later ones need not look at any of this again.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self._running, self._stop_reason, self._faulted = True, "", False
        problem = self._attempt(self.start, "start")
        if problem is None:
            return self._arrive("active")
        self._running = False
        self._refuse(f"start failed: {problem}")
        self._tolerate(lambda: self.stop(self._stop_reason), "stop")
        self._release("start")
        return self._arrive("inactive", TransitionCallbackReturn.FAILURE)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run :meth:`stop` unless a fault or a signal has done so."""
        if self._running:
            self._halt("deactivated on request", Level.OK)
        return self._arrive("inactive")

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run :meth:`teardown`."""
        self._clean_up()
        return self._arrive("unconfigured")

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and clean up, from whatever state."""
        if self._running:
            self._halt("shut down on request", Level.OK)
        if self._label != "unconfigured":
            self._clean_up()
        return self._arrive("finalized")

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and clean up after an error that rclpy met in a transition; the node can be configured again."""
        self._halt("error in a lifecycle transition", Level.ERROR)
        self._clean_up()
        return self._arrive("unconfigured")

    def _attempt(self, hook: Callable[[], None], scope: str) -> str | None:
        """Run a hook; return None, or what went wrong."""
        self._scope, self._in_transition, self._fault_in_transition = scope, True, None
        try:
            hook()
        except Exception as error:  # noqa: BLE001 - hooks raise to refuse
            self._error_count += 1
            self.get_logger().debug("".join(traceback.format_exception(type(error), error, error.__traceback__)))
            return one_line(error)
        finally:
            self._scope, self._in_transition = None, False
        return self._fault_in_transition

    def _refuse(self, reason: str) -> None:
        self._stop_reason, self._faulted = reason, True
        self.event(Level.ERROR, reason, stop_reason=reason)

    def _clean_up(self) -> None:
        self._tolerate(self.teardown, "teardown")
        self._release("setup")

    def _arrive(
        self, label: str, result: TransitionCallbackReturn = TransitionCallbackReturn.SUCCESS
    ) -> TransitionCallbackReturn:
        self._label = label
        self._scope = _SCOPES.get(label)
        self._publish([self.lifecycle_status()])
        return result
