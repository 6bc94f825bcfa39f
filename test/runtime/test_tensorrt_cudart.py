"""The CUDA runtime wrapper: errors by name, on a fake library and on the real one, which has no device here."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest

from dcqfa_ros.runtime import cudart
from dcqfa_ros.runtime.cudart import CudaError, CudaRuntime
from dcqfa_ros.runtime.errors import EngineError
from test.runtime.tensorrt_fake import FakeCuda

on_x86_linux = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"),
    reason="the CUDA runtime is a test requirement on x86_64 Linux only (requirements/tensorrt_rtx.txt)",
)


def test_a_failed_call_is_named_with_code_name_and_text() -> None:
    fake = FakeCuda()
    fake.fail["cudaMalloc"] = 2
    with pytest.raises(
        CudaError, match=r"^cudaMalloc failed: cudaErrorMemoryAllocation \(2\): as the test wants$"
    ) as e:
        CudaRuntime(fake).allocate(64)  # type: ignore[arg-type]
    assert (e.value.call, e.value.code) == ("cudaMalloc", 2)


def test_device_facts_are_read() -> None:
    cuda = CudaRuntime(FakeCuda((8, 9)))  # type: ignore[arg-type]
    assert (cuda.compute_capability(), cuda.multiprocessors(), cuda.device_count()) == ((8, 9), 8, 1)
    assert cuda.driver().startswith("cuda 12.6")


def test_a_library_that_lacks_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeCuda, "_cudaGraphInstantiateWithFlags")
    with pytest.raises(EngineError, match=r"too old: cudaGraphInstantiateWithFlags; expected CUDA 11\.4 to 13"):
        CudaRuntime(FakeCuda())  # type: ignore[arg-type]


def test_where_there_is_no_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "library_candidates", lambda: iter(["libcudart.none.so"]))
    with pytest.raises(EngineError, match=r"libcudart\.none\.so; install CUDA .* or the package nvidia-cuda-runtime"):
        CudaRuntime()


@pytest.mark.parametrize(
    ("driver", "chosen"),
    [(13000, 13010), (12060, 12080), (12090, 12080), (0, 13010), (11040, 13010)],
)
def test_the_newest_library_that_the_driver_serves_is_taken(
    monkeypatch: pytest.MonkeyPatch, driver: int, chosen: int
) -> None:
    def library(version: int) -> FakeCuda:
        fake = FakeCuda()
        fake.driver, fake.version = driver, version
        return fake

    there = {"a": library(12020), "b": library(13010), "c": library(12080)}

    def load(name: str) -> FakeCuda:
        if name not in there:
            raise OSError(name)
        return there[name]

    monkeypatch.setattr(cudart, "library_candidates", lambda: iter(["a", "missing", "b", "c"]))
    monkeypatch.setattr(cudart.ctypes, "CDLL", load)
    assert CudaRuntime().version() == chosen


@on_x86_linux
def test_the_real_library_has_every_function() -> None:
    assert CudaRuntime().version() >= 11040


@on_x86_linux
def test_the_real_library_names_its_errors() -> None:
    cuda = CudaRuntime()
    with pytest.raises(CudaError, match=r"cudaFree failed: cudaError\w+ \(\d+\): \w+"):
        cuda.free(ctypes.addressof(ctypes.c_byte()) | 1)  # no driver, or no device memory: an error either way
