"""Where distances are measured: in this process, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.context import SpawnContext
from typing import Any, Protocol

import torch

from training.search.distance import DistanceError, Measure, Parcel, SubnetDistance
from training.subnet import Subnet


class Executor(Protocol):
    """Measures distances; subnets are independent of each other, so every executor gives the same figures.

    Attributes:
        name: for people and results.
    """

    name: str

    def measuring(self, distance: SubnetDistance) -> AbstractContextManager[tuple[Measure, int]]:
        """A measure and the number of workers behind it, which end with the context, whatever ends it.

        Raises:
            DistanceError: there are no workers, or they were lost.
        """
        ...


class LocalExecutor:
    """Processes of this machine, of one thread each; this process alone where there is one.

    Attributes:
        name: for people and results.
        workers: processes.
    """

    name = "local"

    def __init__(self, workers: int | None = None) -> None:
        """Take the number of processes; None for one per core that this one may use."""
        self.workers = workers or len(os.sched_getaffinity(0))

    @contextmanager
    def measuring(self, distance: SubnetDistance) -> Iterator[tuple[Measure, int]]:
        """Start the processes. They share networks and samples in memory; nothing is read from files there.

        Raises:
            DistanceError: a process was killed.
        """
        if self.workers == 1:
            yield distance, 1
            return
        context = multiprocessing.get_context("spawn")
        arguments = (_shared(context, distance.parcel()),)
        with ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start, initargs=arguments) as pool:

            def measure(subnets: Sequence[Subnet]) -> Iterator[float]:
                try:
                    results = pool.map(_distance, subnets)
                # Where one ends, descriptors are closed under the start of another: OSError, or ValueError for one
                # whose number was given away twice.
                except (BrokenProcessPool, OSError, ValueError) as error:
                    raise _ended_early() from error
                try:
                    yield from results
                except (BrokenProcessPool, OSError) as error:
                    raise _ended_early() from error

            yield measure, self.workers


def _ended_early() -> DistanceError:
    return DistanceError(
        "a process that measures distances ended early (killed, or out of memory); what was measured is kept: give "
        "the same command again, with fewer --workers if memory is short"
    )


def _shared(context: SpawnContext, parcel: Parcel) -> Any:
    """``parcel`` in memory that processes share, as an array of C bytes.

    Arguments go through a pipe whose other end this process holds too, so a process that is killed before it has read
    them is never noticed once they exceed the pipe's buffer; of such an array only the descriptor does.
    """
    data = pickle.dumps(parcel, pickle.HIGHEST_PROTOCOL)
    shared = context.RawArray("B", len(data))
    memoryview(shared).cast("B")[:] = data
    return shared


_in_worker: SubnetDistance | None = None


def _start(shared: Any) -> None:
    global _in_worker  # a process pool has no other place for what its processes keep
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    parcel: Parcel = pickle.loads(memoryview(shared).cast("B"))  # noqa: S301 (the parent's own)
    _in_worker = parcel.unpacked()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _distance(subnet: Subnet) -> float:
    assert _in_worker is not None
    return _in_worker.distance(subnet)
