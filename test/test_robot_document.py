"""docs/robot.md explains every stop, and the service and device files say what they promise."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dcqfa_ros.commands.up import parse_options
from dcqfa_ros.safety.stops import StopCode

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "robot.md").read_text()
SYSTEMD = ROOT / "config" / "systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))


def test_every_stop_reason_is_explained_once_and_no_other() -> None:
    table = DOCUMENT.partition("## What each stop means")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_]+)` \| (.+?) \| (.+?) \|$", table, flags=re.MULTILINE)
    assert [code for code, _, _ in rows] == [code.value for code in StopCode], "the table follows safety/stops.py"


def test_it_says_that_this_is_no_safety_function() -> None:
    assert "**This software is not a safety function.**" in DOCUMENT


def test_the_parameters_shown_can_be_set() -> None:
    shown = yaml.safe_load(re.findall(r"```yaml\n# my_cell.yaml\n(.*?)```", DOCUMENT, flags=re.DOTALL)[0])
    shipped = yaml.safe_load((ROOT / "config" / "inovo_cell.yaml").read_text())
    for section, content in shown.items():
        known = shipped[section]["ros__parameters"]
        assert content["ros__parameters"].keys() <= known.keys(), section


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.name)
def test_units_stop_with_term_and_keep_a_bounded_journal(unit: Path) -> None:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    service = parser["Service"]
    assert service["KillSignal"] == "SIGTERM"
    assert service["LogNamespace"] == "dcqfa"
    assert float(service["TimeoutStopSec"]) >= 5
    journal = configparser.ConfigParser(interpolation=None)
    journal.read(SYSTEMD / "journald@dcqfa.conf")
    assert {"systemmaxuse", "maxretentionsec"} <= set(journal["Journal"])


def test_the_unit_of_the_cell_starts_what_can_be_brought_up() -> None:
    line = next(
        text for text in (SYSTEMD / "dcqfa-cell.service").read_text().splitlines() if text.startswith("ExecStart=")
    )
    inner = shlex.split(line.partition("=")[2])[-1]
    given = inner.partition('"$DCQFA" up ')[2]
    words = shlex.split(given.replace('"$PARAMETERS_FILE"', "f.yaml").replace("$OPTIONS", ""))
    assert parse_options(words).cell == "real"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here: units not verified")
@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.name)
def test_systemd_accepts_the_units(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    ours = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not ours, ours


def test_udev_rules_are_made_of_known_keys() -> None:
    keys = set()
    for line in (ROOT / "config" / "udev" / "99-dcqfa-cell.rules").read_text().splitlines():
        if line and not line.startswith("#"):
            for part in re.split(r",\s*", line):
                match = re.fullmatch(r'([A-Z]+)(?:[{(][^})]+[})])?(==|=|\+=|:=)"[^"]*"', part)
                assert match, part
                keys.add(match[1])
    assert keys <= {"SUBSYSTEM", "ATTRS", "ATTR", "ACTION", "DRIVER", "SYMLINK", "GROUP", "MODE", "ENV", "TEST"}
