"""The exchange of variants: at a chunk boundary, never losing the old one, never keeping anybody waiting."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.runtime.errors import PolicyError, WorkerDiedError
from dcqfa_ros.runtime.variant_host import SwapResult, VariantHost
from test.runtime.conftest import observation


class Host:
    """A host and the outcomes of its exchanges."""

    def __init__(self, folder: Path) -> None:
        self.results: list[SwapResult] = []
        self._came = threading.Condition()
        self.host = VariantHost(load_bundle(folder), threads=1, on_swap=self._note)

    def _note(self, result: SwapResult) -> None:
        with self._came:
            self.results.append(result)
            self._came.notify_all()

    def outcome(self, number: int) -> SwapResult:
        with self._came:
            assert self._came.wait_for(lambda: len(self.results) >= number, 30)
        return self.results[number - 1]

    def load(self, variant: str, runtime: str = "onnxruntime") -> SwapResult:
        number = len(self.results) + 1
        self.host.request(variant, runtime)
        return self.outcome(number)


@pytest.fixture
def hosted(policy_bundle: Callable[..., Path]) -> Iterator[tuple[Host, Path]]:
    folder = policy_bundle()
    host = Host(folder)
    yield host, folder
    host.host.close()


def test_the_requested_variant_computes_the_next_chunk_and_the_old_worker_is_gone(hosted):
    host, _ = hosted
    assert host.load("fp32").ok and host.host.active == "fp32"
    first, variant = host.host.predict(observation(), 1, 0, None)
    old = host.host._worker.info.pid
    assert host.load("w8a8").ok
    second, exchanged = host.host.predict(observation(), 1, 0, None)
    assert (variant, exchanged) == ("fp32", "w8a8")
    assert not np.array_equal(first, second), "the other network did not run"
    assert not Path(f"/proc/{old}").exists()


def test_a_damaged_file_or_description_leaves_the_old_variant_running(hosted):
    host, folder = hosted
    host.load("fp32")
    file = folder / "variants/w8a8/encoder.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    failed = host.load("w8a8")
    assert not failed.ok and failed.active == "fp32" and "encoder.onnx" in failed.reason
    file.write_bytes(whole)
    (folder / "bundle.yaml").write_text("schema_version: 1\n")
    assert not host.load("w8a8").ok
    assert host.host.predict(observation(), 1, 0, None)[1] == "fp32"


def test_the_engine_is_named_once_it_is_open_and_until_it_is_gone(hosted):
    host, _ = hosted
    assert host.host.engine == ""
    result = host.load("w8a8")
    assert (result.runtime, result.engine, host.host.engine) == ("onnxruntime", "onnxruntime/w8a8", "onnxruntime/w8a8")
    host.host.close()
    assert host.host.engine == ""


def test_a_runtime_that_cannot_be_opened_leaves_the_old_variant_running(hosted, tmp_path, monkeypatch):
    host, _ = hosted
    host.load("fp32")
    broken = tmp_path / "broken" / "openvino"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('openvino: made-up damage')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    failed = host.load("w8a8", "openvino")
    assert not failed.ok and "openvino" in failed.reason
    assert (failed.requested, failed.runtime, failed.engine) == ("w8a8", "openvino", "onnxruntime/fp32")
    assert host.host.predict(observation(), 1, 0, None)[1] == "fp32"


def test_an_unknown_runtime_is_refused_before_anything_is_started(hosted):
    host, _ = hosted
    with pytest.raises(PolicyError, match="runtime 'tensorflow' is unknown; there are onnxruntime"):
        host.host.request("fp32", "tensorflow")
    assert host.host.swaps == 0


def test_an_unknown_variant_is_refused_before_anything_is_started(hosted):
    host, _ = hosted
    with pytest.raises(PolicyError, match="w2a2"):
        host.host.request("w2a2")
    assert host.host.swaps == 0


def test_a_killed_worker_is_noticed_between_chunks_and_by_the_next_one(hosted):
    host, _ = hosted
    host.load("fp32")
    assert host.host.lost() is None
    os.kill(host.host._worker.info.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (lost := host.host.lost()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lost is not None and "'fp32'" in lost and host.host.active == ""
    host.load("fp32")
    os.kill(host.host._worker.info.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        host.host.predict(observation(), 1, 0, None)
    assert host.host.active == ""
    with pytest.raises(PolicyError, match="no variant"):
        host.host.predict(observation(), 1, 0, None)


def test_closing_while_a_variant_loads_does_not_wait_for_it(hosted):
    host, _ = hosted
    host.host.request("fp32")
    deadline = time.monotonic() + 10
    while host.host._starting is None and time.monotonic() < deadline:
        time.sleep(0.001)
    host.host.close()
    assert host.host.active == "" and not host.host.busy
    with pytest.raises(PolicyError, match="shutting down"):
        host.host.request("fp32")
