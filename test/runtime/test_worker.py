"""The engine worker: same results as in-process, and nothing left behind however it or its parent ends."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dcqfa_ros.bundle.errors import BundleError
from dcqfa_ros.runtime.chunking import Continuation, Method
from dcqfa_ros.runtime.errors import EngineError, PolicyError, WorkerDiedError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.ort_pullback import open_pullback
from dcqfa_ros.runtime.policy import PolicyRuntime
from dcqfa_ros.runtime.worker import EngineWorker, describe_exit, worker_environment
from test.runtime.conftest import observation, tiny_files, tiny_spec

MakeBundle = Callable[..., Path]
DEADLINE_S = 20.0


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; False where it does not come true in time."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def maps(pid: int | str) -> str:
    """Return what is mapped into a process."""
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended and was reaped (a zombie still exists)."""
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def worker(policy_bundle: MakeBundle) -> Iterator[EngineWorker]:
    worker = EngineWorker(policy_bundle(), "w8a8")
    worker.start(DEADLINE_S)
    yield worker
    worker.close()


def test_worker_equals_the_policy_in_this_process(worker: EngineWorker) -> None:
    local = PolicyRuntime(tiny_spec()[0], OnnxRuntimeEngine(tiny_files(quantized=True)))
    for chunk in range(3):
        seen = observation(chunk)
        for steps, tokens in ((None, None), (4, 16)):
            actions = worker.predict(seen, 5, chunk, steps, tokens)
            assert actions.shape == (8, 2)
            assert np.array_equal(actions, local.predict(seen, [5], [chunk], steps, tokens)[0])


def test_facts_about_the_worker_are_reported(worker: EngineWorker) -> None:
    info = worker.info
    assert info.engine == "onnxruntime/w8a8"
    assert info.pid != os.getpid()
    assert not is_gone(info.pid)
    assert info.start_ms > info.load_ms > 0.0
    assert worker.rss_bytes() > 1_000_000
    assert worker.alive


def test_the_heap_of_a_worker_is_asked_for_in_huge_pages(worker: EngineWorker) -> None:
    environment = Path(f"/proc/{worker.info.pid}/environ").read_bytes().split(b"\0")
    assert any(entry.startswith(b"GLIBC_TUNABLES=") and b"glibc.malloc.hugetlb=" in entry for entry in environment)


def test_bad_input_is_refused_and_the_worker_stays_usable(worker: EngineWorker) -> None:
    bad = observation()
    bad["agent_position"][0, 1, 0] = np.nan
    with pytest.raises(PolicyError, match=r"'agent_position' is nan at element \(0,\) of history step 1"):
        worker.predict(bad, 0, 0)
    with pytest.raises(PolicyError, match="batch of 1, got 2"):
        worker.predict(observation(batch=2), 0, 0)
    with pytest.raises(PolicyError, match="denoising steps"):
        worker.predict(observation(), 0, 0, steps=1000)
    with pytest.raises(PolicyError, match="noise seed"):
        worker.predict(observation(), -1, 0)
    assert np.isfinite(worker.predict(observation(), 0, 0)).all()


def test_killed_worker_is_named_with_its_signal(worker: EngineWorker) -> None:
    pid = worker.info.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=rf"w8a8 \(pid {pid}\) was killed by signal 9 \(SIGKILL\)") as caught:
        worker.predict(observation(), 0, 0)
    assert caught.value.returncode == -signal.SIGKILL
    assert not worker.alive
    assert is_gone(pid)
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        worker.predict(observation(), 0, 1)


def test_death_between_two_chunks_is_noticed_without_a_prediction(worker: EngineWorker) -> None:
    os.kill(worker.info.pid, signal.SIGKILL)
    assert until(lambda: not worker.alive)


def test_worker_killed_while_it_computes_is_noticed_at_once(worker: EngineWorker) -> None:
    pid = worker.info.pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        worker.predict(observation(), 0, 0, timeout=DEADLINE_S)


def test_worker_that_does_not_answer_is_killed(worker: EngineWorker) -> None:
    pid = worker.info.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerDiedError, match=r"did not answer within 0\.1 s and was killed"):
        worker.predict(observation(), 0, 0, timeout=0.1)
    assert is_gone(pid)


def test_interrupt_terminate_and_hang_up_are_left_to_the_parent(worker: EngineWorker) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.info.pid, number)
    assert np.isfinite(worker.predict(observation(), 0, 0)).all()


def test_nothing_is_left_after_close(policy_bundle: MakeBundle) -> None:
    folder, descriptors = policy_bundle(), open_descriptors()
    worker = EngineWorker(folder, "fp32")
    pid = worker.start(DEADLINE_S).pid
    worker.predict(observation(), 0, 0)
    assert "memfd:dcqfa_chunk" in maps("self")
    worker.close()
    worker.close()
    assert is_gone(pid)
    assert "memfd:dcqfa_chunk" not in maps("self")
    assert open_descriptors() == descriptors
    with pytest.raises(PolicyError, match="not started, or closed"):
        worker.predict(observation(), 0, 0)


