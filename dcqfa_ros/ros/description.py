"""What a graph is made of: the options of a bring-up, and the processes it starts. Nothing here imports ROS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError

AUTO = "auto"
PYTHON = "{python}"
"""As the first word of :attr:`NodeDescription.command`: the interpreter that runs the nodes."""


class BringupError(UserError, ValueError):
    """An option that cannot be brought up; the message names it and the possible values."""


@dataclass(frozen=True)
class TrialOptions:
    """A series of trials to run.

    Attributes:
        trials: in order, ``realtime:SEED`` or ``lockstep:SEED``.
        output: folder for records and report.
        overwrite: replace the records of an earlier series in that folder.
        parameters: further parameters of ``trial_node``.
    """

    trials: tuple[str, ...]
    output: Path
    overwrite: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BringupOptions:
    """What to bring up; see :data:`OPTIONS`. ``trials`` are run at once, and their end ends the run."""

    bundle: str = ""
    variant: str = AUTO
    cell: str = "pusht"
    namespace: str = ""
    autostart: bool = True
    record: bool = False
    rate: str = "realtime"
    restart: bool = False
    watchdog: bool = True
    teleop: bool = False
    parameters_file: str = ""
    remap: str = ""
    trials: TrialOptions | None = None


@dataclass(frozen=True)
class NodeDescription:
    """One process of the graph.

    Attributes:
        name: node name.
        module: Python module to run (``python -m module``); empty where ``command`` is given.
        parameters: parameters of this node; they replace those of the files.
        parameter_files: parameter files, later ones win.
        remappings: from -> to.
        env: additional environment variables.
        needed: whether losing it stops the graph.
        stops_first: on shutdown it is told first and given time to bring the others down in order.
        command: a whole command line, for what is no node of this package.
    """

    name: str
    module: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    parameter_files: tuple[Path, ...] = ()
    remappings: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    needed: bool = True
    stops_first: bool = False
    command: tuple[str, ...] = ()

    def command_line(self, python: str) -> list[str]:
        """Return :attr:`command` with the nodes' interpreter in its place."""
        return [python if word == PYTHON else word for word in self.command]


def node(
    name: str,
    files: Sequence[Path],
    parameters: Mapping[str, Any],
    *,
    module: str = "",
    needed: bool = True,
) -> NodeDescription:
    """Describe a node of this package; its module is ``dcqfa_ros.nodes.NAME`` unless ``module`` names another there."""
    return NodeDescription(name, f"dcqfa_ros.nodes.{module or name}", dict(parameters), tuple(files), needed=needed)
