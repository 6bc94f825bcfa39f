"""`dcqfa teleop` from the command line: which parameter files reach the node, and what is refused before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dcqfa_ros.cli import main
from dcqfa_ros.commands import teleop
from dcqfa_ros.paths import find_config


def test_own_parameter_files_come_after_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text("/**/teleop_node: {ros__parameters: {scale: 0.1}}\n")
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(teleop, "_foreground", lambda command: commands.append(command) or 0)
    assert main(["teleop", "--parameters-file", f"{files[0]},{files[1]}"]) == 0
    (command,) = commands
    given = [command[i + 1] for i, word in enumerate(command) if word == "--params-file"]
    assert given == [str(find_config("inovo_cell")), *map(str, files)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "3"], "--scale: expected 0.05 to 1, got 3.0"),
        (["--namespace", "a b"], "namespace:= expects letters"),
        (["--parameters-file", "nowhere.yaml"], "nowhere.yaml: no such configuration"),
        (["--parameters-file", "{own}"], "did you mean /**/teleop_node?"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("/**/teleop_nod: {ros__parameters: {scale: 0.1}}\n")
    assert main(["teleop", *(a.format(own=own) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
