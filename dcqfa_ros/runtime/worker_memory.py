"""Shared memory between a process and its engine worker: one observation in, one chunk of actions out.

The memory is an anonymous file (``memfd_create``): it has no name under ``/dev/shm``, so it does not depend on that
folder's size and cannot be left behind, whoever dies in whichever way.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping

import numpy as np

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.observations import ObservationLayout

_ITEM = np.dtype(np.float32).itemsize


class ChunkMemory:
    """Arrays over shared memory, laid out by the bundle's description, which both processes read.

    Attributes:
        observation: key -> (1, history, *shape), float32, raw units.
        actions: (1, executed, action_dim), float32, raw units.
        fd: file descriptor of the memory, for the other process.
    """

    def __init__(self, spec: BundleSpec, fd: int | None = None) -> None:
        """Create the memory, or map the one behind ``fd``.

        Raises:
            PolicyError: the bundle has observations that this runtime cannot carry, or ``fd`` belongs to another
                layout.
        """
        layout = ObservationLayout(spec)
        shapes = {key.name: (1, layout.history, *key.shape) for key in layout.keys}
        action_shape = (1, spec.action.executed, spec.action.dim)
        size = _ITEM * (sum(int(np.prod(s)) for s in shapes.values()) + int(np.prod(action_shape)))
        if fd is None:
            fd = os.memfd_create("dcqfa_chunk")
            os.ftruncate(fd, size)
        elif os.fstat(fd).st_size != size:
            raise PolicyError(
                f"shared memory holds {os.fstat(fd).st_size} bytes, expected {size}: the bundle has changed"
            )
        self.fd = fd
        self._map = mmap.mmap(fd, size)
        self.observation: dict[str, Float32] = {}
        first = 0
        for name, shape in shapes.items():
            self.observation[name] = self._view(first, shape)
            first += int(np.prod(shape))
        self.actions = self._view(first, action_shape)

    def put(self, observation: Mapping[str, Float32]) -> None:
        """Copy a checked observation, key -> (1, history, *shape), into the memory."""
        for name, array in self.observation.items():
            np.copyto(array, observation[name])

    def close(self) -> None:
        """Unmap the memory and close its descriptor; arrays taken from it keep their pages until they go."""
        if self.fd < 0:
            return
        self.observation.clear()
        del self.actions
        with contextlib.suppress(BufferError):  # someone (a traceback, say) still holds an array: the pages go with it
            self._map.close()
        os.close(self.fd)
        self.fd = -1

    def _view(self, first: int, shape: tuple[int, ...]) -> Float32:
        count = int(np.prod(shape))
        return np.frombuffer(self._map, np.float32, count, first * _ITEM).reshape(shape)
