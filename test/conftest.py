"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.bundle.write import file_spec, write_bundle
from test.figures import print_figures, rows
from test.repeats import mark, pytest_xdist_make_scheduler

__all__ = ["pytest_xdist_make_scheduler"]  # pytest finds it here

_deselected: set[str] = set()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so; tests interrupt children
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that may be repeated, and run modules that infer on OpenVINO in this process last.

    After that a SIGINT raised in the test process can end it with a segmentation fault (OpenVINO 2026.4.1, within
    pytest; a plain process that does the same is fine), and some tests raise one.
    """
    items.sort(key=lambda item: getattr(getattr(item, "module", None), "INFERS_ON_OPENVINO", False))
    mark(items)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Remember what was left out; a test never goes missing silently."""
    _deselected.update(item.nodeid for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: send home what was left out and what was noted."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"], output["figures"] = sorted(_deselected), json.dumps(rows)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the process that a worker of pytest-xdist reports to: take what it sends home."""
    output = getattr(node, "workeroutput", {})
    _deselected.update(output.get("deselected", ()))
    rows.extend(json.loads(output.get("figures", "[]")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print figures, and the tests that were left out (skipped ones are listed by pytest with their reasons)."""
    print_figures(terminalreporter)
    if _deselected:
        terminalreporter.section("not exercised: left out by -m or -k")
        for name in sorted(_deselected):
            terminalreporter.line(name)


ROLES = ("encoder", "timestep", "denoiser")


def make_spec(files: dict[str, bytes], alike: bool = False, **changes: Any) -> BundleSpec:
    """Return a small specification of a Push-T policy with the variants fp32 and w8a8 over ``files``.

    ``alike`` records that the variants compute the same; ``changes`` replace fields of the top level.
    """

    def variant(name: str, bits: int) -> dict[str, Any]:
        layer_bits = {"weight": bits, "activation": bits, "kind": "float" if bits == 32 else "int"}
        paths = {role: f"variants/{name}/{role}.onnx" for role in ROLES}
        return {
            "name": name,
            "description": f"made-up {name} weights",
            "precision": name,
            "opset": 21,
            "files": {role: file_spec(path, files[path]).model_dump() for role, path in paths.items()},
            "layers": [
                {
                    "layer": "blocks.0.mlp",
                    "searched": layer_bits,
                    "exported": layer_bits,
                    "executed": {"onnxruntime": layer_bits},
                }
            ],
            "size": {"parameters": 8, "paper_bytes": bits, "disk_bytes": 96},
            "quality": [
                {
                    "metric": "coverage",
                    "mean": 0.5,
                    "ci95": 0.1,
                    "first_seed": 100000,
                    "seeds": 50,
                    "steps": 16,
                    "command": "dcqfa eval",
                }
            ],
            "latency": [
                {
                    "device": "test",
                    "runtime": "onnxruntime",
                    "kind": "measured",
                    "threads": 1,
                    "steps": 16,
                    "p50_ms": 10.0,
                    "command": "dcqfa bench engine",
                }
            ],
            "parity": (whole if alike or bits == 32 else reduced) | export_parity,
        }

    whole = {"samples": 4, "max_abs": 1e-5, "rms": 1e-6, "tolerance_rms": 1e-4}
    reduced = {"samples": 4, "max_abs": 2.0, "rms": 0.5, "tolerance_rms": 1.0}  # a tiny network suffers much
    export_parity = {"export_rms": 1e-6, "tolerance_export_rms": 1e-4}
    scale = {"kind": "min_max", "scale": [1 / 256, 1 / 256], "offset": [-1.0, -1.0]}
    observation = {
        "type": "low_dim",
        "dtype": "float32",
        "units": "px",
        "frame": "table",
        "history": 2,
        "rate_hz": 10.0,
        "max_age_ms": 300.0,
        "normalizer": scale,
    }
    document = {
        "schema_version": 1,
        "name": "tiny",
        "task": "Push-T",
        "backbone": "diffusion_policy_t",
        "architecture": {"depth": 1, "heads": 1, "dim": 4, "ffn_dim": 8, "horizon": 16},
        "license": "Apache-2.0",
        "observations": {
            "keypoints": {**observation, "shape": [9, 2]},
            "agent_position": {**observation, "shape": [2]},
        },
        "action": {
            "space": "planar_position",
            "names": ["x", "y"],
            "units": ["px", "px"],
            "frame": "table",
            "mode": "absolute",
            "rotation": "none",
            "gripper": "none",
            "rate_hz": 10.0,
            "horizon": 16,
            "first_executed": 1,
            "executed": 8,
            "minimum": [0.0, 0.0],
            "maximum": [512.0, 512.0],
            "normalizer": scale,
        },
        "diffusion": {
            "train_timesteps": 100,
            "beta_schedule": "squared_cosine",
            "prediction": "epsilon",
            "clip_sample": 1.0,
            "sampler": "ddim",
            "steps": 16,
        },
        "training": {
            "data": "made up",
            "episodes": 1,
            "split": "none",
            "steps": 1,
            "batch": 1,
            "seed": 0,
            "command": "dcqfa train",
        },
        "default_variant": "fp32",
        "variants": [variant("fp32", 32), variant("w8a8", 8)],
    }
    return BundleSpec.model_validate(document | changes)


def make_files(salt: str = "") -> dict[str, bytes]:
    """Return made-up contents (no ONNX) for every file of ``make_spec``, different for every ``salt``."""
    return {
        f"variants/{variant}/{role}.onnx": f"{variant} {role} {salt}".encode().ljust(32, b"\0")
        for variant in ("fp32", "w8a8")
        for role in ROLES
    }


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Return a factory that writes a bundle of made-up files and returns its folder."""

    def make(name: str = "tiny", salt: str = "", **changes: Any) -> Path:
        folder = tmp_path / name
        files = make_files(salt)
        write_bundle(folder, make_spec(files, **changes), files)
        return folder

    return make
