"""``dcqfa devices`` describes this computer or a recorded one and explains the choice for a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcqfa_ros.cli import main


def test_a_recorded_device_is_described(tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--root", str(tree("orin_nx_8"))]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Jetson Orin NX 8 GB (jetson)")
    assert "compute capability 8.7" in text
    assert "36.4.3" in text
    assert "FP8: needs compute capability 8.9, this GPU has 8.7" in text


@pytest.fixture
def no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the user's cache and the models folders empty; returns a models folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setenv("DCQFA_MODELS", str(models))
    monkeypatch.setattr("dcqfa_ros.commands.devices.share_directory", lambda: tmp_path / "no_share")
    return models


def test_this_computer_is_described_as_json(no_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"]["fingerprint"]
    assert (document["choice"], document["bundles"]) == (None, [])
    names = [runtime["name"] for runtime in document["runtimes"]]
    assert names == ["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch_cuda"]
    assert document["runtimes"][0]["precisions"]["w4a4"]


def test_what_was_never_executed_is_marked(no_models: Path, tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--root", str(tree("orin_nx_16"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    marked = [
        lines[i - 1].split()[0] for i, line in enumerate(lines) if "compiled, never executed by its authors" in line
    ]
    assert marked == ["tensorrt", "tensorrt_rtx", "torch_cuda"]
    assert any("of this computer" in line and "note" in line for line in lines)


def test_every_bundle_of_the_models_folder_gets_a_choice(
    no_models: Path, tiny_bundle, tree, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("models/first", "models/second"):
        tiny_bundle(name)
    (no_models / "not_a_bundle").mkdir()
    arguments = ["devices", "--root", str(tree("cpu_arm")), "--runtime", "onnxruntime"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.count("choice: fp32 on onnxruntime (modelled)") == 2
    assert "dcqfa profile --config " in text
    assert main([*arguments, "--json"]) == 0
    bundles = json.loads(capsys.readouterr().out)["bundles"]
    assert [Path(bundle["folder"]).name for bundle in bundles] == ["first", "second"]
    for bundle in bundles:
        assert (bundle["choice"]["variant"], bundle["choice"]["runtime"]) == ("fp32", "onnxruntime")
        assert [c["accepted"] for c in bundle["choice"]["ranking"]] == [True, False]
        assert all(c["reason"] for c in bundle["choice"]["ranking"])


def test_a_damaged_bundle_is_named_and_the_others_are_still_described(
    no_models: Path, tiny_bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bundle("models/good")
    (tiny_bundle("models/bad", salt="other") / "bundle.yaml").write_text("schema_version: 1\n")
    assert main(["devices", "--json"]) == 1
    bad, good = json.loads(capsys.readouterr().out)["bundles"]
    assert (bad["bundle"], bad["choice"]) == ("bad", None)
    assert "bundle.yaml" in bad["error"]
    assert good["error"] is None and good["choice"]["ranking"]
    assert main(["devices"]) == 1
    assert "error" in capsys.readouterr().out


def test_budgets_and_margin_are_options(no_models: Path, tiny_bundle, tree, capsys) -> None:
    arguments = ["devices", "--root", str(tree("cpu_vnni")), "--bundle", str(tiny_bundle()), "--json"]
    options = ["--latency-ms", "20", "--memory-mb", "300", "--quality-margin", "0.1"]
    assert main([*arguments, *options]) == 0
    choice = json.loads(capsys.readouterr().out)["choice"]
    assert (choice["budget"]["latency_ms"], choice["budget"]["memory_bytes"]) == (20, 300 * 2**20)
    assert choice["quality_margin"] == 0.1
    assert main([*arguments, "--control-rate", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["choice"]["budget"]["latency_ms"] == 400


def test_the_choice_is_explained_with_every_variant(tree, tiny_bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = str(tree("cpu_arm"))
    arguments = ["devices", "--root", root, "--bundle", str(tiny_bundle()), "--runtime", "onnxruntime"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "choice: fp32 on onnxruntime" in text
    assert "rejected: layer blocks.0.mlp: W8A8" in text
    assert main([*arguments, "--memory-mb", "10", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["choice"]["variant"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--root", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--bundle", "no_such_bundle"], "no_such_bundle"),
        (["--runtime", "tensorflow"], "runtime 'tensorflow' is unknown; there are onnxruntime, openvino"),
        (["--bundle", "pusht_keypoints", "--quality-margin", "-1"], "quality_margin: expected 0 or more"),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dcqfa: error: ")
    assert words in error
    assert error.count("\n") == 1


def test_health_is_described_and_what_a_device_does_not_tell_is_named(no_models, tree, tmp_path, capsys) -> None:
    root = tree("orin_nx_16")
    zone = root / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    for name, text in (("type", "cpu-thermal"), ("temp", "61250"), ("trip_point_0_type", "passive")):
        (zone / name).write_text(text)
    (zone / "trip_point_0_temp").write_text("99000")
    assert main(["devices", "--root", str(root)]) == 0
    text = capsys.readouterr().out
    assert "health        61.2 degrees (cpu-thermal, slows down at 99), " in text
    assert "absent      no throttling" in text
    assert main(["devices", "--root", str(root), "--json"]) == 0
    health = json.loads(capsys.readouterr().out)["health"]
    assert health["temperatures"] == [{"sensor": "cpu-thermal", "celsius": 61.25, "limit": 99.0}]
    assert health["throttled"] is None


def test_health_can_be_watched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--watch", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (look,) = document["health"]
    assert look["memory_available_bytes"] > 0
    assert set(look) > {"time_s", "temperatures", "throttled", "load_1min", "absent"}


def test_what_the_selector_may_go_to_under_load_is_shown(no_models, tree, tiny_bundle, capsys) -> None:
    arguments = ["devices", "--root", str(tree("cpu_vnni")), "--bundle", str(tiny_bundle()), "--runtime", "onnxruntime"]
    assert main([*arguments, "--steps-allowed", "8"]) == 0
    text = capsys.readouterr().out
    assert "under load" not in text.replace("--steps", ""), "nobody has scored 8 steps, and fp32 saves nothing"
    assert main([*arguments, "--steps-allowed", "8", "--steps-unrecorded"]) == 0
    assert "under load    onnxruntime/w8a8 with 8 steps: modelled" in capsys.readouterr().out
    assert main([*arguments, "--steps-allowed", "8", "--steps-unrecorded", "--json"]) == 0
    ladder = json.loads(capsys.readouterr().out)["bundles"][0]["ladder"]
    assert [(rung["variant"], rung["steps"]) for rung in ladder["rungs"]] == [("w8a8", 16), ("w8a8", 8)]
    assert main([*arguments, "--steps-allowed", "1000"]) == 2
    assert "steps_allowed: expected numbers from 1 to 100" in capsys.readouterr().err
