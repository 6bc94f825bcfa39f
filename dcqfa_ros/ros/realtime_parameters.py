"""Parameters of a node's real-time scheduling: asked for by the operator, granted or refused by Linux."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dcqfa_ros.ros.diagnostics import Level
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.realtime import RealtimeSettings, apply, cover, scheduling, uncover


class RealtimeParameters:
    """Declares ``realtime_priority``, ``cpu_affinity`` and ``lock_memory`` on a node, and applies them.

    All are of one thread; the others of the process get the priority below (see
    :func:`~dcqfa_ros.runtime.realtime.cover`).

    What the system refuses is an event and a value in the diagnostics; the node goes on without it.
    """

    def __init__(self, node: ManagedNode, thread: str = "control") -> None:
        """Declare the parameters; ``thread`` names the one that they are for."""
        self._node, self._thread = node, thread
        self._refusals: list[str] = []
        self._entered = False
        add = node.add_parameter
        add("realtime_priority", 0, f"SCHED_FIFO priority of the {thread} thread, 1 to 99, one less for "
            "the node's others; 0: none", minimum=0, maximum=99, read_only=True)  # fmt: skip
        add("cpu_affinity", "", f"processors the {thread} thread may run on, such as 1 or 2,3; empty: any",
            read_only=True)  # fmt: skip
        add("lock_memory", False, "keep the process in memory (mlockall), so that nothing waits for a page",
            read_only=True)  # fmt: skip

    def settings(self) -> RealtimeSettings:
        """Read the parameters.

        Raises:
            RealtimeError: a parameter has a value that no system could grant.
        """
        value = self._node.parameter
        return RealtimeSettings.of(value("realtime_priority"), value("cpu_affinity"), value("lock_memory"))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Apply the parameters to the calling thread, and say what was refused.

        After the block the other threads have no priority any more.
        """
        self._enter()
        try:
            yield
        finally:
            self._entered = False
            uncover(int(self._node.parameter("realtime_priority")))

    def _enter(self) -> None:
        settings = self.settings()
        self._refusals = apply(settings)
        if not self._refusals:
            self._refusals = list(filter(None, [cover(settings.priority)]))
        for refusal in self._refusals:
            self._node.event(Level.WARN, f"{refusal}; the {self._thread} thread goes on without it")
        self._entered = True
        if settings != RealtimeSettings():
            self._node.event(Level.OK, f"{self._thread} thread: {scheduling().text}", scheduler=scheduling().text)

    def figures(self) -> dict[str, str]:
        """What was asked for and what was refused, for diagnostics.

        Of a control thread, what is in effect is in the ticker's report.

        Threads that have begun since the last call are covered, too.
        """
        priority = int(self._node.parameter("realtime_priority"))
        if self._entered and not self._refusals:
            self._refusals = list(filter(None, [cover(priority)]))
        return {
            "realtime_priority": str(priority),
            "realtime_refused": "; ".join(self._refusals),
        }
