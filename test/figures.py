"""Figures that tests note, printed after the run (for fault injection, see ``test/faults``)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FULL = os.environ.get("DCQFA_FAULTS", "part") == "full"
rows: list[dict[str, Any]] = []


def print_figures(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures and write them as JSON where asked for."""
    if not rows:
        return
    terminalreporter.section(
        "figures of the fault injection" + ("" if FULL else " (a part; in full: make test-faults)")
    )
    for row in rows:
        terminalreporter.line(row["what"])
        for name, value in row.items():
            if name != "what":
                terminalreporter.line(f"    {name.replace('_', ' '):40} {_text(value):>14}")
    path = os.environ.get("DCQFA_FAULTS_JSON")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(rows, indent=2) + "\n")
        terminalreporter.line(f"written to {path}")


def _text(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
