"""The engine class on a TensorRT and a CUDA runtime that are not there: buffers, order of calls, capture, errors.

Nothing here runs on a GPU; what a real device does with these calls has not been exercised.
"""

from __future__ import annotations

import logging
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcqfa_ros.runtime import tensorrt_engine
from dcqfa_ros.runtime.cudart import CudaRuntime
from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.policy import PolicyRuntime
from dcqfa_ros.runtime.tensorrt_build import FLAVOURS
from dcqfa_ros.runtime.tensorrt_engine import TensorRtEngine
from dcqfa_ros.runtime.tensorrt_plan import WARM_UP_RUNS
from test.runtime.conftest import ACTED, HISTORY, OBSERVED, denoiser_model, observation, tiny_files, tiny_spec
from test.runtime.tensorrt_fake import HEADER, FakeCuda, FakeTensorRt

TOKENS = 9


class Bench:
    """One fake device and the engines opened on it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.cuda = folder, FakeCuda()
        self.tensorrt = FakeTensorRt(self.cuda)
        self.opened: list[TensorRtEngine] = []
        patch.setattr(tensorrt_engine, "load_flavour", lambda name: (FLAVOURS[name], self.tensorrt))

    def open(self, files: dict[str, bytes] | None = None, **options: Any) -> TensorRtEngine:
        files = tiny_files(quantized=True) if files is None else files
        engine = TensorRtEngine(files, "w8a8", self.folder, cuda=CudaRuntime(self.cuda), **options)  # type: ignore[arg-type]
        self.opened.append(engine)
        return engine


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(tmp_path / "engines", monkeypatch)
    yield made
    for engine in made.opened:
        engine.close()
    assert {kind: things for kind, things in made.cuda.live.items() if things} == {}


def draw(seed: int = 0, batch: int = 1, tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    noisy = generator.standard_normal((batch, tokens, ACTED)).astype(np.float32)
    return noisy, generator.uniform(-1, 1, (batch, HISTORY, OBSERVED)).astype(np.float32)


def chunk(engine: Engine, seed: int = 0, batch: int = 1, tokens: int = TOKENS) -> np.ndarray:
    noisy, seen = draw(seed, batch, tokens)
    times = engine.timestep_kv(np.array([3, 50]))[1:2].copy()
    return engine.denoise(noisy, times, engine.observation_kv(seen).copy()).copy()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 9), (1, 1), (3, 16)])
def test_results_are_those_of_the_processor(bench: Bench, quantized: bool, batch: int, tokens: int) -> None:
    files = tiny_files(quantized=quantized)
    ours, theirs = bench.open(files), OnnxRuntimeEngine(files)
    assert isinstance(ours, Engine)
    for seed in range(4):
        want = chunk(theirs, seed, batch, tokens)
        np.testing.assert_allclose(chunk(ours, seed, batch, tokens), want, atol=0.1 if quantized else 1e-5)


def test_a_whole_policy_runs_on_it(bench: Bench) -> None:
    spec, _ = tiny_spec()
    ours = PolicyRuntime(spec, bench.open(tiny_files()))
    theirs = PolicyRuntime(spec, OnnxRuntimeEngine(tiny_files()))
    ours.warm_up(4)
    np.testing.assert_allclose(
        ours.predict(observation(), [1], [0], 4), theirs.predict(observation(), [1], [0], 4), atol=0.05
    )


def test_a_step_is_one_launch_and_one_wait(bench: Bench) -> None:
    engine = bench.open()
    first = chunk(engine)
    noisy, seen = draw()
    times, encoded = engine.timestep_kv(np.array([3, 50]))[1:2].copy(), engine.observation_kv(seen).copy()
    bench.cuda.calls.clear()
    for _ in range(3):
        np.testing.assert_array_equal(engine.denoise(noisy, times, encoded), first)
    assert bench.cuda.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"] * 3
    assert engine.notes == []


def test_the_first_run_warms_up_then_captures_copies_and_execution(bench: Bench) -> None:
    engine = bench.open()
    bench.cuda.calls.clear()
    engine.observation_kv(draw()[1])
    run = ["cudaMemcpyAsync", "execute", "cudaMemcpyAsync"]
    calls = bench.cuda.calls[bench.cuda.calls.index("cudaMemcpyAsync") :]
    assert calls == [
        *[*run, "cudaStreamSynchronize"] * WARM_UP_RUNS,
        "cudaStreamBeginCapture",
        *run,
        "cudaStreamEndCapture",
        "cudaGraphInstantiateWithFlags",
        "cudaGraphDestroy",
        "cudaGraphLaunch",
        "cudaStreamSynchronize",
    ]
    assert not bench.tensorrt.first_execution_captured


def test_steps_keep_no_memory_and_make_no_arrays(bench: Bench) -> None:
    engine = bench.open()
    noisy, seen = draw(tokens=16)
    times, encoded = engine.timestep_kv(np.array([3]))[:1].copy(), engine.observation_kv(seen).copy()
    out = np.empty_like(noisy)
    plan = engine._plans["denoiser"]
    engine.denoise(noisy, times, encoded, out)
    (only,) = plan
    only.run = lambda: None  # type: ignore[method-assign]  # what the fake computes is not the engine's
    tracemalloc.start()
    try:
        for _ in range(3):
            engine.denoise(noisy, times, encoded, out)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(50):
            engine.denoise(noisy, times, encoded, out)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 512
    assert peak - before < 2048  # tuples of shapes; the smallest array header alone would add up


def test_out_is_written_and_returned(bench: Bench) -> None:
    engine = bench.open()
    noisy, seen = draw()
    times, encoded = engine.timestep_kv(np.array([3]))[:1].copy(), engine.observation_kv(seen).copy()
    want = engine.denoise(noisy, times, encoded).copy()
    out = np.zeros_like(noisy)
    assert engine.denoise(noisy, times, encoded, out) is out
    np.testing.assert_array_equal(out, want)


def test_results_outlive_the_engine(bench: Bench) -> None:
    engine = bench.open()
    encoded = engine.observation_kv(draw()[1])
    want = encoded.copy()
    engine.close()
    np.testing.assert_array_equal(encoded, want)  # page-locked memory would be gone


def test_every_shape_is_built_once_and_few_are_kept(bench: Bench) -> None:
    engine = bench.open()
    engine.prepare(1, TOKENS, 2)
    assert bench.tensorrt.builds == 3
    for tokens in (*range(1, 13), TOKENS):
        chunk(engine, tokens=tokens)
    assert bench.tensorrt.builds == 3 + 11  # the 12 token counts, of which one was there
    assert len(engine._plans["denoiser"]) == 8
    assert bench.tensorrt.alive == {"engine": 10, "context": 10}
    engine.close()
    assert bench.tensorrt.alive == {"engine": 0, "context": 0}


def test_a_second_engine_takes_what_the_first_one_built(bench: Bench) -> None:
    first = chunk(bench.open())
    built = bench.tensorrt.builds
    np.testing.assert_array_equal(chunk(bench.open()), first)
    assert bench.tensorrt.builds == built == 3


@pytest.mark.parametrize("change", ["version", "multiprocessors", "capability", "weights"])
def test_another_version_device_or_network_is_built_anew(bench: Bench, change: str) -> None:
    chunk(bench.open())
    files = tiny_files(quantized=change != "weights")
    if change == "version":
        bench.tensorrt.__version__ = "10.16.0"
    elif change == "multiprocessors":
        bench.cuda.attributes[16] = 16
    elif change == "capability":
        bench.cuda.attributes[76] = 6
    chunk(bench.open(files))
    assert bench.tensorrt.builds > 3


def test_a_damaged_cached_engine_is_named_and_built_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    first = chunk(bench.open())
    for path in bench.folder.glob("*.engine"):
        path.write_bytes(path.read_bytes()[:-9])
    engine = bench.open()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(chunk(engine), first)
    assert bench.tensorrt.builds == 6
    assert len(engine.notes) == 3
    assert all("its sidecar says" in note and "built again" in note for note in engine.notes)


def test_a_whole_engine_that_cannot_be_loaded_is_built_again_once(bench: Bench) -> None:
    chunk(bench.open())
    engine = bench.open()
    real = bench.tensorrt.Runtime.deserialize_cuda_engine
    refused: list[int] = []

    def refuse_once(self: Any, plan: bytes) -> Any:
        if not refused:
            refused.append(1)
            self.logger.log(1, "built with another driver")
            return None
        return real(self, plan)

    bench.tensorrt.Runtime.deserialize_cuda_engine = refuse_once
    engine.observation_kv(draw()[1])
    assert bench.tensorrt.builds == 4
    assert "built with another driver" in engine.notes[0]


@pytest.mark.parametrize("failure", ["loading", "context", "buffer"])
def test_without_memory_a_sound_entry_stays(bench: Bench, failure: str) -> None:
    chunk(bench.open())
    files = {path: path.read_bytes() for path in bench.folder.iterdir()}
    engine = bench.open()
    if failure == "buffer":
        bench.cuda.fail["cudaMalloc"] = 2
    elif failure == "context":
        bench.tensorrt.context_fails = True
    else:

        def starve(self: Any, plan: bytes) -> None:
            self.logger.log(1, "[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)")

        bench.tensorrt.Runtime.deserialize_cuda_engine = starve
    with pytest.raises(EngineError, match=r"(?i)memory"):
        engine.observation_kv(draw()[1])
    assert bench.tensorrt.builds == 3
    assert {path: path.read_bytes() for path in bench.folder.iterdir()} == files
    assert engine.notes == []


def test_a_shape_that_cannot_be_loaded_costs_none_of_those_there_are(bench: Bench) -> None:
    engine = bench.open()
    for tokens in range(1, 9):
        chunk(engine, tokens=tokens)
    held = list(engine._plans["denoiser"])
    bench.cuda.fail["cudaMalloc"] = 2
    with pytest.raises(EngineError, match="cudaMalloc failed"):
        chunk(engine, tokens=9)
    assert list(engine._plans["denoiser"]) == held
    del bench.cuda.fail["cudaMalloc"]
    chunk(engine, tokens=1)  # used now: the next to go is 2
    chunk(engine, tokens=9)
    kept = {plan.inputs["noisy"].shape[1] for plan in engine._plans["denoiser"]}
    assert kept == {1, 3, 4, 5, 6, 7, 8, 9}


def test_an_engine_that_was_just_built_and_cannot_be_loaded_is_an_error(bench: Bench) -> None:
    bench.tensorrt.load_fails = True
    with pytest.raises(EngineError, match=r"encoder\.onnx \(B=1\): the engine cannot be loaded: version tag mismatch"):
        bench.open().observation_kv(draw()[1])
    assert bench.tensorrt.builds == 1


@pytest.mark.parametrize("how", ["begin", "enqueue", "end", "instantiate", "told"])
def test_where_capture_is_refused_runs_go_on_and_the_reason_is_kept(bench: Bench, how: str) -> None:
    want = chunk(bench.open())
    engine = bench.open()
    if how == "enqueue":
        bench.tensorrt.refuses_capture = True
    elif how == "told":
        context = type(bench.tensorrt.Runtime(None).deserialize_cuda_engine(_plan_bytes()).create_execution_context())
        context.is_stream_capturable = lambda self, stream: False
    else:
        call = {"begin": "BeginCapture", "end": "EndCapture", "instantiate": "GraphInstantiateWithFlags"}[how]
        bench.cuda.fail[("cudaStream" if how != "instantiate" else "cuda") + call] = 900
        if how == "end":  # a capture that cannot end would block the stream: the fake ends it with the error
            bench.cuda.__dict__["cudaStreamEndCapture"] = _failing_end(bench.cuda)
            bench.cuda.fail.clear()
    np.testing.assert_array_equal(chunk(engine), want)
    bench.cuda.calls.clear()
    np.testing.assert_array_equal(chunk(engine), want)
    assert "cudaGraphLaunch" not in bench.cuda.calls
    assert bench.cuda.counts()["execute"] == 3
    assert len(engine.notes) == 3
    assert all(note.startswith("no CUDA graph: ") for note in engine.notes)
    if how not in ("enqueue", "told"):
        assert "cudaErrorStreamCaptureUnsupported (900)" in engine.notes[0]


def _plan_bytes() -> bytes:
    return HEADER + denoiser_model(quantized=False)


def _failing_end(cuda: FakeCuda) -> Callable[..., int]:
    class Function:
        argtypes: Any = None
        restype: Any = None

        def __call__(self, stream: int, pointer: Any) -> int:
            cuda.calls.append("cudaStreamEndCapture")
            cuda.live["stream"][stream].captured = None
            return 900

    return Function()


def test_a_device_that_fails_in_a_step_is_named(bench: Bench) -> None:
    engine = bench.open()
    chunk(engine)
    bench.cuda.fail["cudaStreamSynchronize"] = 700
    with pytest.raises(
        EngineError, match=r"engine tensorrt/w8a8: cudaStreamSynchronize failed: cudaErrorIllegalAddress \(700\)"
    ):
        chunk(engine)
    bench.cuda.fail.clear()


def test_an_execution_that_cannot_be_enqueued_is_named(bench: Bench) -> None:
    engine = bench.open()
    bench.tensorrt.execute_fails = True
    with pytest.raises(EngineError, match=r"timestep\.onnx \(S=2\): TensorRT could not enqueue it and does"):
        chunk(engine)


@pytest.mark.parametrize("after", range(8))
def test_memory_that_runs_out_leaves_nothing_behind(bench: Bench, after: int) -> None:
    engine = bench.open()
    left = [after]
    for name in ("cudaMalloc", "cudaHostAlloc"):
        real = getattr(bench.cuda, name)

        def limited(*arguments: Any, real: Any = real) -> int:
            if not left[0]:
                return 2
            left[0] -= 1
            return int(real.call(*arguments))

        bench.cuda.__dict__[name] = type(real)(limited)
    noisy = draw()[0]
    kv = np.zeros((1, 2, 1, 4), np.float32), np.zeros((1, 2, HISTORY, 4), np.float32)
    with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
        engine.denoise(noisy, *kv)
    assert not bench.cuda.live["device"] and not bench.cuda.live["host"]


def test_a_close_after_a_failure_frees_what_it_can_and_does_not_raise(bench: Bench) -> None:
    engine = bench.open()
    chunk(engine)
    bench.cuda.fail["cudaFree"] = 700
    engine.close()
    assert not bench.cuda.live["host"]
    assert not bench.cuda.live["executable"]
    bench.cuda.live["device"].clear()


def test_closing_twice_is_allowed_and_nothing_runs_afterwards(bench: Bench) -> None:
    engine = bench.open()
    chunk(engine)
    engine.close()
    engine.close()
    for call in (lambda: engine.observation_kv(draw()[1]), lambda: chunk(engine)):
        with pytest.raises(EngineError, match="engine tensorrt/w8a8 is closed"):
            call()


def test_another_thread_is_refused(bench: Bench) -> None:
    engine = bench.open()
    errors: list[EngineError] = []

    def use() -> None:
        try:
            chunk(engine)
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert "belongs to the thread that made it" in str(errors[0])


def test_wrong_shapes_are_named(bench: Bench) -> None:
    engine = bench.open()
    noisy, seen = draw()
    times, encoded = engine.timestep_kv(np.array([3]))[:1].copy(), engine.observation_kv(seen).copy()
    with pytest.raises(EngineError, match=r"observation has shape \(1, 2, 19\), expected \(1, 2, 20\)"):
        engine.observation_kv(seen[..., :19])
    with pytest.raises(EngineError, match=r"observation_kv has shape"):
        engine.denoise(noisy, times, encoded[..., :3])
    with pytest.raises(EngineError, match="at least 1"):
        engine.denoise(noisy[:, :0], times, encoded)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"noisy": "sample"}, r"denoiser\.onnx: expected input noisy, timestep_kv, observation_kv, got sample"),
        ({"noise": "epsilon"}, r"denoiser\.onnx: expected output noise, got epsilon"),
    ],
)
def test_graphs_against_the_contract_are_refused(bench: Bench, change: dict[str, str], text: str) -> None:
    files = {**tiny_files(), "denoiser": denoiser_model(False, **change)}
    with pytest.raises(EngineError, match=text):
        bench.open(files)


def test_missing_files_devices_and_types_are_refused_before_anything_is_built(bench: Bench) -> None:
    with pytest.raises(EngineError, match="files lack timestep"):
        bench.open({role: data for role, data in tiny_files().items() if role != "timestep"})
    bench.cuda.attributes |= {75: 6, 76: 1}
    with pytest.raises(EngineError, match=r"encoder\.onnx: FP16 needs compute capability 7\.5 .*is for 6\.1"):
        bench.open()
    bench.cuda.devices = 0
    with pytest.raises(EngineError, match="no CUDA device"):
        bench.open()
    bench.cuda.fail["cudaGetDeviceCount"] = 35
    with pytest.raises(EngineError, match="cudaGetDeviceCount failed"):
        bench.open()
    bench.cuda.fail.clear()
    assert bench.tensorrt.builds == 0


def test_what_parser_and_builder_say_is_in_the_error(bench: Bench) -> None:
    bench.tensorrt.parser_errors = ["no importer", "really none"]
    with pytest.raises(EngineError, match=r"cannot parse it: some_node: no importer; some_node: really none"):
        bench.open().observation_kv(draw()[1])
    bench.tensorrt.parser_errors = []
    bench.tensorrt.build_fails = True
    with pytest.raises(EngineError, match=r"cannot build it for compute capability 8\.7: no kernel for this$"):
        bench.open().observation_kv(draw()[1])


def test_what_is_executed_is_known_by_weight(bench: Bench) -> None:
    engine = bench.open()
    assert {bits.weight for bits in engine.executed["denoiser"].values()} == {8}
    assert {bits.weight for bits in engine.executed["encoder"].values()} == {16}
    assert engine.executed["timestep"] == {}
    full = bench.open(tiny_files())
    assert {bits.weight for bits in full.executed["encoder"].values()} == {32}
