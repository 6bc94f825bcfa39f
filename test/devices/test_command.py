"""``dcqfa devices`` describes this computer or a recorded one and explains the choice for a bundle."""

from __future__ import annotations

import json

import pytest

from dcqfa_ros.cli import main


def test_a_recorded_device_is_described(tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--root", str(tree("orin_nx_8"))]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Jetson Orin NX 8 GB (jetson)")
    assert "compute capability 8.7" in text
    assert "36.4.3" in text
    assert "FP8: needs compute capability 8.9, this GPU has 8.7" in text


def test_this_computer_is_described_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"]["fingerprint"]
    assert document["choice"] is None
    assert document["runtimes"][0]["name"] == "onnxruntime"


def test_the_choice_is_explained_with_every_variant(tree, tiny_bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["devices", "--root", str(tree("cpu_arm")), "--bundle", str(tiny_bundle())]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "choice: fp32" in text
    assert "rejected: layer blocks.0.mlp: W8A8" in text
    assert main([*arguments, "--memory-mb", "10", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["choice"]["variant"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--root", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--bundle", "no_such_bundle"], "no_such_bundle"),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dcqfa: error: ")
    assert words in error
    assert error.count("\n") == 1
