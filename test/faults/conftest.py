"""Sizes of the fault injection and the table of its figures.

By default a part of about a minute runs, within the normal suite; ``DCQFA_FAULTS=full`` (``make test-faults``) runs the
figures in full. ``DCQFA_FAULTS_CHUNKS``, ``_DISCONNECTS`` and ``_COMMANDS``, and for the soak ``DCQFA_SOAK_S`` and
``DCQFA_SOAK_DISCONNECTS``, choose other sizes. Figures are printed at the end and written to ``DCQFA_FAULTS_JSON``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest

from test.figures import FULL, rows


@dataclass(frozen=True)
class Sizes:
    """How much is injected.

    Attributes:
        chunks: random or damaged byte chunks on the sensor's line.
        disconnects: of each device.
        commands: random commands on ROS 2.
        soak_s: length of the soak, s.
        soak_disconnects: of each device during the soak.
    """

    chunks: int
    disconnects: int
    commands: int
    soak_s: float
    soak_disconnects: int


@pytest.fixture(scope="session")
def sizes() -> Sizes:
    def number(name: str, part: int, full: int) -> int:
        return int(os.environ.get(f"DCQFA_{name}") or (full if FULL else part))

    return Sizes(
        chunks=number("FAULTS_CHUNKS", 20_000, 1_000_000),
        disconnects=number("FAULTS_DISCONNECTS", 1, 20),
        commands=number("FAULTS_COMMANDS", 1_000, 10_000),
        soak_s=float(os.environ.get("DCQFA_SOAK_S") or 3600),
        soak_disconnects=int(os.environ.get("DCQFA_SOAK_DISCONNECTS") or 200),
    )


class Figures:
    """Notes what was injected and what came of it."""

    def add(self, what: str, **figures: Any) -> None:
        """Add one row of the table, before anything is asserted about it."""
        rows.append({"what": what, **figures})


@pytest.fixture(scope="session")
def figures() -> Figures:
    return Figures()
