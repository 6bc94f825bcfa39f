"""Programs of the torch engine bound to static buffers, once per shape: on the processor, or as a CUDA graph.

A CUDA graph replays the kernels of one run by one launch, so a denoising step costs no call of Python per kernel.
Inputs and output lie in device memory that never moves; one pinned buffer carries all inputs to the device in one copy,
another one the output back. Capturing was checked against a stand-in for torch's interface only, never on a GPU.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcqfa_ros.runtime.contract import DTYPES
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.errors import EngineError, first_line
from dcqfa_ros.runtime.torch_program import Network, Shapes

_WARM_UP_RUNS = 3  # libraries choose kernels and take their workspaces before a capture, which allows neither
_ALIGNMENT = 64  # float32 elements: 256 bytes, as CUDA aligns memory


class Binding(Protocol):
    """Static buffers of one shape; ``arrays`` are the graph's inputs in host memory, to be written before a run."""

    arrays: dict[str, NDArray[Any]]

    def run(self) -> Float32:
        """Compute the output; the array returned is this binding's buffer. Call it in inference mode."""
        ...


class HostBinding:
    """A program on the processor, reading its host arrays where they lie."""

    def __init__(self, network: Network, shapes: Shapes) -> None:
        """Allocate buffers and prepare the program.

        Raises:
            EngineError: the graph cannot take these shapes.
        """
        self._program = network.program(shapes)
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.zeros(shape, DTYPES[network.graph.inputs[name][0]]) for name, shape in shapes.items()
        }
        self._tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        self._output = torch.zeros(self._program.output_shape)
        self._result: Float32 = self._output.numpy()

    def run(self) -> Float32:
        """See :class:`Binding`."""
        self._output.copy_(self._program.run(self._tensors))
        return self._result


class CapturedBinding:
    """A program captured as a CUDA graph on a stream of its engine; every input is float32."""

    def __init__(self, network: Network, shapes: Shapes, stream: torch.cuda.Stream) -> None:
        """Allocate buffers, warm up and capture.

        Raises:
            EngineError: the graph cannot take these shapes, or cannot be captured; the message gives the reason.
        """
        self._stream = stream
        places, total = {}, 0
        for name, shape in shapes.items():
            places[name] = total
            total += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        with torch.cuda.stream(stream):
            self._program = network.program(shapes)
            self._sent, self._received = pinned(total), torch.zeros(total, device=network.device)
            self._output = torch.zeros(self._program.output_shape, device=network.device)
            self._returned = pinned(self._output.numel())

            def part(flat: Tensor, name: str) -> Tensor:
                shape = shapes[name]
                return flat[places[name] : places[name] + math.prod(shape)].view(shape)

            self.arrays = {name: part(self._sent, name).numpy() for name in shapes}
            self._result: Float32 = self._returned.view(self._output.shape).numpy()
            self._tensors = {name: part(self._received, name) for name in shapes}
            for _ in range(_WARM_UP_RUNS):
                self._step()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of this process may use the GPU meanwhile: their calls do not end this capture.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            sizes = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
            raise EngineError(
                f"{network.graph.label}: torch {torch.__version__} cannot capture a CUDA graph for {sizes}: "
                f"{first_line(error)}"
            ) from error

    def run(self) -> Float32:
        """See :class:`Binding`."""
        with torch.cuda.stream(self._stream):
            self._received.copy_(self._sent, non_blocking=True)
            self._graph.replay()
            self._returned.copy_(self._output.view(-1), non_blocking=True)
        self._stream.synchronize()
        return self._result

    def _step(self) -> None:
        self._output.copy_(self._program.run(self._tensors))


def pinned(size: int) -> Tensor:
    """Allocate float32 zeros in host memory that the device copies from and to by itself."""
    return torch.zeros(size, pin_memory=True)
