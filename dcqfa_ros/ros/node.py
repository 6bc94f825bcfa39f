"""Base class of every node: a lifecycle node whose plain-Python hooks may raise, and which always stops with a reason.

rclpy swallows what a transition callback raises (no log line, no clean-up), ends the process when a parameter callback
or any other callback raises, and its signal handler invalidates the context before a node can say why it stops. Nodes
derived from :class:`ManagedNode` have none of these troubles.
"""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from dcqfa_ros.ros.diagnostics import LIFECYCLE, Level, Status
from dcqfa_ros.ros.guarded import GuardedNode, Refused
from dcqfa_ros.ros.process import SetupInterrupted, run_node

__all__ = ["ManagedNode", "Refused", "run_node"]

_DIAGNOSTICS_PERIOD_S = 1.0
_SCOPES = {"inactive": "setup", "active": "start"}  # what callbacks create lives as long as the state they ran in
# Acknowledgements come with Fast DDS' heartbeats, up to 3 s late, so mostly this is a plain wait: long enough for every
# reader on this host to copy the last words out of this process' shared memory before it goes.
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
        self.started = time.time()
        self.__label = "unconfigured"
        self.__in_transition = False
        self.__fault_in_transition: str | None = None
        self.__running = False
        self.__stop_reason = ""
        self.__faulted = False
        self.create_guarded_timer(_DIAGNOSTICS_PERIOD_S, self.publish_diagnostics)
        self.declare()
        self.guard_own_services()
        self.check_attributes()

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

    def leave(self, reason: str) -> bool:  # noqa: ARG002 - for those who override it
        """Do what needs the executor before the node is shut down; called again and again until it returns True.

        At most 1.2 s are granted. Most nodes have nothing to do here.
        """
        return True

    # State -----------------------------------------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether the node works: from just before :meth:`start` until just before :meth:`stop`."""
        return self.__running

    @property
    def lifecycle_label(self) -> str:
        """Primary lifecycle state: unconfigured, inactive, active or finalized."""
        return self.__label

    @property
    def stop_reason(self) -> str:
        """Why the node last stopped or refused to start; empty while it is active and before the first stop."""
        return self.__stop_reason

    def lifecycle_status(self) -> Status:
        """Return the status every node reports about itself.

        Values: ``state`` (primary lifecycle state), ``instance`` (differs between any two processes), ``pid``,
        ``started`` (Unix time, s), ``stop_reason``, ``faulted`` (the node stopped itself), ``finished`` (it called
        :meth:`finish` with exit code 0: its work is done) and ``errors`` (exceptions caught so far).
        """
        values = {
            "state": self.__label,
            "instance": self.instance,
            "pid": str(os.getpid()),
            "started": repr(self.started),
            "stop_reason": self.__stop_reason,
            "faulted": str(self.__faulted).lower(),
            "finished": str(self.finish_reason is not None and self.exit_code == 0).lower(),
            "errors": str(self.errors_caught),
        }
        message = f"{self.__label}: {self.__stop_reason}" if self.__stop_reason else self.__label
        return Status(Level.ERROR if self.__faulted else Level.OK, LIFECYCLE, message, values)

    def publish_diagnostics(self) -> None:
        """Publish :meth:`lifecycle_status` and :meth:`status` now; done at 1 Hz anyway."""
        try:
            own = list(self.status())
        finally:
            self.publish_statuses([self.lifecycle_status()])
        if own:
            self.publish_statuses(own)

    @property
    def faulted(self) -> bool:
        """Whether the last stop was the node's own, by :meth:`fault`."""
        return self.__faulted

    # Stopping --------------------------------------------------------------------------------------------------------

    def fault(self, reason: str) -> None:
        """Stop now, publish ``reason`` and deactivate, so that the manager sees it; any thread.

        From a thread other than the executor's (a control loop), the stop is handed to the executor and this returns
        at once: such a thread must end its own work after calling.
        """
        if not self.on_executor_thread:
            self.post(lambda: self.fault(reason))
            return
        if self.__in_transition:
            self.__fault_in_transition = self.__fault_in_transition or reason
            return
        was_active = self.__label == "active"
        if not was_active and self.__faulted and reason == self.__stop_reason:
            return  # said already; a callback that raises at 30 Hz must not flood the log
        self.__faulted = True
        self.__halt(reason, Level.ERROR)
        if was_active:
            self.tolerate(self.trigger_deactivate, "deactivate")

    def finish(self, reason: str, exit_code: int = 0) -> None:
        """End the process: :func:`run_node` shuts the node down with ``reason`` and returns ``exit_code``."""
        self.exit_code = exit_code
        self.finish_reason = reason
        self.wake()

    def shut_down(self, reason: str) -> None:
        """Stop with ``reason``, clean up, finalize, and wait until the last words are delivered (at most 0.2 s)."""
        self.__halt(reason, Level.OK)
        for label, trigger in (
            ("active", self.trigger_deactivate),
            ("inactive", self.trigger_cleanup),
            ("unconfigured", self.trigger_shutdown),
        ):
            if self.__label == label:
                self.tolerate(trigger, f"leaving {label}")
        self.tolerate(lambda: self.flush_diagnostics(_FLUSH), "sending the last diagnostics")

    def __halt(self, reason: str, level: int) -> None:
        """Stop if running, and publish the reason; callbacks see the node inactive before :meth:`stop` begins."""
        was_running, self.__running = self.__running, False
        self.__stop_reason = reason
        if was_running:
            self.tolerate(lambda: self.stop(reason), "stop")
            self.release_scope("start")
        text = f"stopped: {reason}" if was_running else f"not active: {reason}"
        self.event(level, text, stop_reason=reason, was_active=str(was_running).lower())

    # Transitions, called by rclpy ------------------------------------------------------------------------------------

    def on_configure(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Run :meth:`setup`; on failure report it, run :meth:`teardown` and stay unconfigured."""
        try:
            self.in_setup = True
            try:
                problem = self.__attempt(self.setup, "setup")
            finally:
                self.in_setup = False
        except SetupInterrupted as interruption:
            problem = str(interruption)
        if problem is None:
            return self.__arrive("inactive")
        self.__refuse(f"setup failed: {problem}")
        self.__clean_up()
        return self.__arrive("unconfigured", TransitionCallbackReturn.FAILURE)

    def on_activate(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Run :meth:`start`; on failure report it, run :meth:`stop` and stay inactive."""
        # What exists now lives as long as the node. A full collection while it works would hold the interpreter for
        # 100 ms and miss control ticks, so it is done here, and later ones need not look at any of this again.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self.__running, self.__stop_reason, self.__faulted = True, "", False
        problem = self.__attempt(self.start, "start")
        if problem is None:
            return self.__arrive("active")
        self.__running = False
        self.__refuse(f"start failed: {problem}")
        self.tolerate(lambda: self.stop(self.__stop_reason), "stop")
        self.release_scope("start")
        return self.__arrive("inactive", TransitionCallbackReturn.FAILURE)

    def on_deactivate(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Run :meth:`stop` unless a fault or a signal has done so."""
        if self.__running:
            self.__halt("deactivated on request", Level.OK)
        return self.__arrive("inactive")

    def on_cleanup(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Run :meth:`teardown`."""
        self.__clean_up()
        return self.__arrive("unconfigured")

    def on_shutdown(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and clean up, from whatever state."""
        if self.__running:
            self.__halt("shut down on request", Level.OK)
        if self.__label != "unconfigured":
            self.__clean_up()
        return self.__arrive("finalized")

    def on_error(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and clean up after an error that rclpy met in a transition; the node can be configured again."""
        self.__halt("error in a lifecycle transition", Level.ERROR)
        self.__clean_up()
        return self.__arrive("unconfigured")

    def __attempt(self, hook: Callable[[], None], scope: str) -> str | None:
        """Run a hook; return None, or what went wrong."""
        self.enter_scope(scope)
        self.__in_transition, self.__fault_in_transition = True, None
        try:
            hook()
            self.check_attributes()
        except Exception as error:  # noqa: BLE001 - hooks raise to refuse
            return self.note_exception(error)
        finally:
            self.__in_transition = False
        return self.__fault_in_transition

    def __refuse(self, reason: str) -> None:
        self.__stop_reason, self.__faulted = reason, True
        self.event(Level.ERROR, reason, stop_reason=reason)

    def __clean_up(self) -> None:
        self.tolerate(self.teardown, "teardown")
        self.release_scope("setup")

    def __arrive(
        self, label: str, result: TransitionCallbackReturn = TransitionCallbackReturn.SUCCESS
    ) -> TransitionCallbackReturn:
        self.__label = label
        self.enter_scope(_SCOPES.get(label))
        self.publish_statuses([self.lifecycle_status()])
        return result
