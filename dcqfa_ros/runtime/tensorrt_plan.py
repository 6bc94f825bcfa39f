"""One serialized engine with static shapes, ready to run: context, buffers, and the CUDA graph of one execution.

A run copies page-locked inputs to the device, executes, and copies the outputs back. All of that is recorded as one
CUDA graph at the first run, after warm-up runs (TensorRT finishes setting up a context in its first execution, which
cannot be recorded). From then on a run is one launch and one wait.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.runtime.cudart import DEVICE_TO_HOST, HOST_TO_DEVICE, CudaError, CudaRuntime
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.tensorrt_build import RefusedPlanError, deserialize, logger_of, said

_log = logging.getLogger(__name__)
WARM_UP_RUNS = 2


class StaticPlan:
    """An engine on the device. Belongs to one thread and one stream, which it does not own.

    Attributes:
        inputs: page-locked arrays to write before :meth:`run`, by name.
        outputs: page-locked arrays to read after it; valid until :meth:`close`.
        capture_refused: why runs are enqueued call by call and not as one CUDA graph; None while they are a graph, or
            before the first run.
    """

    def __init__(
        self, cuda: CudaRuntime, module: Any, plan: bytes, stream: int, expected: Mapping[str, Any], label: str
    ) -> None:
        """Load an engine and bind its buffers.

        Args:
            cuda: the CUDA runtime; the device of this thread is chosen.
            module: ``tensorrt`` or ``tensorrt_rtx_bindings``.
            plan: the serialized engine.
            stream: where it runs.
            expected: name of an input or output -> (whether it is an input, shape, NumPy type).
            label: what to call the engine in errors.

        Raises:
            RefusedPlanError: the engine cannot be loaded or has other inputs and outputs than expected.
            EngineError: memory runs out, or the device fails.
        """
        self.inputs: dict[str, NDArray[Any]] = {}
        self.outputs: dict[str, NDArray[Any]] = {}
        self.capture_refused: str | None = None
        self._cuda, self._stream, self._label = cuda, stream, label
        self._logger = logger_of(module)
        self._executable: int | None = None
        self._copies_in: list[tuple[int, int, int]] = []  # target, source, bytes
        self._copies_out: list[tuple[int, int, int]] = []
        with ExitStack() as stack:
            self._runtime, self._engine = deserialize(module, plan, label)
            stack.callback(self._drop)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise EngineError(f"{label}: no execution context; is there enough device memory?")
            self._check(module, expected)
            for name, (is_input, shape, dtype) in expected.items():
                self._bind(stack, name, is_input, shape, np.dtype(dtype))
            self._release = stack.pop_all()

    def run(self) -> None:
        """Execute on what ``inputs`` hold and wait for ``outputs``.

        Raises:
            EngineError: the device or TensorRT failed, or the plan is closed.
        """
        if self._executable is not None:
            self._cuda.launch(self._executable, self._stream)
            self._cuda.synchronize(self._stream)
        elif self.capture_refused is not None:
            self._enqueue()
            self._cuda.synchronize(self._stream)
        else:
            self._first_run()

    def close(self) -> None:
        """Free everything. Closing twice is allowed."""
        self.inputs, self.outputs = {}, {}
        self._copies_in, self._copies_out = [], []
        executable, self._executable = self._executable, None
        self.capture_refused = "closed"
        if executable is not None:
            self._quietly(self._cuda.destroy_executable, executable)
        self._release.close()

    def _check(self, module: Any, expected: Mapping[str, Any]) -> None:
        types = {np.dtype(np.float32): module.DataType.FLOAT, np.dtype(np.int64): module.DataType.INT64}
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        if set(names) != set(expected):
            raise RefusedPlanError(f"{self._label}: expected {', '.join(expected)}; the engine has {', '.join(names)}")
        for name in names:
            is_input, shape, dtype = expected[name]
            found = tuple(self._engine.get_tensor_shape(name))
            mode = module.TensorIOMode.INPUT if is_input else module.TensorIOMode.OUTPUT
            if found != tuple(shape) or self._engine.get_tensor_dtype(name) != types[np.dtype(dtype)]:
                raise RefusedPlanError(
                    f"{self._label}: {name} is {self._engine.get_tensor_dtype(name)} {found} in the engine; "
                    f"expected {np.dtype(dtype).name} {tuple(shape)}"
                )
            if self._engine.get_tensor_mode(name) != mode:
                raise RefusedPlanError(
                    f"{self._label}: {name} is not an {'input' if is_input else 'output'} of the engine"
                )

    def _bind(self, stack: ExitStack, name: str, is_input: bool, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        count = int(np.prod(shape)) * dtype.itemsize
        device = self._cuda.allocate(count)
        stack.callback(self._quietly, self._cuda.free, device)
        host = self._cuda.allocate_host(count)
        stack.callback(self._quietly, self._cuda.free_host, host)
        if not self._context.set_tensor_address(name, device):
            raise EngineError(f"{self._label}: TensorRT does not take the buffer of {name}")
        memory = (ctypes.c_byte * count).from_address(host)
        array: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        array[...] = 0
        if is_input:
            self.inputs[name] = array
            self._copies_in.append((device, host, count))
        else:
            self.outputs[name] = array
            self._copies_out.append((host, device, count))

    def _first_run(self) -> None:
        if not self.inputs:
            raise EngineError(f"{self._label}: closed")
        for _ in range(WARM_UP_RUNS):
            self._enqueue()
            self._cuda.synchronize(self._stream)
        capturable = getattr(self._context, "is_stream_capturable", None)  # only TensorRT-RTX can tell before
        if capturable is not None and not capturable(self._stream):
            self._refuse("the runtime cannot be captured on this stream")
            return
        try:
            self._executable = self._capture()
        except EngineError as error:
            self._cuda.forget_error()
            self._refuse(str(error))
            self._enqueue()  # what was enqueued while capturing has not run
            self._cuda.synchronize(self._stream)
            return
        self._cuda.launch(self._executable, self._stream)
        self._cuda.synchronize(self._stream)

    def _capture(self) -> int:
        self._cuda.begin_capture(self._stream)
        try:
            self._enqueue()
        except EngineError:
            # A stream that is being captured is of no use for anything else. Where the failed call has ended the
            # capture, that call's own error is the one to report.
            with suppress(CudaError):
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        graph = self._cuda.end_capture(self._stream)
        try:
            return self._cuda.instantiate(graph)
        finally:
            self._cuda.destroy_graph(graph)

    def _refuse(self, reason: str) -> None:
        self.capture_refused = reason
        _log.warning("%s: no CUDA graph: %s; every run is enqueued call by call", self._label, reason)

    def _enqueue(self) -> None:
        if not self.inputs:
            raise EngineError(f"{self._label}: closed")
        for target, source, count in self._copies_in:
            self._cuda.copy(target, source, count, HOST_TO_DEVICE, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"{self._label}: TensorRT could not enqueue it{said(self._logger)}")
        for target, source, count in self._copies_out:
            self._cuda.copy(target, source, count, DEVICE_TO_HOST, self._stream)

    def _drop(self) -> None:
        """Context before engine before runtime, as TensorRT demands."""
        self._context = None
        self._engine = None
        self._runtime = None

    def _quietly(self, release: Callable[[int], None], handle: int) -> None:
        """Release something; a device that has failed refuses even this, and the first failure was reported."""
        try:
            release(handle)
        except CudaError as error:
            _log.warning("%s: %s", self._label, error)
