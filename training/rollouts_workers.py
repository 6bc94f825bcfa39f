"""Processes that run groups of worlds: this one, others on this machine, or actors of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import torch

from training.rollouts_group import Float, GroupRunner, Job, Kit, RolloutError, Visited
from training.signals import follow_parent, signals_wait

STOP_SECONDS = 5.0


class Workers(Protocol):
    """Runs jobs. Which worker runs one does not change what it gives, beyond float rounding between machines.

    Attributes:
        count: number of workers.
    """

    count: int

    def run(self, weights: Float, jobs: Sequence[Job]) -> list[Visited]:
        """Run all jobs with these weights (see :func:`training.rollouts_group.flat_state`); results in their order.

        Raises:
            RolloutError: workers were lost, or a job failed.
        """
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class OwnProcess:
    """Runs jobs one after the other in this process."""

    count = 1

    def __init__(self, kit: Kit, threads: int | None = None) -> None:
        """Build the networks.

        Args:
            kit: what they need.
            threads: of PyTorch while jobs run; with 1 they give, bit for bit, what other processes of this machine
                give. None leaves whatever PyTorch has.
        """
        self._threads = threads
        with _on_threads(threads):
            self._runner = GroupRunner(kit)

    def run(self, weights: Float, jobs: Sequence[Job]) -> list[Visited]:
        """See :meth:`Workers.run`."""
        with _on_threads(self._threads):
            self._runner.load(weights)
            return [self._runner.run(job) for job in jobs]

    def close(self) -> None:
        """Nothing to end."""


class LocalWorkers:
    """Processes of this machine, of one thread each; they read the weights from memory that all share.

    A worker drives its worlds with a policy of its own: nothing is exchanged within a round, and every core computes
    networks or physics all the time.
    """

    def __init__(self, kit: Kit, count: int) -> None:
        """Start ``count`` processes."""
        self.count = count
        self._context = multiprocessing.get_context("spawn")
        self._kit = kit
        self._weights: Any = None  # shared, made when its size is known
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self, size: int) -> None:
        """Start the processes and send them the kit.

        Raises:
            OSError: a process ended before it had the kit.
        """
        self._weights = self._context.RawArray("f", size)
        with signals_wait():  # not that below: where it has to be started, that unblocks signals
            resource_tracker.ensure_running()
        for _ in range(self.count):
            ours, theirs = self._context.Pipe()
            self._pipes.append(ours)
            # Arguments go through a pipe whose other end this process holds too, so a process that dies before it has
            # read them is never noticed once they exceed the pipe's buffer. These two are a few hundred bytes.
            process = self._context.Process(target=_serve, args=(theirs, self._weights), daemon=True)
            with theirs, signals_wait():
                process.start()
                self._processes.append(process)
        for pipe in self._pipes:  # only now: they import PyTorch at the same time
            pipe.send(self._kit)

    def run(self, weights: Float, jobs: Sequence[Job]) -> list[Visited]:
        """See :meth:`Workers.run`."""
        waiting, found = deque(enumerate(jobs)), dict[int, Visited]()
        busy: dict[Connection, int] = {}
        try:
            if self._weights is None:
                self._start(len(weights))
            np.frombuffer(self._weights, np.float32)[:] = weights
            idle = list(self._pipes)
            while waiting or busy:
                while waiting and idle:
                    pipe, (number, job) = idle.pop(), waiting.popleft()
                    pipe.send(job)
                    busy[pipe] = number
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    answer = ready.recv()
                    if isinstance(answer, str):
                        raise RolloutError(answer)
                    found[busy.pop(ready)] = answer
                    idle.append(ready)
        except (EOFError, OSError) as error:
            self.close()
            raise RolloutError(
                "a process that runs rollouts ended early (killed, or out of memory); the last checkpoint is kept: "
                "give the same command again, with fewer --workers if memory is short"
            ) from error
        except BaseException:  # results of this round must not be taken for the next one's
            self.close()
            raise
        return [found[number] for number in range(len(jobs))]

    def close(self) -> None:
        """End the processes; a further :meth:`run` starts new ones."""
        for pipe in self._pipes:
            pipe.close()  # a process that reads an end of file ends
        for process in self._processes:
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes, self._weights = [], [], None


@contextmanager
def _on_threads(count: int | None) -> Iterator[None]:
    """Give PyTorch ``count`` threads meanwhile; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _serve(pipe: Connection, shared: Any) -> None:
    """Take the kit and then jobs from ``pipe`` until it ends; what fails is answered as text.

    Args:
        pipe: to the parent.
        shared: array of C floats, the weights (P,).
    """
    follow_parent()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):  # the parent closed its end
        runner = GroupRunner(pipe.recv())
        while True:
            job = pipe.recv()
            try:
                runner.load(np.frombuffer(shared, np.float32))
                answer: Visited | str = runner.run(job)
            except RolloutError as error:
                answer = str(error)
            except Exception as error:  # noqa: BLE001 (goes to the parent, which ends the run)
                answer = f"a rollout failed: {type(error).__name__}: {error}"
            pipe.send(answer)


def open_workers(kit: Kit, groups: int, workers: int | None, ray: str | None) -> Workers:
    """Workers for rounds of ``groups`` jobs; processes, or a connection to a cluster, begin with the first round.

    Args:
        kit: what they need.
        groups: jobs of a round; more workers than that are not started.
        workers: processes or actors; None for one per core that this process may use, or one per group on a cluster.
        ray: address of a Ray cluster; None for this machine.

    Raises:
        UserError: that is no address of a cluster, or ray is not installed.
    """
    if ray is not None:
        from training.rollouts_ray import RayWorkers  # Ray is imported where an address is given

        return RayWorkers(kit, ray, min(groups, workers) if workers else groups)
    count = min(groups, workers or len(os.sched_getaffinity(0)))
    return OwnProcess(kit, threads=1) if count == 1 else LocalWorkers(kit, count)
