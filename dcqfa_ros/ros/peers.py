"""What the lifecycle manager knows of the nodes it manages, from the status each sends about itself. No ROS here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

ACTIVE, INACTIVE, UNCONFIGURED, FINALIZED = "active", "inactive", "unconfigured", "finalized"


SETTLE_S = 0.5  # after an answered transition, reports of the state before it are taken for late ones


class Finding(Enum):
    """What can be wrong with a node that should be active."""

    SILENT = "silent"  # no sign of life
    RESTARTED = "restarted"  # another process answers under the name
    FAULTED = "faulted"  # it stopped itself
    ENDED = "ended"  # it shut down
    FINISHED = "finished"  # it shut down because its work was done
    DEACTIVATED = "deactivated"  # somebody else deactivated it


@dataclass
class Process:
    """One process heard under a node's name."""

    instance: str
    pid: str
    heard: float


@dataclass
class Peer:
    """One managed node.

    Attributes:
        name: node name, relative to the manager's namespace.
        path: fully qualified node name.
        needed: whether losing it stops the graph.
        state: lifecycle state last heard or brought about; empty while unknown.
        reason: stop reason last heard.
        wanted: whether the manager has activated it and wants it to stay so.
        busy: whether a transition is under way: it may be silent as long as that takes.
        process: the process the manager deals with.
        strangers: other processes heard under the same name.
    """

    name: str
    path: str
    needed: bool = True
    state: str = ""
    reason: str = ""
    faulted: bool = False
    finished: bool = False
    wanted: bool = False
    busy: bool = False
    process: Process | None = None
    strangers: dict[str, Process] = field(default_factory=dict)
    restarted: bool = False
    arrived: float = float("-inf")

    def arrive(self, state: str, now: float) -> None:
        """Note a state that the node has answered with; its own reports of earlier states may still be under way."""
        self.state, self.faulted, self.arrived = state, False, now

    def hear(self, values: Mapping[str, str], now: float, lost_after: float) -> None:
        """Take in a lifecycle status (see :meth:`ManagedNode.lifecycle_status`) that arrived at ``now``, seconds.

        A second process under the name is a stranger as long as the known one is alive, and its successor after that.
        """
        heard = Process(values.get("instance", ""), values.get("pid", "?"), now)
        if self.process is not None and heard.instance != self.process.instance:
            if now - self.process.heard <= lost_after:
                self.strangers[heard.instance] = heard
                return
            self.restarted = True
        self.process = heard
        self.strangers.pop(heard.instance, None)
        self.state = values.get("state", "")
        self.reason = values.get("stop_reason", "")
        self.faulted = values.get("faulted") == "true"
        self.finished = values.get("finished") == "true"

    def silent_for(self, now: float) -> float:
        """Return the seconds since the last sign of life; infinite when there has been none.

        An answered service call counts: right after the bring-up a node's reports may not have found their way yet.
        """
        return now - max(self.arrived, float("-inf") if self.process is None else self.process.heard)

    def excuse(self, seconds: float) -> None:
        """Push the last sign of life forward: the manager itself was not running for so long and could not listen."""
        self.arrived += seconds
        if self.process is not None:
            self.process.heard += seconds

    def rivals(self, now: float, window: float) -> list[Process]:
        """Return the processes heard under this name within ``window`` seconds, if there are two or more."""
        known = [] if self.process is None else [self.process]
        alive = [p for p in [*known, *self.strangers.values()] if now - p.heard <= window]
        return alive if len(alive) > 1 else []

    def finding(self, now: float, lost_after: float) -> Finding | None:
        """Return what is wrong with a node that should be active, None when nothing is."""
        if not self.wanted or self.busy:
            return None
        if self.restarted and self.state != ACTIVE:
            return Finding.RESTARTED
        if self.state == FINALIZED:
            return Finding.FINISHED if self.finished else Finding.ENDED
        if self.silent_for(now) > lost_after:
            return Finding.SILENT
        if self.state == ACTIVE:
            return None
        if self.faulted:
            return Finding.FAULTED
        if now - self.arrived <= SETTLE_S:
            return None
        # A deactivated node is inactive; an unconfigured one is most likely a successor of one that was never heard.
        return Finding.RESTARTED if self.state == UNCONFIGURED else Finding.DEACTIVATED

    def describe(self, finding: Finding, now: float) -> str:
        """Return one sentence for an operator."""
        because = f": {self.reason}" if self.reason else ""
        return {
            Finding.SILENT: f"{self.name} is lost: no sign of life for {self.silent_for(now):.1f} s",
            Finding.RESTARTED: f"{self.name} was restarted",
            Finding.FAULTED: f"{self.name} stopped itself{because}",
            Finding.ENDED: f"{self.name} ended{because}",
            Finding.FINISHED: f"{self.name} has finished{because}",
            Finding.DEACTIVATED: f"{self.name} was deactivated from outside{because}",
        }[finding]


def crowded(counts: Mapping[str, int], paths: Iterable[str]) -> list[str]:
    """Return those of ``paths`` that occur more than once in a graph with ``counts`` nodes per full name."""
    return [path for path in paths if counts.get(path, 0) > 1]
