"""Distances measured on a Ray cluster, by actors of one CPU each.

Networks and samples travel once, through the object store; no file is read on the other machines, but this package and
what ``requirements/train.txt`` lists have to be installed there. Ray is imported when an address is given.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from training.search.distance import DistanceError, Measure, Parcel, SubnetDistance
from training.subnet import Subnet

ADDRESS = re.compile(r"auto|local|(ray://)?([\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")
MOST_WORKERS = 64  # where --workers says nothing: generations are not much larger
LOSSES = 3  # workers that may be lost over one network, or in a row before they did anything
START_SECONDS = 300.0  # until the first worker answers: its machine may have to import PyTorch from a slow disk
POLL_SECONDS = 5.0
CONNECT_SECONDS = 10.0
STORE_BYTES = 128 * 2**20  # of an instance started here, beside what is shipped
TOLERANCE = 0.01  # relative: processors that sum in other orders round a few activations to other codes
INSTALL = "install this package and requirements/train.txt in the same versions on every machine of the cluster"


class RayExecutor:
    """Actors of a Ray cluster.

    Attributes:
        name: for people and results.
        address: ``local`` (an instance of its own), ``auto`` (the one of this machine), ``host:port`` or
            ``ray://host:port``.
        workers: actors; None for one per CPU of the cluster, at most :data:`MOST_WORKERS`.
    """

    name = "ray"

    def __init__(self, address: str, workers: int | None = None) -> None:
        """Take the address; nothing is connected yet.

        Raises:
            DistanceError: ray is not installed, or that is no address.
        """
        if not ADDRESS.fullmatch(address):
            raise DistanceError(f"--ray {address}: expected auto, local, host:port or ray://host:port")
        self.address, self.workers = address, workers
        self._ray = import_ray()

    @contextmanager
    def measuring(self, distance: SubnetDistance) -> Iterator[tuple[Measure, int]]:
        """Connect and start actors; they end with the context, and so does an instance that was started for it.

        Raises:
            DistanceError: there is no cluster, no worker starts, one measures other figures than this machine, or
                the same network is lost with several workers.
        """
        parcel = distance.parcel()
        try:
            connect(self._ray, self.address, self.workers, sum(value.nbytes for value in parcel.state.values()))
            count = self.workers or min(MOST_WORKERS, int(self._ray.cluster_resources().get("CPU", 0)))
            if not count:
                raise DistanceError(f"--ray {self.address}: the cluster has no CPU to measure with")
            crew = _Crew(self._ray, distance, parcel, count, self.address)
            yield crew.measure, count
        except ConnectionError as error:
            raise DistanceError(
                f"--ray {self.address}: the connection was lost ({short(error)}); what was measured is kept: "
                "give the same command again"
            ) from error
        finally:
            self._ray.shutdown()  # ends the actors of this driver, and the processes of a local instance


def connect(ray: Any, address: str, cpus: int | None, shipped: int) -> None:
    """Connect to a cluster, or start an instance of this machine where ``address`` is ``local``.

    Args:
        ray: the module.
        address: as :class:`RayExecutor` takes it.
        cpus: of a local instance; None for every core that this process may use.
        shipped: bytes that go through a local instance's object store at a time.

    Raises:
        DistanceError: there is no cluster.
    """
    options: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {
            "num_cpus": cpus or len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES + 4 * shipped,
        }
    try:
        if ":" in address:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            # Ray takes minutes to find out that nobody is there, and may abort this process then.
            with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
                pass
        with _own_sigterm():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, OverflowError, RuntimeError, ValueError, AssertionError) as error:
        raise DistanceError(
            f"--ray {address}: no cluster can be reached there ({short(error)}); start one with "
            "`ray start --head` (one that asks for a token needs RAY_AUTH_MODE=token here), or give --ray local"
        ) from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Take back the handler of SIGTERM behind ``ray.init``, which puts one there that exits in the middle of a step."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


class Worker:
    """What runs in an actor."""

    def __init__(self, parcel: Parcel) -> None:
        """Unpack networks and samples."""
        torch.set_num_threads(1)  # as everywhere: figures do not depend on where they are measured
        self._distance = parcel.unpacked()

    def distance(self, subnet: Subnet) -> float:
        """Distance of one subnet."""
        return self._distance.distance(subnet)

    def introduce(self, subnet: Subnet) -> tuple[float, str]:
        """Distance of a subnet that the driver measured too, and who says so."""
        return self.distance(subnet), f"{platform.node()}, torch {torch.__version__}"


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Of an actor. ``number`` is the subnet's place; None for an introduction and for what nobody waits for."""

    actor: Any
    number: int | None = None
    introduction: bool = False


