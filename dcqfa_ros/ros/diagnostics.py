"""Diagnostics as plain values: the status a node reports and its translation to ``diagnostic_msgs``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

LIFECYCLE = "lifecycle"
"""Name of the status every node publishes about itself; see :meth:`ManagedNode.lifecycle_status`."""

EVENT = "event"
"""Name of the statuses that report something that happened."""


class Level(IntEnum):
    """Severity, with the numbers of ``diagnostic_msgs/DiagnosticStatus``."""

    OK = 0
    WARN = 1
    ERROR = 2
    STALE = 3


@dataclass(frozen=True)
class Status:
    """One line of diagnostics.

    Attributes:
        level: 0 fine, 1 warning, 2 error, 3 stale.
        name: what the status is about, without the node's name.
        message: one line for an operator.
        values: documented keys; numbers are given as text.
    """

    level: int
    name: str
    message: str
    values: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse levels that ``diagnostic_msgs`` does not know."""
        if not 0 <= self.level <= 3:
            raise ValueError(f"level: expected 0 to 3, got {self.level}")


@dataclass(frozen=True)
class Report:
    """A status as received, with the node that sent it."""

    node: str
    path: str
    status: Status


def to_message(node: str, path: str, statuses: Iterable[Status], stamp: Any) -> Any:
    """Return a ``diagnostic_msgs/DiagnosticArray``.

    Args:
        node: the node's name; statuses are called "node: name", as ``diagnostic_updater`` does.
        path: fully qualified node name, sent as hardware id, so that equal names in two namespaces stay apart.
        statuses: what to report.
        stamp: ``builtin_interfaces/Time``.
    """
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

    message = DiagnosticArray()
    message.header.stamp = stamp
    message.status = [
        DiagnosticStatus(
            level=bytes([s.level]),
            name=f"{node}: {s.name}",
            message=s.message,
            hardware_id=path,
            values=[KeyValue(key=str(k), value=str(v)) for k, v in s.values.items()],
        )
        for s in statuses
    ]
    return message


def from_message(message: Any) -> list[Report]:
    """Return the reports in a ``DiagnosticArray``; statuses not called "node: name" keep their name and no node."""
    reports = []
    for s in message.status:
        node, separator, name = s.name.partition(": ")
        if not separator:
            node, name = "", s.name
        level = min(3, s.level[0] if isinstance(s.level, bytes) else int(s.level))
        status = Status(level, name, s.message, {v.key: v.value for v in s.values})
        reports.append(Report(node, s.hardware_id, status))
    return reports
