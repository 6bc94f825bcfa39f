"""The exchange of variants: at a chunk boundary, never losing the old one, never keeping anybody waiting."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dcqfa_ros.bench.processes import children
from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.runtime.chunking import Method
from dcqfa_ros.runtime.errors import PolicyError, WorkerDiedError
from dcqfa_ros.runtime.swaps import ComputedBy, HostOptions, Outcome, Shortage, SwapResult
from dcqfa_ros.runtime.variant_host import VariantHost
from test.conftest import make_spec
from test.runtime.conftest import denoiser_model, observation, tiny_files, tiny_spec


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Host:
    """A host and the outcomes of its exchanges."""

    def __init__(self, folder: Path) -> None:
        self.results: list[SwapResult] = []
        self.told: list[str] = []
        self.held: list[str] = []
        self.options = HostOptions()
        self._came = threading.Condition()
        self.host = VariantHost(
            load_bundle(folder),
            threads=1,
            on_swap=self._note,
            on_active=self.told.append,
            on_hold=self.held.append,
            options=lambda: self.options,
        )

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


def test_the_variant_that_runs_is_loaded_anew_where_it_is_not_warm_for_the_method(hosted):
    host, _ = hosted
    host.load("fp32")
    old = host.host._worker.info.pid
    assert host.host.warm_for(Method.SOFT) and not host.host.warm_for(Method.GUIDED)
    host.options = HostOptions(chunking=Method.GUIDED)
    assert host.load("fp32").ok and host.host.warm_for(Method.GUIDED)
    new = host.host._worker.info.pid
    assert new != old and not Path(f"/proc/{old}").exists()
    assert host.load("fp32").ok and host.host._worker.info.pid == new, "it was warm"


@pytest.mark.parametrize("shortage", [Shortage.REFUSE, Shortage.STOP])
def test_a_variant_that_cannot_be_made_warm_for_a_method_runs_on_as_it_was(hosted, shortage):
    host, _ = hosted
    host.load("w8a8")
    short = shortage is Shortage.STOP
    host.options = HostOptions(chunking=Method.GUIDED, shortage=shortage, free_memory=lambda: int(short), reserve=2**50)
    failed = host.load("w8a8")
    assert not failed.ok and "no derivative" in failed.reason and failed.held is short
    assert host.host.active == "w8a8" and not host.host.warm_for(Method.GUIDED)
    assert host.host.predict(observation(), 1, 0, None)[1] == "w8a8"


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
    while host.host._loader.starting is None and time.monotonic() < deadline:
        time.sleep(0.001)
    host.host.close()
    assert host.host.active == "" and not host.host.busy
    with pytest.raises(PolicyError, match="shutting down"):
        host.host.request("fp32")


# parity, faults, memory


def reseal(folder: Path, variant: str, files: dict[str, bytes]) -> None:
    """Give a variant other files, and the bundle the hashes that belong to them."""
    _, contents = tiny_spec(alike=True)
    contents.update({f"variants/{variant}/{role}.onnx": data for role, data in files.items()})
    write_bundle(folder, make_spec(contents, alike=True), contents)


@pytest.fixture
def make_host(policy_bundle: Callable[..., Path]) -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def make(folder: Path | None = None) -> Host:
        hosts.append(Host(folder or policy_bundle()))
        return hosts[-1]

    yield make
    for host in hosts:
        host.host.close()


def test_a_wrong_but_well_formed_file_leaves_the_old_variant_running(make_host, policy_bundle):
    folder = policy_bundle(alike=True)
    reseal(folder, "w8a8", tiny_files() | {"denoiser": denoiser_model(False, sign=-1.0)})
    host = make_host(folder)
    assert host.load("fp32").ok
    failed = host.load("w8a8")
    assert not failed.ok and failed.active == "fp32" and failed.outcome is Outcome.FAILED
    assert "onnxruntime/w8a8 computes other actions than onnxruntime/fp32" in failed.reason
    assert host.host.predict(observation(), 1, 0, None)[1] == "fp32"


def test_weights_that_changed_since_the_bundle_was_opened_are_not_taken_for_those_described(make_host, policy_bundle):
    folder = policy_bundle(alike=True)
    host = make_host(folder)
    reseal(folder, "w8a8", tiny_files() | {"denoiser": denoiser_model(False, sign=-1.0)})
    assert host.load("fp32").ok
    assert "has changed since the bundle was opened" in host.load("w8a8").reason


def test_a_worker_killed_while_it_loads_leaves_the_old_variant_running(hosted):
    host, _ = hosted
    host.load("fp32")
    host.host.request("w8a8")
    until(lambda: host.host._loader.starting is not None and host.host._loader.starting._process is not None)
    host.host._loader.starting._process.kill()
    failed = host.outcome(2)
    assert not failed.ok and "SIGKILL" in failed.reason and failed.engine == "onnxruntime/fp32"
    assert host.load("w8a8").ok


def test_a_worker_that_hangs_while_it_loads_is_killed_in_time(make_host, tmp_path):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    host = make_host()
    host.load("fp32")
    host.options = HostOptions(python=str(sleeper), start_timeout_s=0.3)
    failed = host.load("w8a8")
    assert not failed.ok and "did not answer within 0.3 s and was killed" in failed.reason
    assert host.host.active == "fp32" and failed.load_ms < 5000


def test_a_newer_request_does_not_wait_for_one_that_hangs(make_host, tmp_path):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    host = make_host()
    host.options = HostOptions(python=str(sleeper))
    first = host.host.request("w8a8")
    until(lambda: host.host._loader.starting is not None)
    host.options = HostOptions()
    second = host.host.request("fp32")
    host.outcome(2)
    assert [(r.swap_id, r.outcome) for r in host.results] == [
        (first, Outcome.SUPERSEDED),
        (second, Outcome.SWITCHED),
    ]
    assert host.host.active == "fp32"


def test_a_memory_limit_is_kept_and_named(make_host):
    host = make_host()
    host.load("fp32")
    host.options = HostOptions(memory_limit=24 * 2**20)
    failed = host.load("w8a8")
    assert not failed.ok and failed.reason.endswith("(engine_memory_limit_mb is 24)")
    assert host.host.predict(observation(), 1, 0, None)[1] == "fp32"
    host.options = HostOptions(memory_limit=2**30)
    assert host.load("w8a8").ok


SHORT = {"free_memory": lambda: 100 * 2**20, "needed_memory": lambda _: 200 * 2**20, "reserve": 8 * 2**20}


def test_where_memory_is_short_the_exchange_is_refused_with_figures(make_host):
    host = make_host()
    host.load("fp32")
    host.options = HostOptions(**SHORT)
    failed = host.load("w8a8")
    assert "needs about 200 MiB, 100 MiB are free and 8 MiB are to stay free" in failed.reason
    assert "swap_when_memory_is_short is refuse" in failed.reason
    assert host.host.active == "fp32" and not host.held and not failed.held


def test_where_memory_is_short_the_old_variant_may_go_first(make_host):
    host = make_host()
    host.load("fp32")
    old = host.host._worker.info.pid
    host.options = HostOptions(shortage=Shortage.STOP, **SHORT)
    swapped = host.load("w8a8")
    assert swapped.ok and swapped.held and swapped.gap_ms > 50.0 and not Path(f"/proc/{old}").exists()
    assert len(host.held) == 1 and "onnxruntime/fp32 is closed before onnxruntime/w8a8 is loaded" in host.held[0]
    assert host.told == ["fp32", "", "w8a8"]


def test_the_old_variant_comes_back_where_it_went_for_one_that_cannot_be_loaded(make_host):
    host = make_host()
    host.load("fp32")
    (host.host.targets.bundle.folder / "variants/w8a8/encoder.onnx").write_bytes(b"")
    host.options = HostOptions(shortage=Shortage.STOP, **SHORT)
    failed = host.load("w8a8")
    assert not failed.ok and failed.held and failed.engine == "onnxruntime/fp32"
    assert "encoder.onnx" in failed.reason and failed.reason.endswith("onnxruntime/fp32 is back")
    assert host.told == ["fp32", "", "fp32"] and failed.gap_ms > 50.0
    assert host.host.predict(observation(), 1, 0, None)[1] == "fp32"


def test_what_was_measured_here_counts_instead_of_the_estimate(make_host):
    host = make_host()
    host.load("fp32")
    host.load("w8a8")
    host.options = HostOptions(free_memory=lambda: 2**30, needed_memory=lambda _: 2**40)
    again = host.load("fp32")
    assert again.ok and 10 * 2**20 < again.peak_bytes < 2**30


# other bundles


def test_another_bundle_of_the_same_contract_takes_over_and_is_named(make_host, policy_bundle):
    host = make_host(policy_bundle())
    other = policy_bundle(folder="other")
    host.load("fp32")
    before, _ = host.host.predict(observation(), 1, 0, None)
    label = f"{other}:fp32"
    assert host.load(label).ok and host.host.active == label and host.host.engine == f"onnxruntime/{label}"
    _, variant = host.host.predict(observation(), 1, 1, None)
    assert variant == label
    assert np.array_equal(before, host.host.predict(observation(), 1, 0, None)[0]), "the same weights"
    assert host.load("fp32").active == "fp32"
    assert host.load(f"{host.host.targets.bundle.folder}:w8a8").active == "w8a8", "its own bundle needs no name"


def test_a_bundle_of_another_contract_is_refused_by_field_before_anything_is_started(make_host, policy_bundle):
    host = make_host(policy_bundle())
    action = make_spec(tiny_spec()[1]).action.model_dump(mode="json") | {"rate_hz": 20.0}
    other = policy_bundle(folder="other", action=action)
    with pytest.raises(PolicyError, match=r"action\.rate_hz: 20\.0, expected 10\.0"):
        host.host.request(f"{other}:fp32")
    assert "no such bundle" in host.host.validate("nowhere:fp32")
    assert "has no variant 'w2a2'" in host.host.validate(f"{other}:w2a2")
    assert host.host.swaps == 0


# what computes what


def test_every_chunk_is_told_by_its_engine(hosted):
    host, _ = hosted
    host.load("fp32")
    for chunk in range(2):
        host.host.predict(observation(), 1, chunk, None)
    host.load("w8a8")
    host.host.predict(observation(), 1, 2, None)
    assert ComputedBy.parse(host.host.computed_by.text()) == ((0, "onnxruntime/fp32"), (2, "onnxruntime/w8a8"))
    host.host.predict(observation(), 1, 0, None)
    assert ComputedBy.parse(host.host.computed_by.text()) == ((0, "onnxruntime/w8a8"),)


def test_an_exchange_waits_for_one_chunk_at_most_while_chunks_are_asked_for_without_a_pause(hosted):
    host, _ = hosted
    host.load("fp32")
    halt, names = threading.Event(), []

    def compute() -> None:
        while not halt.is_set():
            names.append(host.host.predict(observation(), 1, len(names), None)[1])

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        assert host.load("w8a8").ok
        count = len(names)
        until(lambda: len(names) > count + 2)
    finally:
        halt.set()
        thread.join(10)
    assert names[0] == "fp32" and names[-1] == "w8a8"
    assert sum(a != b for a, b in itertools.pairwise(names)) == 1, "each chunk is of one variant"


def test_exchanges_leave_no_process_no_descriptor_and_no_thread(hosted):
    host, _ = hosted
    others = children()  # of tests before
    host.load("fp32")
    host.load("w8a8")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for variant in ("fp32", "w8a8"):
        host.load(variant)
    until(lambda: not host.host.busy)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert children() - others == {host.host._worker.info.pid}


def test_what_already_runs_is_not_loaded_again(hosted):
    host, _ = hosted
    host.load("fp32")
    pid = host.host._worker.info.pid
    assert host.load("fp32").ok and host.host._worker.info.pid == pid


def test_a_host_whose_workers_were_killed_takes_requests_again(hosted):
    host, _ = hosted
    host.load("fp32")
    host.host.abort()
    with pytest.raises(PolicyError, match="shutting down"):
        host.host.request("w8a8")
    host.host.reopen()
    assert host.host.active == "" and host.load("w8a8").active == "w8a8"


def test_what_had_to_go_comes_back_also_where_the_next_two_requests_come_to_nothing(make_host, tmp_path):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    host = make_host()
    host.load("fp32")
    (host.host.targets.bundle.folder / "variants/w8a8/encoder.onnx").write_bytes(b"")
    host.options = HostOptions(shortage=Shortage.STOP, python=str(sleeper), **SHORT)
    host.host.request("w8a8")
    until(lambda: host.host._loader.starting is not None)
    host.options = HostOptions(shortage=Shortage.STOP, **SHORT)
    host.host.request("w8a8")
    waited, failed = host.outcome(2), host.outcome(3)
    assert waited.outcome is Outcome.SUPERSEDED and waited.held and waited.engine == ""
    assert failed.outcome is Outcome.FAILED and failed.reason.endswith("onnxruntime/fp32 is back")
    assert failed.held and failed.gap_ms > 50.0 and host.told == ["fp32", "", "fp32"]


def test_an_exchange_that_the_end_cuts_short_is_told_and_blames_no_variant(hosted):
    host, _ = hosted
    host.host.request("fp32")
    until(lambda: host.host._loader.starting is not None)
    host.host.close()
    told = host.outcome(1)
    assert told.outcome is Outcome.SUPERSEDED and told.reason.startswith("the policy is shutting down")


def test_a_worker_that_died_unnoticed_is_replaced_by_one_of_the_same_variant(hosted):
    host, _ = hosted
    host.load("fp32")
    host.host._worker.abort()
    until(lambda: not host.host._worker.alive)
    again = host.load("fp32")
    assert again.ok and again.peak_bytes and host.host.predict(observation(), 1, 0, None)[1] == "fp32"
