"""One CUDA graph per shape, captured once and replayed after: against a stand-in for torch's interface.

No GPU is needed and none is exercised. The stand-in records the operations of a capture and replays them into the same
memory, as a CUDA graph does: what a program computed outside torch, or into memory of its own, would go stale and show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dcqfa_ros.runtime import torch_binding, torch_engine
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.torch_engine import TorchCudaEngine, place_of
from test.runtime.torch_variants import HISTORY, OBSERVED, denoiser_inputs, on_one_thread, random, variant


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from on_one_thread()


def tensors_of(result: Any) -> list[Tensor]:
    return [part for part in (result if isinstance(result, list | tuple) else (result,)) if isinstance(part, Tensor)]


class FakeGraph(TorchDispatchMode):
    """``torch.cuda.CUDAGraph`` on the processor."""

    made: list[FakeGraph]

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0
        type(self).made.append(self)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, tensors_of(result)))
        return result

    def replay(self) -> None:
        assert FakeStream.current is not None, "replayed outside the engine's stream"
        self.replays += 1
        for function, args, kwargs, kept in self.operations:
            for old, new in zip(kept, tensors_of(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeStream:
    current: FakeStream | None = None
    loaded: ClassVar[list[torch.device]] = []  # devices that were waited for

    def __init__(self, device: torch.device | None = None) -> None:
        assert self.loaded.pop() == device, "the load was not waited for"
        self.synchronised = 0

    def synchronize(self) -> None:
        self.synchronised += 1


@contextmanager
def on_stream(stream: FakeStream) -> Iterator[None]:
    before, FakeStream.current = FakeStream.current, stream
    yield
    FakeStream.current = before


@contextmanager
def capture(graph: FakeGraph, *, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
    assert stream.synchronised, "captured before the warm-up had ended"
    assert capture_error_mode == "thread_local"
    with graph:
        yield


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGraph.made = []
    monkeypatch.setattr(torch_engine, "place_of", lambda device: (torch.device("cpu"), device.startswith("cuda")))
    monkeypatch.setattr(torch_binding, "pinned", torch.zeros)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", FakeStream.loaded.append)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.parametrize("name", ["fp32", "w8a8", "fp8"])
def test_a_shape_is_captured_once_and_replayed_after(name: str) -> None:
    files = variant(name)
    engine = TorchCudaEngine(files, name, activations="float32")
    plain = TorchCudaEngine(files, name, device="cpu", activations="float32")
    assert engine.name == f"torch_cuda/{name}"
    shapes = [(1, 9), (2, 16)]
    for seed in range(3):
        for batch, tokens in shapes:
            inputs = denoiser_inputs(plain, batch, tokens, seed)
            np.testing.assert_array_equal(engine.denoise(*inputs), plain.denoise(*inputs))
    assert [graph.replays for graph in FakeGraph.made] == [3, 3]
    for seed in range(2):
        observation = random(seed, 2, HISTORY, OBSERVED)
        np.testing.assert_array_equal(engine.observation_kv(observation), plain.observation_kv(observation))
    assert [graph.replays for graph in FakeGraph.made] == [3, 3, 2]
    times = np.array([3, 17])
    np.testing.assert_array_equal(engine.timestep_kv(times), plain.timestep_kv(times))
    assert len(FakeGraph.made) == 3  # a table in host memory needs no graph


@pytest.mark.parametrize(("device", "allowed"), [("cuda", False), ("cpu", True)])
def test_half_products_are_summed_in_float32_on_a_gpu(device: str, allowed: bool) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    try:
        matmul.allow_fp16_reduced_precision_reduction = True
        TorchCudaEngine(variant("fp16"), device=device)
        assert matmul.allow_fp16_reduced_precision_reduction is allowed
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before


def test_activations_are_half_by_default_but_in_full_precision_variants() -> None:
    assert TorchCudaEngine(variant("fp32")).activations == "float32"
    for name in ("fp16", "w8a8", "fp8"):
        assert TorchCudaEngine(variant(name)).activations == "float16"
        assert TorchCudaEngine(variant(name), device="cpu").activations == "float32"


def test_every_run_copies_in_replays_copies_out_and_waits() -> None:
    engine = TorchCudaEngine(variant("w8a8"))
    noisy, time_kv, observed = denoiser_inputs(engine, 1, 9)
    first = engine.denoise(noisy, time_kv, observed).copy()
    stream = engine._stream
    assert isinstance(stream, FakeStream)
    before = stream.synchronised
    other = engine.denoise(noisy + 1, time_kv, observed).copy()
    assert stream.synchronised == before + 1
    assert np.abs(other - first).max() > 1e-3
    np.testing.assert_array_equal(engine.denoise(noisy, time_kv, observed), first)


def test_a_capture_that_fails_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchCudaEngine(variant("w8a8"), "w8a8")
    inputs = denoiser_inputs(engine, 1, 9)

    @contextmanager
    def refuse(*_: object, **__: object) -> Iterator[None]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nhint")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", refuse)
        with pytest.raises(
            EngineError,
            match=r"torch_cuda/w8a8: denoiser\.onnx: torch .* cannot capture a CUDA graph for noisy \(1, 9, 2\).*: "
            "CUDA error: operation not permitted when stream is capturing$",
        ):
            engine.denoise(*inputs)
    assert engine.denoise(*inputs).shape == (1, 9, 2)  # nothing half made was kept


def test_a_failure_on_the_device_is_an_error_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchCudaEngine(variant("w8a8"))
    inputs = denoiser_inputs(engine, 1, 9)
    engine.denoise(*inputs)

    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(FakeGraph, "replay", fail)
    with pytest.raises(EngineError, match=r"denoiser\.onnx failed: CUDA error: an illegal memory access"):
        engine.denoise(*inputs)


def test_closing_drops_graphs_and_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    engine = TorchCudaEngine(variant("w8a8"))
    inputs = denoiser_inputs(engine, 1, 9)
    engine.close()
    engine.close()
    assert emptied == [True]
    with pytest.raises(EngineError, match="is closed"):
        engine.denoise(*inputs)


def test_devices_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert place_of("cuda") == (torch.device("cuda", 1), True)
    assert place_of("cuda:0") == (torch.device("cuda", 0), True)
    assert place_of("cpu") == (torch.device("cpu"), False)