def test_dropped_worker_ends_without_close(policy_bundle: MakeBundle) -> None:
    worker = EngineWorker(policy_bundle(), "fp32")
    pid = worker.start(DEADLINE_S).pid
    del worker
    gc.collect()
    assert is_gone(pid)


def test_worker_outlives_the_thread_that_started_it(policy_bundle: MakeBundle) -> None:
    worker = EngineWorker(policy_bundle(), "fp32")
    thread = threading.Thread(target=worker.start)
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert worker.predict(observation(), 0, 0).shape == (8, 2)
    worker.close()


PARENT = """
import sys, time
from pathlib import Path
from dcqfa_ros.runtime.worker import EngineWorker
heavy = [name for name in ("onnx", "onnxruntime", "torch", "rclpy") if name in sys.modules]
worker = EngineWorker(Path(sys.argv[1]), "fp32")
if sys.argv[2] == "stop":
    import threading
    threading.Thread(target=worker.start, daemon=True).start()
    while worker._process is None:
        time.sleep(0.001)
    print(worker._process.pid, *heavy, flush=True)
else:
    print(worker.start().pid, *heavy, flush=True)
time.sleep(60)
"""


@pytest.fixture
def run_parent(policy_bundle: MakeBundle) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], list[str]]]]:
    """Start a process that starts a worker; returns it and what it printed: the worker's pid and heavy imports."""
    processes: list[subprocess.Popen[str]] = []
    folder = policy_bundle()

    def run(mode: str) -> tuple[subprocess.Popen[str], list[str]]:
        command = [sys.executable, "-c", PARENT, str(folder), mode]
        environment = worker_environment(os.environ)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().split()

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("mode", ["run", "stop"])
def test_worker_dies_with_a_parent_that_is_killed(mode: str, run_parent: Callable[..., tuple]) -> None:
    # "stop": the parent dies while the worker still loads
    parent, (pid, *_) = run_parent(mode)
    assert not is_gone(int(pid))
    parent.kill()
    parent.wait()
    assert until(lambda: is_gone(int(pid)))


def test_shared_memory_has_no_name_that_could_be_left_behind(run_parent: Callable[..., tuple]) -> None:
    parent, (pid, *_) = run_parent("run")
    for process in (parent.pid, int(pid)):
        assert "memfd:dcqfa_chunk" in maps(process)
        assert "/dev/shm" not in maps(process)


def test_process_that_owns_a_worker_imports_no_engine(run_parent: Callable[..., tuple]) -> None:
    _, (_, *heavy) = run_parent("run")
    assert heavy == []


def test_worker_imports_neither_ros_nor_torch(worker: EngineWorker) -> None:
    mapped = maps(worker.info.pid)
    assert "onnxruntime" in mapped
    assert "rclpy" not in mapped
    assert "torch" not in mapped


def test_unknown_variant_is_refused_before_a_process_is_started(policy_bundle: MakeBundle) -> None:
    with pytest.raises(BundleError, match="no variant 'int2'; there is fp32, w8a8"):
        EngineWorker(policy_bundle(), "int2")


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_damaged_file_is_refused_by_name(damage: str, policy_bundle: MakeBundle) -> None:
    folder = policy_bundle()
    file = folder / "variants/fp32/denoiser.onnx"
    if damage == "altered":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    worker = EngineWorker(folder, "fp32")
    with pytest.raises(PolicyError, match=r"variants/fp32/denoiser\.onnx"):
        worker.start(DEADLINE_S)
    assert not worker.alive
    worker.close()


def test_network_that_gives_nan_is_refused_while_starting(policy_bundle: MakeBundle) -> None:
    worker = EngineWorker(policy_bundle(poison=True), "fp32")
    with pytest.raises(PolicyError, match="gave action 'x' = nan"):
        worker.start(DEADLINE_S)


def test_unknown_runtime_is_refused_before_a_process_is_started(policy_bundle: MakeBundle) -> None:
    with pytest.raises(EngineError, match="runtime 'auto' is unknown; there are onnxruntime"):
        EngineWorker(policy_bundle(), "fp32", runtime="auto")


