"""Shared memory between a process and its engine worker: an observation and the previous chunk in, a chunk out.

The memory is an anonymous file (``memfd_create``): it has no name under ``/dev/shm``, so it does not depend on that
folder's size and cannot be left behind, whoever dies in whichever way.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.chunking import Continuation, Method
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.observations import ObservationLayout, RawObservation

_ALIGNMENT = 64  # bytes: every array begins on a cache line of its own
_FLOAT32 = np.dtype(np.float32)


class ChunkMemory:
    """Arrays over shared memory, laid out by the bundle's description, which both processes read.

    Attributes:
        observation: key -> (1, history, *shape), raw units, dtype of the key; pictures at the network's size.
        previous: (horizon, action_dim), float32, raw units: actions of the previous chunk that a new one continues.
        actions: (1, horizon - first_executed, action_dim), float32, raw units; a request says how many it asks for.
        fd: file descriptor of the memory, for the other process.
    """

    def __init__(self, spec: BundleSpec, fd: int | None = None) -> None:
        """Create the memory, or map the one behind ``fd``.

        Raises:
            PolicyError: the bundle has observations that this runtime cannot carry, or ``fd`` belongs to another
                layout.
        """
        self._layout = ObservationLayout(spec)
        history = self._layout.history
        arrays = {key.name: ((1, history, *key.shape), key.dtype) for key in self._layout.keys}
        action = spec.action
        previous_shape = (action.horizon, action.dim)
        action_shape = (1, action.horizon - action.first_executed, action.dim)
        first = dict.fromkeys(arrays, 0)
        size = 0
        for name, (shape, dtype) in arrays.items():
            first[name] = size
            size += _padded(shape, dtype)
        first_previous, first_action = size, size + _padded(previous_shape, _FLOAT32)
        size = first_action + _padded(action_shape, _FLOAT32)
        if fd is None:
            fd = os.memfd_create("dcqfa_chunk")
            os.ftruncate(fd, size)
        elif os.fstat(fd).st_size != size:
            raise PolicyError(
                f"shared memory holds {os.fstat(fd).st_size} bytes, expected {size}: the bundle has changed"
            )
        self.fd = fd
        self._map = mmap.mmap(fd, size)
        self.observation: dict[str, NDArray[Any]] = {
            name: self._view(first[name], shape, dtype) for name, (shape, dtype) in arrays.items()
        }
        self.previous: Float32 = self._view(first_previous, previous_shape, _FLOAT32)
        self.actions: Float32 = self._view(first_action, action_shape, _FLOAT32)

    def put(self, observation: RawObservation) -> None:
        """Copy a checked observation of batch 1 into the memory; pictures are resized and cropped on the way."""
        self._layout.put(observation, self.observation)

    def put_continuation(self, continuation: Continuation) -> dict[str, Any]:
        """Copy the previous chunk into the memory and return what a request says of it.

        Raises:
            PolicyError: the previous chunk is not (n, action_dim) with n up to the horizon.
        """
        previous, rows = continuation.previous, len(continuation.previous)
        if previous.ndim != 2 or previous.shape[1] != self.previous.shape[1] or not 1 <= rows <= len(self.previous):
            horizon, dim = self.previous.shape
            raise PolicyError(
                f"continuation: expected previous actions of shape ('n', {dim}), n from 1 to {horizon}, "
                f"got {previous.shape}"
            )
        np.copyto(self.previous[:rows], previous)
        return {
            "rows": rows,
            "frozen": int(continuation.frozen),
            "horizon": int(continuation.horizon),
            "method": continuation.method.value,
        }

    def continuation(self, described: Mapping[str, Any] | None) -> Continuation | None:
        """Return the continuation that a request describes, on this memory's array."""
        if described is None:
            return None
        previous = self.previous[: described["rows"]]
        return Continuation(previous, described["frozen"], described["horizon"], Method(described["method"]))

    def close(self) -> None:
        """Unmap the memory and close its descriptor; arrays taken from it keep their pages until they go."""
        if self.fd < 0:
            return
        self.observation.clear()
        del self.previous, self.actions
        with contextlib.suppress(BufferError):  # someone (a traceback, say) still holds an array: the pages go with it
            self._map.close()
        os.close(self.fd)
        self.fd = -1

    def _view(self, first: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.frombuffer(self._map, dtype, int(np.prod(shape)), first).reshape(shape)


def _padded(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of an array, rounded up to the alignment."""
    return -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
