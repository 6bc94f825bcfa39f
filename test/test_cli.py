"""The command line: what users see, in particular when something is wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros import cli
from dcqfa_ros.errors import UserError


class FakeEntryPoint:
    """An entry point whose command calls ``run``, or which fails to import."""

    def __init__(self, name: str, run: Callable[[], int], missing: str | None = None) -> None:
        self.name, self.run, self.missing = name, run, missing

    def load(self) -> Callable[[Any], None]:
        if self.missing:
            raise ModuleNotFoundError(f"No module named {self.missing!r}", name=self.missing)

        def register(subparsers: Any) -> None:
            parser = subparsers.add_parser(self.name, help=f"help of {self.name}")
            parser.set_defaults(func=lambda args: self.run())

        return register


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes entry points the only commands beside ``bundle``."""
    monkeypatch.delenv("DCQFA_DEBUG", raising=False)
    monkeypatch.setattr(cli, "COMMANDS", ("bundle",))

    def add(*points: FakeEntryPoint) -> None:
        monkeypatch.setattr(cli, "entry_points", lambda group: points if group == "dcqfa.commands" else ())

    return add


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


def test_help_lists_every_command_and_says_which_cannot_run(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(FakeEntryPoint("train", lambda: 0), FakeEntryPoint("export", lambda: 0, missing="torch"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "show or check a policy bundle" in out
    assert "help of train" in out
    assert "(not available: the Python package 'torch' is not installed;" in out


def test_a_command_runs_without_the_packages_of_the_others(command: Callable[..., None]) -> None:
    command(FakeEntryPoint("train", lambda: 7), FakeEntryPoint("export", lambda: 0, missing="torch"))
    assert cli.main(["train"]) == 7


def test_a_command_whose_package_is_missing_says_so(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ModuleNotFoundError("No module named 'torch'", name="torch")
    command(FakeEntryPoint("export", lambda: 0, missing="torch"), FakeEntryPoint("train", raising(missing)))
    for name in ("export", "train"):
        assert cli.main([name]) == 2
        err = capsys.readouterr().err
        assert err.startswith("dcqfa: error: the Python package 'torch' is not installed;")
        assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["bundle"], ["bundle", "show"], ["bundle", "show", "--nope"]])
def test_wrong_usage_ends_with_exit_code_2(
    command: Callable[..., None], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command()
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("config.yaml:\n  field x"), 2, "dcqfa: error: config.yaml: field x\n"),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("oh"), 1, "dcqfa: error: RuntimeError: oh (a defect of dcqfa; DCQFA_DEBUG=1 shows where it"),
    ],
)
def test_an_error_ends_in_one_line_without_a_traceback(
    command: Callable[..., None], error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command(FakeEntryPoint("train", raising(error)))
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err.startswith(text)


def test_developers_get_the_traceback(command: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    command(FakeEntryPoint("train", raising(UserError("oh"))))
    monkeypatch.setenv("DCQFA_DEBUG", "1")
    with pytest.raises(UserError):
        cli.main(["train"])


def test_the_reader_of_a_pipe_may_leave_early(tiny_bundle: Callable[..., Path]) -> None:
    command = f"{sys.executable} -m dcqfa_ros.cli bundle show {tiny_bundle()} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""


def test_start_up_imports_neither_ros_nor_engines_nor_torch(tiny_bundle: Callable[..., Path]) -> None:
    code = (
        "import sys; from dcqfa_ros.cli import main; main(['bundle', 'verify', sys.argv[1]]);"
        "print(sorted({'rclpy', 'onnx', 'onnxruntime', 'torch', 'training', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle())], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_is_available_and_has_help_with_an_example() -> None:
    def check(parser: argparse.ArgumentParser) -> int:
        found = 0
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    assert "example" in (child.epilog or ""), f"{child.prog}: no example in its help"
                    found += 1 + check(child)
        return found

    assert check(cli._parser([])) >= 3


def test_entry_points_of_the_installed_package_lead_to_modules_that_exist() -> None:
    names = {point.name: point.value for point in importlib.metadata.entry_points(group="dcqfa.commands")}
    root = Path(__file__).parents[1]
    for value in names.values():
        module = value.partition(":")[0].replace(".", "/")
        assert (root / f"{module}.py").is_file() or (root / module / "__init__.py").is_file()


def test_bundle_show_prints_what_the_policy_sees_and_does(
    tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_bundle()
    assert cli.main(["bundle", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in (
        "keypoints: low_dim 9x2 float32, px, frame table",
        "planar_position (x, y)",
        "ddim, 16 of 100",
        "w8a8",
    ):
        assert part in out
    assert cli.main(["bundle", "show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["observations"]["keypoints"]["shape"] == [9, 2]


def test_bundle_verify_reports_every_error_with_file_and_field(
    tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_bundle()
    assert cli.main(["bundle", "verify", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["errors"], report["files"]) == (True, [], 8)
    (folder / "variants/fp32/encoder.onnx").write_bytes(b"x" * 32)
    (folder / "variants/w8a8/denoiser.onnx").unlink()
    assert cli.main(["bundle", "verify", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [(error["file"], error["field"]) for error in report["errors"]] == [
        ("variants/fp32/encoder.onnx", "variants[0].files.encoder.sha256"),
        ("variants/w8a8/denoiser.onnx", "variants[1].files.denoiser"),
    ]
    assert cli.main(["bundle", "verify", str(folder)]) == 1
    assert "2 error(s); 6 files" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["show", "verify"])
def test_an_unknown_bundle_is_one_line_and_exit_code_2(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bundle", action, "no_such_bundle"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dcqfa: error: no_such_bundle: no such bundle; looked at no_such_bundle, ")
    assert captured.err.count("\n") == 1


def test_a_damaged_bundle_is_not_shown(tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_bundle()
    (folder / "variants/fp32/encoder.onnx").write_bytes(b"x" * 32)
    assert cli.main(["bundle", "show", str(folder)]) == 2
    assert f"{folder}/variants/fp32/encoder.onnx: variants[0].files.encoder.sha256" in capsys.readouterr().err