class _Crew:
    """Actors, replaced where they are lost; what they were measuring is given to others."""

    def __init__(self, ray: Any, distance: SubnetDistance, parcel: Parcel, count: int, address: str) -> None:
        self._ray, self._distance, self._count, self._address = ray, distance, count, address
        self._parcel = ray.put(parcel)
        self._class = ray.remote(num_cpus=1)(Worker)
        self._running: dict[Any, _Task] = {}
        self._idle: list[Any] = []
        self._reference: tuple[Subnet, float] | None = None
        self._lost_at_start = 0
        self._answered = False

    def measure(self, subnets: Sequence[Subnet]) -> Iterator[float]:
        """Distances of ``subnets`` in order, each as soon as it and those before it are known."""
        if not subnets:
            return
        if self._reference is None:
            self._reference = subnets[0], self._distance.distance(subnets[0])
            for _ in range(self._count):
                self._hire()
        waiting, lost = deque(range(len(subnets))), Counter[int]()
        known: dict[int, float] = {}
        try:
            for place in range(len(subnets)):
                while place not in known:
                    while waiting and self._idle:
                        actor, number = self._idle.pop(), waiting.popleft()
                        self._running[actor.distance.remote(subnets[number])] = _Task(actor, number)
                    for task, value in self._finished():
                        if value is None:
                            self._replace(task)
                            if task.number is not None:
                                lost[task.number] += 1
                                waiting.appendleft(task.number)
                                self._check_losses(lost[task.number])
                        elif task.number is not None:
                            known[task.number] = value
                yield known.pop(place)
        finally:  # nobody waits any more for what still runs
            self._running = {ref: _Task(task.actor, None, task.introduction) for ref, task in self._running.items()}

    def _hire(self) -> None:
        assert self._reference is not None
        actor = self._class.remote(self._parcel)
        self._running[actor.introduce.remote(self._reference[0])] = _Task(actor, introduction=True)

    def _replace(self, task: _Task) -> None:
        print(f"--ray {self._address}: a worker was lost; another one takes its place", file=sys.stderr)
        with suppress(Exception):  # it is gone, or cannot be reached
            self._ray.kill(task.actor)
        if task.introduction:
            self._lost_at_start += 1
            self._check_losses(self._lost_at_start)
        self._hire()

    def _check_losses(self, count: int) -> None:
        if count > LOSSES:
            raise DistanceError(
                f"--ray {self._address}: {count} workers in a row were lost over the same work (killed, or out of "
                "memory); what was measured is kept: give the same command again, with fewer --workers if memory is "
                "short"
            )

    def _finished(self) -> list[tuple[_Task, float | None]]:
        """Tasks that ended with what they measured; None for those whose actor was lost."""
        give_up = time.monotonic() + START_SECONDS
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_SECONDS)
            if not ready and not self._answered and time.monotonic() > give_up:
                raise DistanceError(
                    f"--ray {self._address}: no worker answered within {START_SECONDS:.0f} s; `ray status` says "
                    "whether the cluster has a free CPU"
                )
        found: list[tuple[_Task, float | None]] = []
        for ref in ready:
            task = self._running.pop(ref)
            value = self._result(ref, task)
            if value is not None:
                self._idle.append(task.actor)
            found.append((task, value))
        return found

    def _result(self, ref: Any, task: _Task) -> float | None:
        errors = self._ray.exceptions
        try:
            value = self._ray.get(ref)
        except errors.RayTaskError as error:
            raise DistanceError(f"--ray {self._address}: a worker failed ({cause(error)}); {INSTALL}") from error
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise DistanceError(
                    f"--ray {self._address}: a worker cannot start ({cause(error)}); {INSTALL}"
                ) from error
            return None
        if not task.introduction:
            return float(value)
        self._answered, self._lost_at_start = True, 0
        distance, who = value
        assert self._reference is not None
        expected = self._reference[1]
        if abs(distance - expected) > TOLERANCE * abs(expected):
            raise DistanceError(
                f"--ray {self._address}: a worker ({who}) measures {distance:.6g} where this machine measures "
                f"{expected:.6g}; {INSTALL}"
            )
        return float(distance)


def import_ray() -> Any:
    """The module ``ray``, imported where an address is given.

    Raises:
        DistanceError: it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise DistanceError(
            f"--ray: the Python package {error.name} is not installed; pip install -r requirements/ray.txt"
        ) from error
    return ray


def short(error: BaseException) -> str:
    """The first line, and the last one where there are several: of a remote traceback it names the error."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def cause(error: BaseException) -> str:
    """The last line of a remote traceback, which names the error."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
