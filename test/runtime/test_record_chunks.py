"""A bundle that records what its variants compute has even the first engine compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcqfa_ros.bundle.errors import BundleError
from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.cli import main
from dcqfa_ros.runtime.parity import ParityError, ParityLog, fixed_chunks
from dcqfa_ros.runtime.record_chunks import record_chunks
from dcqfa_ros.runtime.worker import EngineWorker
from test.conftest import make_spec
from test.runtime.conftest import denoiser_model, tiny_spec


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_only_the_recorded_chunks_are_added_and_a_worker_computes_them(policy_bundle: Callable[..., Path]) -> None:
    folder = policy_bundle()
    before, files = load_bundle(folder).spec, contents(folder)
    assert record_chunks(folder) == tuple(v.name for v in before.variants)
    after = load_bundle(folder)
    changed = {name for name, data in contents(folder).items() if files[name] != data}
    assert changed == {"bundle.yaml", "bundle.yaml.sha256"}
    old, new = before.model_dump(), after.spec.model_dump()
    assert all(len(variant["parity"].pop("fixed_chunks")) == 64 for variant in new["variants"])
    for variant in old["variants"]:
        del variant["parity"]["fixed_chunks"]
    assert new == old
    worker = EngineWorker(after, "w8a8")
    try:
        worker.start()
        parity, _ = ParityLog().check(
            after, "w8a8", "onnxruntime/w8a8", lambda seen, seed, chunk: worker.predict(seen, seed, chunk)
        )
    finally:
        worker.close()
    assert parity.against == "its bundle records" and parity.rms is not None and parity.rms < 1e-5


def test_what_is_recorded_is_kept_unless_it_is_asked_for_anew(policy_bundle: Callable[..., Path]) -> None:
    folder = policy_bundle()
    record_chunks(folder)
    written = contents(folder)
    assert record_chunks(folder) == () and contents(folder) == written
    edited = load_bundle(folder).spec
    diffusion = edited.diffusion.model_copy(update={"steps": 1 + edited.diffusion.steps % 2})
    files = {name: data for name, data in written.items() if name.startswith("variants/")}
    write_bundle(folder, edited.model_copy(update={"diffusion": diffusion}), files)
    assert record_chunks(folder, anew=True) == tuple(v.name for v in edited.variants)
    assert load_bundle(folder).spec.diffusion == diffusion


def test_the_first_engine_of_a_bundle_with_wrong_weights_is_refused(policy_bundle: Callable[..., Path]) -> None:
    folder = policy_bundle(alike=True)
    record_chunks(folder)
    recorded = {v.name: v.parity for v in load_bundle(folder).spec.variants}
    _, files = tiny_spec(alike=True)
    files["variants/fp32/denoiser.onnx"] = denoiser_model(False, sign=-1.0)
    spec = make_spec(files, alike=True)
    variants = tuple(v.model_copy(update={"parity": recorded[v.name]}) for v in spec.variants)
    write_bundle(folder, spec.model_copy(update={"variants": variants}), files)
    worker = EngineWorker(folder, "fp32")
    try:
        worker.start()
        with pytest.raises(ParityError, match=r"its bundle records.*record-chunks --anew"):
            ParityLog().check(
                worker.bundle, "fp32", "onnxruntime/fp32", lambda seen, seed, chunk: worker.predict(seen, seed, chunk)
            )
    finally:
        worker.close()


def test_a_damaged_bundle_is_left_alone(policy_bundle: Callable[..., Path]) -> None:
    folder = policy_bundle()
    (folder / "variants/w8a8/encoder.onnx").write_bytes(b"")
    written = contents(folder)
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        record_chunks(folder)
    assert contents(folder) == written


def test_the_command_tells_what_it_recorded(
    policy_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = policy_bundle()
    assert main(["bundle", "record-chunks", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recorded"] == [v.name for v in load_bundle(folder).spec.variants]
    assert main(["bundle", "record-chunks", str(folder)]) == 0
    assert "recorded already" in capsys.readouterr().out
    assert main(["bundle", "record-chunks", str(folder), "--threads", "0"]) != 0
    assert "--threads: expected at least 1, got 0" in capsys.readouterr().err


def test_recorded_numbers_are_those_of_the_fixed_observations(policy_bundle: Callable[..., Path]) -> None:
    folder = policy_bundle()
    record_chunks(folder)
    spec = load_bundle(folder).spec
    recorded = np.array(spec.variants[0].parity.fixed_chunks, np.float32).reshape(4, spec.action.executed, -1)
    constant = np.zeros((spec.action.executed, spec.action.dim), np.float32)
    assert recorded.shape == fixed_chunks(spec, lambda *_: constant + np.float32(spec.action.minimum)).shape
