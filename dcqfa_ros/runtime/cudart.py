"""The few calls of the CUDA runtime that a static engine needs, through ctypes: no torch, no cuda-python.

Works with the CUDA runtime libraries 11.4 to 13 (signatures: ``cuda_runtime_api.h`` of 13.0). The library comes with
JetPack, a CUDA installation or the package ``nvidia-cuda-runtime``.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dcqfa_ros.runtime.errors import EngineError

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
_NON_BLOCKING_STREAM = 1
# Other threads may allocate while this one captures: only this thread's forbidden calls end the capture.
_CAPTURE_THREAD_LOCAL = 1
_ATTRIBUTE_MULTIPROCESSORS, _ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 16, 75, 76
_SONAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cudaGetDeviceCount": (ctypes.POINTER(_INT),),
    "cudaSetDevice": (_INT,),
    "cudaDeviceGetAttribute": (ctypes.POINTER(_INT), _INT, _INT),
    "cudaDriverGetVersion": (ctypes.POINTER(_INT),),
    "cudaRuntimeGetVersion": (ctypes.POINTER(_INT),),
    "cudaMalloc": (ctypes.POINTER(_POINTER), _SIZE),
    "cudaFree": (_POINTER,),
    "cudaHostAlloc": (ctypes.POINTER(_POINTER), _SIZE, ctypes.c_uint),
    "cudaFreeHost": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaStreamCreateWithFlags": (ctypes.POINTER(_POINTER), ctypes.c_uint),
    "cudaStreamDestroy": (_POINTER,),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamBeginCapture": (_POINTER, _INT),
    "cudaStreamEndCapture": (_POINTER, ctypes.POINTER(_POINTER)),
    "cudaGraphInstantiateWithFlags": (ctypes.POINTER(_POINTER), _POINTER, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_POINTER, _POINTER),
    "cudaGraphDestroy": (_POINTER,),
    "cudaGraphExecDestroy": (_POINTER,),
    "cudaGetLastError": (),
}


class CudaError(EngineError):
    """A call of the CUDA runtime failed.

    Attributes:
        call: the function.
        code: its ``cudaError_t``.
    """

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        """Hold the failed call and what the runtime says about it."""
        super().__init__(f"{call} failed: {name} ({code}): {text}")
        self.call, self.code = call, code


def library_candidates() -> Iterator[str]:
    """Names and paths under which the CUDA runtime library may lie; of equal versions the first one counts."""
    yield from _SONAMES
    spec = find_spec("nvidia") if "nvidia" not in sys.modules else sys.modules["nvidia"].__spec__
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in ("cu*/lib/libcudart.so.*", "cuda_runtime/lib/libcudart.so.*"):
            yield from sorted((str(path) for path in Path(folder).glob(pattern)), reverse=True)
    yield from sorted((str(path) for path in Path("/usr/local").glob("cuda*/lib64/libcudart.so.*")), reverse=True)


class CudaRuntime:
    """The loaded library. Pointers and handles are integers; every failed call raises :class:`CudaError`."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        """Load the library, or take one that is loaded.

        Raises:
            EngineError: there is none, or it lacks a function; the message says what to install.
        """
        self._library = library or _load()
        try:
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, _INT
            for name in ("cudaGetErrorName", "cudaGetErrorString"):
                function = getattr(self._library, name)
                function.argtypes, function.restype = (_INT,), ctypes.c_char_p
        except AttributeError as error:
            raise EngineError(f"the CUDA runtime library is too old: {error}; expected CUDA 11.4 to 13") from error
        self._graph_launch = self._library.cudaGraphLaunch
        self._synchronize = self._library.cudaStreamSynchronize

    def device_count(self) -> int:
        """Number of CUDA devices; raises where there is no driver or no device."""
        return self._integer("cudaGetDeviceCount")

    def set_device(self, device: int) -> None:
        """Choose the device of the calling thread."""
        self._call("cudaSetDevice", device)

    def compute_capability(self, device: int = 0) -> tuple[int, int]:
        """Compute capability, for example (8, 7)."""
        return (
            self._integer("cudaDeviceGetAttribute", _ATTRIBUTE_MAJOR, device),
            self._integer("cudaDeviceGetAttribute", _ATTRIBUTE_MINOR, device),
        )

    def multiprocessors(self, device: int = 0) -> int:
        """Number of streaming multiprocessors; tells devices of one compute capability apart."""
        return self._integer("cudaDeviceGetAttribute", _ATTRIBUTE_MULTIPROCESSORS, device)

    def driver(self) -> str:
        """The driver: the CUDA version it supports and, where the kernel module tells, its own version."""
        supported = self._integer("cudaDriverGetVersion")
        try:
            found = re.search(r"(\d+\.\d+(?:\.\d+)?)", _DRIVER_VERSION.read_text(encoding="ascii", errors="replace"))
        except OSError:
            found = None
        return f"cuda {supported // 1000}.{supported % 1000 // 10}" + (f", module {found[1]}" if found else "")

    def version(self) -> int:
        """Version of this library, 13000 for 13.0."""
        return self._integer("cudaRuntimeGetVersion")

    def allocate(self, count: int) -> int:
        """Allocate ``count`` bytes of device memory."""
        return self._pointer("cudaMalloc", count)

    def free(self, pointer: int) -> None:
        """Free device memory."""
        self._call("cudaFree", pointer)

    def allocate_host(self, count: int) -> int:
        """Allocate ``count`` bytes of page-locked host memory, which the device reads and writes by itself."""
        return self._pointer("cudaHostAlloc", count, 0)

    def free_host(self, pointer: int) -> None:
        """Free page-locked host memory."""
        self._call("cudaFreeHost", pointer)

    def copy(self, target: int, source: int, count: int, kind: int, stream: int) -> None:
        """Enqueue a copy of ``count`` bytes; ``kind`` is HOST_TO_DEVICE or DEVICE_TO_HOST."""
        self._call("cudaMemcpyAsync", target, source, count, kind, stream)

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default one."""
        return self._pointer("cudaStreamCreateWithFlags", _NON_BLOCKING_STREAM)

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done everything."""
        code = self._synchronize(stream)
        if code:
            raise self._error("cudaStreamSynchronize", code)

    def begin_capture(self, stream: int) -> None:
        """Record what is enqueued from here on and do not run it."""
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """End the recording and return the graph."""
        graph = _POINTER()
        self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        if not graph.value:
            raise CudaError("cudaStreamEndCapture", 0, "no graph", "the capture was invalidated")
        return graph.value

    def instantiate(self, graph: int) -> int:
        """Make a graph that can be launched."""
        return self._pointer("cudaGraphInstantiateWithFlags", graph, 0)

    def launch(self, executable: int, stream: int) -> None:
        """Enqueue an instantiated graph."""
        code = self._graph_launch(executable, stream)
        if code:
            raise self._error("cudaGraphLaunch", code)

    def destroy_graph(self, graph: int) -> None:
        """Destroy a recorded graph; what was instantiated from it stays."""
        self._call("cudaGraphDestroy", graph)

    def destroy_executable(self, executable: int) -> None:
        """Destroy an instantiated graph."""
        self._call("cudaGraphExecDestroy", executable)

    def forget_error(self) -> None:
        """Clear the error that a refused call left behind, which the next call would report as its own."""
        self._library.cudaGetLastError()

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise self._error(name, code)

    def _integer(self, name: str, *arguments: int) -> int:
        value = _INT()
        self._call(name, ctypes.byref(value), *arguments)
        return value.value

    def _pointer(self, name: str, *arguments: int) -> int:
        value = _POINTER()
        self._call(name, ctypes.byref(value), *arguments)
        return value.value or 0

    def _error(self, call: str, code: int) -> CudaError:
        name, text = self._library.cudaGetErrorName(code), self._library.cudaGetErrorString(code)
        return CudaError(call, code, (name or b"?").decode(), (text or b"?").decode())


def _load() -> ctypes.CDLL:
    """Load the newest library that the driver serves: a driver serves every release of its CUDA's major number."""
    tried = list(dict.fromkeys(library_candidates()))
    found = []
    for candidate in tried:
        try:
            found.append(ctypes.CDLL(candidate))
        except OSError:
            continue
    if not found:
        raise EngineError(
            f"no CUDA runtime library; looked for {', '.join(tried)}; install CUDA (a Jetson has it with JetPack) or "
            "the package nvidia-cuda-runtime"
        )
    return max(found, key=_usefulness)


def _usefulness(library: ctypes.CDLL) -> tuple[bool, int]:
    """Whether the driver serves a library (or there is no driver to ask), and its version."""
    version, driver = (_asked(library, f"cuda{what}GetVersion") for what in ("Runtime", "Driver"))
    return not driver or version // 1000 <= driver // 1000, version


def _asked(library: ctypes.CDLL, name: str) -> int:
    """Ask a library for a version; 0 where it does not say."""
    value = _INT()
    function = getattr(library, name, None)
    return value.value if function is not None and function(ctypes.byref(value)) == 0 else 0