def test_runtime_that_cannot_be_loaded_is_reported_by_the_worker(
    policy_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken" / "openvino"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('openvino: made-up damage')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    worker = EngineWorker(policy_bundle(), "fp32", runtime="openvino")
    with pytest.raises(PolicyError, match="openvino"):
        worker.start(DEADLINE_S)
    assert not worker.alive
    worker.close()


def test_interpreter_that_cannot_run_is_refused(policy_bundle: MakeBundle, tmp_path: Path) -> None:
    descriptors = open_descriptors()
    worker = EngineWorker(policy_bundle(), "fp32", python=str(tmp_path / "no-python"))
    with pytest.raises(PolicyError, match="cannot start"):
        worker.start(DEADLINE_S)
    worker.close()
    assert open_descriptors() == descriptors


def test_worker_that_ends_while_it_loads_is_reported(policy_bundle: MakeBundle) -> None:
    worker = EngineWorker(policy_bundle(), "fp32", python="/bin/false")
    with pytest.raises(WorkerDiedError, match="ended with exit code 1"):
        worker.start(DEADLINE_S)


def test_worker_is_started_once(worker: EngineWorker) -> None:
    with pytest.raises(PolicyError, match="was started before"):
        worker.start()


def test_predict_before_start_is_refused(policy_bundle: MakeBundle) -> None:
    with pytest.raises(PolicyError, match="not started"):
        EngineWorker(policy_bundle(), "fp32").predict(observation(), 0, 0)


@pytest.mark.parametrize(
    ("inherited", "kept"),
    [
        ({}, False),
        ({"_ROS_WHEELS_BOOTSTRAP_COMPLETE": "1"}, False),
        ({"_ROS_WHEELS_BOOTSTRAP_COMPLETE": "1", "LD_LIBRARY_PATH": ""}, False),
        ({"_ROS_WHEELS_BOOTSTRAP_COMPLETE": "1", "LD_LIBRARY_PATH": "/lib"}, True),
    ],
)
def test_mark_of_the_ros_wheels_goes_only_with_the_library_path(inherited: dict[str, str], kept: bool) -> None:
    environment = worker_environment(inherited)
    assert ("_ROS_WHEELS_BOOTSTRAP_COMPLETE" in environment) is kept


def test_package_comes_first_on_the_worker_path_once() -> None:
    first = worker_environment({"PYTHONPATH": "/elsewhere"})["PYTHONPATH"].split(os.pathsep)
    assert (Path(first[0]) / "dcqfa_ros" / "runtime").is_dir()
    assert first[1:] == ["/elsewhere"]
    assert worker_environment(worker_environment({}))["PYTHONPATH"] == first[0]


def test_exits_are_described() -> None:
    assert describe_exit(3) == "ended with exit code 3"
    assert "signal 11 (SIGSEGV)" in describe_exit(-11)
    assert "lack of memory" in describe_exit(-9)
    assert "signal 63" in describe_exit(-63)


def test_info_is_plain_data(worker: EngineWorker) -> None:
    facts = {name: getattr(worker.info, name) for name in worker.info.__slots__}
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("method", [Method.SOFT, Method.GUIDED])
def test_a_continuation_reaches_the_worker_and_gives_the_same_as_in_this_process(
    policy_bundle: MakeBundle, method: Method
) -> None:
    files = tiny_files()
    local = PolicyRuntime(
        tiny_spec()[0], OnnxRuntimeEngine(files), lambda: open_pullback("onnxruntime", files["denoiser"], name="fp32")
    )
    worker = EngineWorker(policy_bundle(), "fp32", chunking=method)
    worker.start(DEADLINE_S)
    try:
        plain = worker.predict(observation(), 5, 0, actions=15)
        assert plain.shape == (15, 2) and np.array_equal(plain[:8], worker.predict(observation(), 5, 0, tokens=16))
        entry = Continuation(plain[3:].copy(), 4, 5, method)
        drawn = worker.predict(observation(1), 5, 1, continuation=entry, actions=15)
        expected = local.predict(observation(1), [5], [1], continuations=[entry], actions=15)[0]
        assert np.array_equal(drawn, expected)
        assert not np.array_equal(drawn, worker.predict(observation(1), 5, 1, actions=15)), "the continuation is kept"
        with pytest.raises(PolicyError, match=r"shape \('n', 2\), n from 1 to 16, got \(17, 2\)"):
            worker.predict(observation(), 0, 0, continuation=Continuation(np.zeros((17, 2), np.float32), 0, 1, method))
        with pytest.raises(PolicyError, match="actions: expected 1 to 15, got 16"):
            worker.predict(observation(), 0, 0, actions=16)
        assert np.array_equal(plain, worker.predict(observation(), 5, 0, actions=15))
    finally:
        worker.close()


def test_a_worker_of_integers_refuses_to_be_guided_when_it_starts(policy_bundle: MakeBundle) -> None:
    worker = EngineWorker(policy_bundle(), "w8a8", chunking=Method.GUIDED)
    with pytest.raises(PolicyError, match=r"denoiser.onnx: DequantizeLinear .* has no derivative"):
        worker.start(DEADLINE_S)
