"""The documents hold no placeholder, no dead link, and name only commands and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dcqfa_ros.ros.bringup import OPTIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = {
    *("up", "demo", "bundle", "devices", "eval", "bench", "train", "export"),
    *("teleop", "emulate", "tool-load", "calibrate"),
    *("subnet", "profile", "sampler", "search", "mixed", "pack"),
    *("baseline", "compare", "deviation"),
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_link_within_the_repository_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_no_placeholder_is_left(document: Path) -> None:
    assert not re.findall(r"\b(?:DEMO_OUTPUT|[A-Z]+_(?:TABLE|ROWS)|TBD)\b", document.read_text())


def test_the_readme_names_every_command_and_no_other() -> None:
    named = set(re.findall(r"\bdcqfa ([a-z][a-z-]+)", (ROOT / "README.md").read_text()))
    assert named == COMMANDS


def test_options_given_in_the_documents_exist() -> None:
    known = {o.name for o in OPTIONS} | {"python", "joy"}  # joy: the topic that a driver is remapped to
    for document in DOCUMENTS:
        used = set(re.findall(r"\b([a-z_]+):=", document.read_text()))
        assert used <= known, f"{document.name}: {used - known}"
