"""Groups of worlds on a Ray cluster, by actors of one CPU each.

The kit travels once, the weights once a round, both through the object store; no file is read on the other machines,
but this package and what ``requirements/train.txt`` lists have to be installed there.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from training.rollouts_group import Float, GroupRunner, Job, Kit, RolloutError, Visited
from training.search.distance import DistanceError
from training.search.ray_executor import (
    ADDRESS,
    INSTALL,
    LOSSES,
    POLL_SECONDS,
    START_SECONDS,
    cause,
    connect,
    import_ray,
)

KEPT = "the last checkpoint is kept: give the same command again"


class Actor:
    """What runs on the cluster."""

    def __init__(self, kit: Kit) -> None:
        """Build the networks."""
        torch.set_num_threads(1)
        self._runner = GroupRunner(kit)

    def begin(self) -> bool:
        """Answer as soon as there are networks."""
        return True

    def run(self, weights: Float, job: Job) -> Visited:
        """Run one group."""
        self._runner.load(weights)
        return self._runner.run(job)


class RayWorkers:
    """Actors of a Ray cluster; implements :class:`training.rollouts_workers.Workers`.

    An actor gets jobs once it has begun. So a cluster with fewer free CPUs than ``count`` works with the actors that it
    has room for, and the others join when CPUs become free.

    Attributes:
        count: number of actors that are asked for.
    """

    def __init__(self, kit: Kit, address: str, count: int) -> None:
        """Take the address (``auto``, ``local``, ``host:port`` or ``ray://host:port``); nothing is connected yet.

        Raises:
            UserError: ray is not installed.
            RolloutError: that is no address.
        """
        if not ADDRESS.fullmatch(address):
            raise RolloutError(f"--ray {address}: expected auto, local, host:port or ray://host:port")
        self.count, self._address, self._kit = count, address, kit
        self._ray = import_ray()
        self._class: Any = None
        self._shipped: Any = None  # the kit in the object store; None before the first round
        self._running: dict[Any, tuple[Any, int | None]] = {}  # actor and number of its job; None while it begins
        self._idle: list[Any] = []
        self._lost_at_start = 0  # in a row

    def _connect(self, size: int) -> None:
        teacher = sum(value.nbytes for value in (self._kit.teacher or {}).values())
        try:
            connect(self._ray, self._address, self.count, teacher + size)
        except DistanceError as error:
            raise RolloutError(str(error)) from error
        self._shipped = self._ray.put(self._kit)
        self._class = self._ray.remote(num_cpus=1)(Actor)
        self._lost_at_start = 0
        for _ in range(self.count):
            self._hire()

    def _hire(self) -> None:
        actor = self._class.remote(self._shipped)
        self._running[actor.begin.remote()] = actor, None

    def run(self, weights: Float, jobs: Sequence[Job]) -> list[Visited]:
        """See :meth:`training.rollouts_workers.Workers.run`; what a lost actor was running is given to another.

        Raises:
            RolloutError: there is no cluster, a job failed, its actors were lost repeatedly, or no actor begins.
        """
        waiting, found, lost = deque(range(len(jobs))), dict[int, Visited](), Counter[int]()
        try:
            if self._shipped is None:
                self._connect(weights.nbytes)
            state = self._ray.put(weights)
            while len(found) < len(jobs):
                while waiting and self._idle:
                    actor, number = self._idle.pop(), waiting.popleft()
                    self._running[actor.run.remote(state, jobs[number])] = actor, number
                for actor, job, answer in self._finished():
                    if answer is None:
                        self._replace(actor)
                        if job is None:
                            self._lost_at_start += 1
                            self._check_losses(self._lost_at_start)
                        else:
                            lost[job] += 1
                            waiting.appendleft(job)
                            self._check_losses(lost[job])
                        continue
                    self._idle.append(actor)
                    if job is None:
                        self._lost_at_start = 0
                    else:
                        found[job] = answer
        except ConnectionError as error:
            self.close()
            raise RolloutError(f"--ray {self._address}: the connection was lost ({cause(error)}); {KEPT}") from error
        except BaseException:  # results of this round must not be taken for the next one's
            self.close()
            raise
        return [found[number] for number in range(len(jobs))]

    def _finished(self) -> Iterator[tuple[Any, int | None, Any]]:
        """Actors that ended something, the number of their job (None: they have begun) and the answer, None if lost."""
        give_up = time.monotonic() + START_SECONDS
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_SECONDS)
            # A job takes as long as it takes. Where there are only actors that begin, there may be no free CPU at all.
            busy = any(job is not None for _, job in self._running.values())
            if not ready and not busy and time.monotonic() > give_up:
                raise RolloutError(
                    f"--ray {self._address}: no worker answered within {START_SECONDS:.0f} s; `ray status` says "
                    f"whether the cluster has a free CPU; {KEPT}"
                )
        for ref in ready:
            actor, job = self._running.pop(ref)
            yield actor, job, self._result(ref)

    def _result(self, ref: Any) -> Any:
        """What an actor answered; None where it was lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            raise RolloutError(f"--ray {self._address}: a worker failed ({cause(error)}); {INSTALL}") from error
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise RolloutError(
                    f"--ray {self._address}: a worker cannot start ({cause(error)}); {INSTALL}"
                ) from error
            return None

    def _replace(self, actor: Any) -> None:
        print(f"--ray {self._address}: a worker was lost; another one takes its place", file=sys.stderr)
        with suppress(Exception):  # it is gone, or cannot be reached
            self._ray.kill(actor)
        self._hire()

    def _check_losses(self, count: int) -> None:
        if count > LOSSES:
            raise RolloutError(
                f"--ray {self._address}: {count} workers in a row were lost over the same work (killed, or out of "
                f"memory); {KEPT}, with fewer --workers if memory is short"
            )

    def close(self) -> None:
        """Disconnect, which ends the actors and a local instance; a further :meth:`run` connects anew."""
        self._ray.shutdown()
        self._shipped = None
        self._running, self._idle = {}, []
