"""TensorRT and the CUDA runtime without a GPU: calls are recorded in order, memory is real, ONNX Runtime computes.

Work that is enqueued runs when its stream is waited for, as on a device, so a result that is read too early is wrong
here too. What is enqueued during a capture runs only when the graph is launched.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

HEADER = b"FAKE ENGINE 1\n"
NAMES = {1: b"cudaErrorInvalidValue", 2: b"cudaErrorMemoryAllocation", 700: b"cudaErrorIllegalAddress"}
NAMES |= {900: b"cudaErrorStreamCaptureUnsupported"}


class FakeFunction:
    """Like a function of a ctypes library: its signature can be declared."""

    def __init__(self, call: Callable[..., int]) -> None:
        self.call = call
        self.argtypes: Any = None
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class FakeCuda:
    """The CUDA runtime library: pass it to ``CudaRuntime``.

    Attributes:
        calls: names of the functions called, in order, with "execute" for TensorRT's own work.
        fail: function -> code it returns from now on.
        live: what exists now, by kind; empty after a clean close.
    """

    def __init__(self, capability: tuple[int, int] = (8, 7), devices: int = 1) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        self.live: dict[str, dict[int, Any]] = {k: {} for k in ("device", "host", "stream", "graph", "executable")}
        self.attributes = {75: capability[0], 76: capability[1], 16: 8}
        self.devices = devices
        self.driver = self.version = 12060
        self._next = 0x1000

    def __getattr__(self, name: str) -> FakeFunction:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        body = getattr(self, "_" + name, None)
        if body is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            if name not in ("cudaGetErrorName", "cudaGetErrorString"):
                self.calls.append(name)
            if name in self.fail:
                return self.fail[name]
            result = body(*arguments)
            return 0 if result is None else result

        function = FakeFunction(call)
        self.__dict__[name] = function
        return function

    def counts(self) -> Counter[str]:
        return Counter(self.calls)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        state = self.live["stream"][stream]
        (state.pending if state.captured is None else state.captured).append(work)

    def capturing(self, stream: int) -> bool:
        return self.live["stream"][stream].captured is not None

    def _make(self, kind: str, thing: Any) -> int:
        self._next += 0x10
        self.live[kind][self._next] = thing
        return self._next

    def _memory(self, kind: str, pointer: Any, count: int) -> None:
        buffer = (ctypes.c_byte * count)()
        ctypes.memset(buffer, 0xA5, count)  # what was never written is noticed
        pointer._obj.value = ctypes.addressof(buffer)
        self.live[kind][ctypes.addressof(buffer)] = buffer

    def _release(self, kind: str, handle: int) -> int:
        return 0 if self.live[kind].pop(handle, None) is not None else 1

    def _cudaGetErrorName(self, code: int) -> bytes:  # noqa: N802
        return NAMES.get(code, b"cudaErrorUnknown")

    def _cudaGetErrorString(self, code: int) -> bytes:  # noqa: N802
        return b"as the test wants"

    def _cudaGetLastError(self) -> int:  # noqa: N802
        return 0

    def _cudaGetDeviceCount(self, pointer: Any) -> None:  # noqa: N802
        pointer._obj.value = self.devices

    def _cudaSetDevice(self, device: int) -> int:  # noqa: N802
        return 0 if device < self.devices else 1

    def _cudaDeviceGetAttribute(self, pointer: Any, attribute: int, device: int) -> None:  # noqa: N802
        pointer._obj.value = self.attributes[attribute]

    def _cudaDriverGetVersion(self, pointer: Any) -> None:  # noqa: N802
        pointer._obj.value = self.driver

    def _cudaRuntimeGetVersion(self, pointer: Any) -> None:  # noqa: N802
        pointer._obj.value = self.version

    def _cudaMalloc(self, pointer: Any, count: int) -> None:  # noqa: N802
        self._memory("device", pointer, count)

    def _cudaFree(self, pointer: int) -> int:  # noqa: N802
        return self._release("device", pointer)

    def _cudaHostAlloc(self, pointer: Any, count: int, flags: int) -> None:  # noqa: N802
        self._memory("host", pointer, count)

    def _cudaFreeHost(self, pointer: int) -> int:  # noqa: N802
        return self._release("host", pointer)

    def _cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> int:  # noqa: N802
        sides = {1: ("device", "host"), 2: ("host", "device")}[kind]
        for side, address in zip(sides, (target, source), strict=True):
            if len(self.live[side].get(address, b"")) != count:
                return 1
        self.enqueue(stream, lambda: ctypes.memmove(target, source, count))
        return 0

    def _cudaStreamCreateWithFlags(self, pointer: Any, flags: int) -> None:  # noqa: N802
        pointer._obj.value = self._make("stream", SimpleNamespace(pending=[], captured=None))

    def _cudaStreamDestroy(self, stream: int) -> int:  # noqa: N802
        return self._release("stream", stream)

    def _cudaStreamSynchronize(self, stream: int) -> int:  # noqa: N802
        state = self.live["stream"][stream]
        if state.captured is not None:
            return 900
        pending, state.pending = state.pending, []
        for work in pending:
            work()
        return 0

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> int:  # noqa: N802
        if mode != 1:
            return 1
        self.live["stream"][stream].captured = []
        return 0

    def _cudaStreamEndCapture(self, stream: int, pointer: Any) -> None:  # noqa: N802
        state = self.live["stream"][stream]
        pointer._obj.value = self._make("graph", state.captured)
        state.captured = None

    def _cudaGraphInstantiateWithFlags(self, pointer: Any, graph: int, flags: int) -> None:  # noqa: N802
        pointer._obj.value = self._make("executable", list(self.live["graph"][graph]))

    def _cudaGraphLaunch(self, executable: int, stream: int) -> None:  # noqa: N802
        for work in self.live["executable"][executable]:
            self.enqueue(stream, work)

    def _cudaGraphDestroy(self, graph: int) -> int:  # noqa: N802
        return self._release("graph", graph)

    def _cudaGraphExecDestroy(self, executable: int) -> int:  # noqa: N802
        return self._release("executable", executable)


class FakeTensorRt:
    """The module ``tensorrt``; a serialized engine is a header and the ONNX graph.

    Attributes:
        builds: how many engines were built.
        alive: how many engines and contexts exist.
        first_execution_captured: set when a context was executed for the first time within a capture.
    """

    def __init__(self, cuda: FakeCuda, version: str = "10.3.0") -> None:
        self.__version__ = version
        self.cuda, self.builds, self.alive = cuda, 0, Counter[str]()
        self.parser_errors: list[str] = []
        self.build_fails = self.load_fails = self.execute_fails = self.refuses_capture = False
        self.context_fails = self.first_execution_captured = False
        fake = self

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

            def log(self, severity: int, message: str) -> None:
                raise AssertionError("log is to be overridden")

        class Network:
            model: onnx.ModelProto | None = None

            @property
            def num_inputs(self) -> int:
                assert self.model is not None
                return len(self.model.graph.input)

            def get_input(self, index: int) -> SimpleNamespace:
                assert self.model is not None
                value = self.model.graph.input[index]
                dims = value.type.tensor_type.shape.dim
                return SimpleNamespace(name=value.name, shape=tuple(d.dim_value or -1 for d in dims))

        class Builder:
            def __init__(self, logger: ILogger) -> None:
                self.logger = logger

            def create_network(self, flags: int) -> Network:
                assert flags == 2
                return Network()

            def create_builder_config(self) -> SimpleNamespace:
                return SimpleNamespace(clear_flag=lambda flag: None)

            def build_serialized_network(self, network: Network, config: Any) -> bytes | None:
                if fake.build_fails:
                    self.logger.log(ILogger.VERBOSE, "chatter")
                    self.logger.log(ILogger.ERROR, "no kernel\nfor this")
                    return None
                fake.builds += 1
                assert network.model is not None
                return HEADER + network.model.SerializeToString()

        class OnnxParser:
            def __init__(self, network: Network, logger: ILogger) -> None:
                self.network = network

            def parse(self, data: bytes) -> bool:
                self.network.model = onnx.load_model_from_string(data)
                return not fake.parser_errors

            @property
            def num_errors(self) -> int:
                return len(fake.parser_errors)

            def get_error(self, index: int) -> SimpleNamespace:
                text = fake.parser_errors[index]
                return SimpleNamespace(node_name=lambda: "some_node", node_operator=lambda: "", desc=lambda: text)

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
                if fake.load_fails or not plan.startswith(HEADER):
                    self.logger.log(ILogger.ERROR, "version tag mismatch")
                    return None
                return Engine(plan[len(HEADER) :])

        class Engine:
            def __init__(self, data: bytes) -> None:
                options = ort.SessionOptions()
                options.log_severity_level = 3
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
                sides = [(fake.TensorIOMode.INPUT, v) for v in self.session.get_inputs()]
                sides += [(fake.TensorIOMode.OUTPUT, v) for v in self.session.get_outputs()]
                self.tensors = {value.name: (mode, value) for mode, value in sides}
                self.num_io_tensors = len(self.tensors)
                fake.alive["engine"] += 1

            def __del__(self) -> None:
                fake.alive["engine"] -= 1

            def get_tensor_name(self, index: int) -> str:
                return list(self.tensors)[index]

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                return tuple(self.tensors[name][1].shape)

            def get_tensor_dtype(self, name: str) -> Enum:
                kinds = {"tensor(float)": fake.DataType.FLOAT, "tensor(int64)": fake.DataType.INT64}
                return kinds[self.tensors[name][1].type]

            def get_tensor_mode(self, name: str) -> Enum:
                return self.tensors[name][0]

            def create_execution_context(self) -> Context | None:
                if fake.context_fails:
                    return None
                return Context(self)

        class Context:
            def __init__(self, engine: Engine) -> None:
                self.engine, self.addresses, self.executed = engine, dict[str, int](), False
                fake.alive["context"] += 1

            def __del__(self) -> None:
                fake.alive["context"] -= 1

            def set_tensor_address(self, name: str, address: int) -> bool:
                self.addresses[name] = address
                return address in fake.cuda.live["device"]

            def execute_async_v3(self, stream: int) -> bool:
                fake.cuda.calls.append("execute")
                capturing = fake.cuda.capturing(stream)
                if capturing and not self.executed:
                    fake.first_execution_captured = True
                if fake.execute_fails or (capturing and fake.refuses_capture):
                    return False
                self.executed = True
                fake.cuda.enqueue(stream, self._compute)
                return True

            def _compute(self) -> None:
                feeds, results = {}, {}
                for name, (mode, value) in self.engine.tensors.items():
                    dtype = np.int64 if "int64" in value.type else np.float32
                    count = int(np.prod(value.shape)) * np.dtype(dtype).itemsize
                    memory = (ctypes.c_byte * count).from_address(self.addresses[name])
                    array = np.frombuffer(memory, dtype).reshape(value.shape)
                    (feeds if mode is fake.TensorIOMode.INPUT else results)[name] = array
                for (_, array), value in zip(results.items(), self.engine.session.run(None, feeds), strict=True):
                    array[...] = value

        self.ILogger, self.Builder, self.OnnxParser, self.Runtime = ILogger, Builder, OnnxParser, Runtime
        self.DataType = Enum("DataType", "FLOAT HALF INT64")
        self.TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")
        self.BuilderFlag = IntEnum("BuilderFlag", "TF32", start=0)
        self.NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", start=1)
