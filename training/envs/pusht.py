"""Many Push-T worlds advanced together by whole action chunks, in this process or in a pool of processes.

Every world has its own physics space, so the result does not depend on how worlds are spread over processes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.errors import UserError
from dcqfa_ros.sim.pusht import PushTWorld


@dataclass(frozen=True, slots=True)
class WorldState:
    """What one world reports after a reset or a chunk."""

    history: Mapping[str, NDArray[np.float32]]  # per key (history, *shape), newest last, raw units
    score: float
    steps: int
    done: bool


class _Group:
    """The worlds of one process, by their index in the whole set."""

    def __init__(self, seeds: Mapping[int, int], history: int) -> None:
        self._seeds, self._history = seeds, history
        self._worlds = {index: PushTWorld() for index in seeds}
        self._past: dict[int, list[dict[str, NDArray[np.float32]]]] = {}

    def reset(self) -> dict[int, WorldState]:
        states = {}
        for index, world in self._worlds.items():
            world.reset(seed=self._seeds[index])
            self._past[index] = [world.observation()] * self._history  # before the start the first observation repeats
            states[index] = WorldState(self._stack(index), 0.0, 0, False)
        return states

    def step(self, chunks: Mapping[int, NDArray[np.float32]]) -> dict[int, WorldState]:
        states = {}
        for index, chunk in chunks.items():
            world, past = self._worlds[index], self._past[index]
            for action in chunk:
                result = world.step(action)
                past.append(world.observation())
                if result.done:
                    break
            del past[: -self._history]
            states[index] = WorldState(self._stack(index), world.score_so_far, world.steps, world.done)
        return states

    def _stack(self, index: int) -> dict[str, NDArray[np.float32]]:
        past = self._past[index]
        return {key: np.stack([observation[key] for observation in past]) for key in past[0]}


def _serve(connection: Connection, seeds: dict[int, int], history: int) -> None:
    """Body of a pool process: answer chunk by chunk until the parent closes the pipe."""
    try:
        group = _Group(seeds, history)
        connection.send(group.reset())
        while True:
            connection.send(group.step(connection.recv()))
    except UserError as error:  # the simulator is not installed
        connection.send(error)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the parent is gone or shutting down


class PushTWorlds:
    """Push-T worlds of the given start seeds; ``close`` ends its processes (``contextlib.closing``)."""

    def __init__(self, seeds: Sequence[int], history: int, workers: int = 1) -> None:
        """Make the worlds.

        Args:
            seeds: one legacy start seed per world.
            history: number of newest observations reported per world.
            workers: processes that step the worlds; 1 steps them here.
        """
        self.seeds = tuple(seeds)
        workers = max(1, min(workers, len(self.seeds)))
        shares = [{i: self.seeds[i] for i in range(first, len(self.seeds), workers)} for first in range(workers)]
        self._local = _Group(shares[0], history) if workers == 1 else None
        self._pipes: list[Connection] = []
        self._shares = [frozenset(share) for share in shares]
        self._processes = []
        if self._local is None:
            context = multiprocessing.get_context("spawn")
            for share in shares:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, share, history), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)

    def reset(self) -> list[WorldState]:
        """Put every world into its seed's start state (once) and return the states in seed order."""
        states = self._local.reset() if self._local is not None else self._gather(range(len(self._pipes)))
        return [states[index] for index in range(len(self.seeds))]

    def step(self, chunks: Mapping[int, NDArray[np.float32]]) -> dict[int, WorldState]:
        """Execute a chunk (n, 2) of target positions in px in each world named by its index; stops where it is done."""
        if self._local is not None:
            return self._local.step(chunks)
        busy = []
        for number, (pipe, share) in enumerate(zip(self._pipes, self._shares, strict=True)):
            part = {index: chunk for index, chunk in chunks.items() if index in share}
            if part:
                try:
                    pipe.send(part)
                except BrokenPipeError as error:
                    raise self._died(number) from error
                busy.append(number)
        return self._gather(busy)

    def _gather(self, numbers: Sequence[int]) -> dict[int, WorldState]:
        states: dict[int, WorldState] = {}
        for number in numbers:
            try:
                answer = self._pipes[number].recv()
            except (EOFError, ConnectionResetError) as error:
                raise self._died(number) from error
            if isinstance(answer, UserError):
                raise answer
            states.update(answer)
        return states

    def _died(self, number: int) -> RuntimeError:
        process = self._processes[number]
        process.join(1.0)
        return RuntimeError(f"environment process {process.pid} ended with exit code {process.exitcode}")

    def close(self) -> None:
        """End the pool's processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
