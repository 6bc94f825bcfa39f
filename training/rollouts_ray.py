"""Groups of worlds on a Ray cluster, by actors of one CPU each.

The kit travels once, the weights once a round, both through the object store; no file is read on the other machines,
but this package and what ``requirements/train.txt`` lists have to be installed there.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from training.rollouts_group import Float, GroupRunner, Job, Kit, RolloutError, Visited
from training.search.ray_executor import ADDRESS, INSTALL, LOSSES, START_SECONDS, cause, connect, import_ray


class Actor:
    """What runs on the cluster."""

    def __init__(self, kit: Kit) -> None:
        """Build the networks."""
        torch.set_num_threads(1)
        self._runner = GroupRunner(kit)

    def run(self, weights: Float, job: Job) -> Visited:
        """Run one group."""
        self._runner.load(weights)
        return self._runner.run(job)


class RayWorkers:
    """Actors of a Ray cluster; implements :class:`training.rollouts_workers.Workers`.

    Attributes:
        count: number of actors.
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
        self._actors: list[Any] = []

    def _connect(self, size: int) -> None:
        teacher = sum(value.nbytes for value in (self._kit.teacher or {}).values())
        connect(self._ray, self._address, self.count, teacher + size)
        self._shipped = self._ray.put(self._kit)
        self._class = self._ray.remote(num_cpus=1)(Actor)
        self._actors = [self._class.remote(self._shipped) for _ in range(self.count)]

    def run(self, weights: Float, jobs: Sequence[Job]) -> list[Visited]:
        """See :meth:`training.rollouts_workers.Workers.run`; what a lost actor was running is given to another.

        Raises:
            UserError: there is no cluster.
            RolloutError: a job failed, its actors were lost repeatedly, or no actor answers.
        """
        if self._shipped is None:
            self._connect(weights.nbytes)
        state = self._ray.put(weights)
        waiting, found, lost = deque(range(len(jobs))), dict[int, Visited](), Counter[int]()
        busy: dict[Any, tuple[Any, int]] = {}
        idle = list(self._actors)
        try:
            while len(found) < len(jobs):
                while waiting and idle:
                    actor, number = idle.pop(), waiting.popleft()
                    busy[actor.run.remote(state, jobs[number])] = actor, number
                ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=START_SECONDS)
                if not ready:
                    raise RolloutError(
                        f"--ray {self._address}: no worker answered within {START_SECONDS:.0f} s; `ray status` says "
                        "whether the cluster has a free CPU; the last checkpoint is kept"
                    )
                for ref in ready:
                    actor, number = busy.pop(ref)
                    visited = self._result(ref)
                    if visited is None:
                        lost[number] += 1
                        actor = self._replace(actor, lost[number])
                        waiting.appendleft(number)
                    else:
                        found[number] = visited
                    idle.append(actor)
        except ConnectionError as error:
            raise RolloutError(
                f"--ray {self._address}: the connection was lost ({cause(error)}); the last checkpoint is kept: give "
                "the same command again"
            ) from error
        return [found[number] for number in range(len(jobs))]

    def _result(self, ref: Any) -> Visited | None:
        """What an actor answered; None where it was lost."""
        errors = self._ray.exceptions
        try:
            visited: Visited = self._ray.get(ref)
        except errors.RayTaskError as error:
            raise RolloutError(f"--ray {self._address}: a worker failed ({cause(error)}); {INSTALL}") from error
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise RolloutError(
                    f"--ray {self._address}: a worker cannot start ({cause(error)}); {INSTALL}"
                ) from error
            return None
        return visited

    def _replace(self, actor: Any, losses: int) -> Any:
        if losses > LOSSES:
            raise RolloutError(
                f"--ray {self._address}: {losses} workers in a row were lost over the same work (killed, or out of "
                "memory); the last checkpoint is kept: give the same command again, with fewer --workers if memory is "
                "short"
            )
        print(f"--ray {self._address}: a worker was lost; another one takes its place", file=sys.stderr)
        with suppress(Exception):  # it is gone, or cannot be reached
            self._ray.kill(actor)
        fresh = self._class.remote(self._shipped)
        self._actors = [fresh if other is actor else other for other in self._actors]
        return fresh

    def close(self) -> None:
        """Disconnect, which ends the actors and a local instance."""
        if self._shipped is not None:
            self._ray.shutdown()
        self._shipped, self._actors = None, []
