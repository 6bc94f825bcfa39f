"""Processes of one thread each that play blocks of episodes; this process alone where one is enough.

A process keeps the entry that it opened last, and blocks are handed out entry by entry, so that each is opened once per
process. Networks come to it through a pipe: nothing is read from files there. It ends when that pipe is closed.
"""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.policy import PolicyRuntime
from training.compare.config import CompareError
from training.compare.contenders import Runnable
from training.evaluate import Scores, roll_out
from training.signals import follow_parent, signals_wait, stop_on_signal
from training.stress import Stress

POLL_SECONDS = 0.5
STOP_SECONDS = 5.0  # for a process that plays nothing


@dataclass(frozen=True, slots=True)
class Block:
    """Episodes of one entry on one task."""

    entry: str
    task: str
    stress: Stress
    seeds: tuple[int, ...]
    steps: int | None


@dataclass(frozen=True, slots=True)
class Played:
    """A block's scores and the seconds it took."""

    block: Block
    scores: Scores
    seconds: float


def play(policy: PolicyRuntime, block: Block) -> Played:
    """Play one block in this process."""
    started = time.monotonic()
    history = next(iter(policy.spec.observations.values())).history
    scores = roll_out(policy, block.seeds, history, block.steps, block.stress, progress=False)
    return Played(block, scores, time.monotonic() - started)


def play_all(blocks: Sequence[Block], runnable: Callable[[str], Runnable], workers: int) -> Iterator[Played]:
    """Play blocks, in this process or in others, and yield each as soon as it is done.

    INT, TERM and HUP, to this process or to all, end it after the blocks that are being played; a second INT at once.
    What was yielded is all that was played: the caller finds out from what is missing.

    Args:
        blocks: in the order in which they are begun; those of one entry together.
        runnable: opens an entry; it is asked for it once, before its first block.
        workers: processes.

    Raises:
        CompareError: a process was lost, or failed.
        UserError: an entry cannot be opened or run.
    """
    with stop_on_signal() as stop:
        if workers <= 1:
            yield from _play_here(blocks, runnable, stop)
        else:
            yield from _play_there(blocks, runnable, min(workers, max(1, len(blocks))), stop)


def _play_here(blocks: Sequence[Block], runnable: Callable[[str], Runnable], stop: threading.Event) -> Iterator[Played]:
    entry, policy = None, None
    try:
        for block in blocks:
            if stop.is_set():
                return
            if policy is None or block.entry != entry:
                if policy is not None:
                    policy.close()
                opened = runnable(block.entry)
                policy, entry = PolicyRuntime(opened.spec, opened.engine()), block.entry
            yield play(policy, block)
    finally:
        if policy is not None:
            policy.close()


class _Process:
    """One process and what it has been given."""

    def __init__(self, context: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with theirs:
            self.process.start()
        self.entry: str | None = None
        self.block: Block | None = None

    def give(self, block: Block, packed: Callable[[str], bytes]) -> None:
        """Have a block played; its entry is sent along where the process has another one.

        Raises:
            OSError: the process is gone.
        """
        payload = b"" if block.entry == self.entry else packed(block.entry)
        self.entry, self.block = block.entry, block
        self.pipe.send_bytes(payload)
        self.pipe.send(block)

    def take(self) -> Played:
        """The block's scores.

        Raises:
            CompareError: the entry cannot be run, or the process is gone.
        """
        assert self.block is not None
        block, self.block = self.block, None
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise CompareError(
                f"the process that played {block.entry} on {block.task} ended early (killed, or out of memory); what "
                "was played is kept: give the same command again, with fewer --workers if memory is short"
            ) from error
        if isinstance(answer, Played):
            return answer
        raise CompareError(f"entry {block.entry}: {answer}")


def _play_there(
    blocks: Sequence[Block], runnable: Callable[[str], Runnable], workers: int, stop: threading.Event
) -> Iterator[Played]:
    context = multiprocessing.get_context("spawn")
    waiting = list(blocks)
    last: dict[str, bytes] = {}

    def packed(entry: str) -> bytes:
        if entry not in last:
            opened = pickle.dumps(runnable(entry))
            last.clear()  # one is enough: blocks come entry by entry
            last[entry] = opened
        return last[entry]

    processes: list[_Process] = []
    patience = 0.0
    try:
        with signals_wait():  # not that below: where it has to be started, that unblocks signals
            resource_tracker.ensure_running()
        with signals_wait():
            while len(processes) < workers:
                processes.append(_Process(context))
        while True:
            for process in processes:
                if waiting and process.block is None and not stop.is_set():
                    block = waiting.pop(next((i for i, b in enumerate(waiting) if b.entry == process.entry), 0))
                    try:
                        process.give(block, packed)
                    except OSError:
                        process.take()  # which says that it is gone
            busy = {process.pipe: process for process in processes if process.block is not None}
            if not busy:
                patience = STOP_SECONDS
                return
            for pipe in wait(list(busy), POLL_SECONDS):
                yield busy[pipe].take()  # type: ignore[index]
    finally:
        with signals_wait():
            _end(processes, patience)


def _end(processes: Sequence[_Process], patience: float) -> None:
    """End the processes: those that play nothing within ``patience`` seconds by themselves, the others then."""
    for process in processes:
        process.pipe.close()
    deadline = time.monotonic() + patience
    for process in processes:
        process.process.join(max(0.0, deadline - time.monotonic()))
        if process.process.is_alive():
            process.process.kill()
            process.process.join()


def _serve(pipe: Connection) -> None:
    """Play blocks until the pipe is closed; what fails is answered as text."""
    follow_parent()
    import torch

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave behind
    policy: PolicyRuntime | None = None
    with pipe, suppress(EOFError, OSError):  # the parent closed its end
        while True:
            payload = pipe.recv_bytes()
            block: Block = pipe.recv()
            try:
                if payload:
                    if policy is not None:
                        policy.close()
                    opened: Runnable = pickle.loads(payload)  # noqa: S301 (from our own parent)
                    policy = PolicyRuntime(opened.spec, opened.engine())
                assert policy is not None
                answer: Played | str = play(policy, block)
            except UserError as error:
                answer = str(error)
            except Exception as error:  # noqa: BLE001 (goes to the parent, which ends)
                traceback.print_exc()
                answer = (
                    f"playing it on {block.task} failed with {type(error).__name__}: {error} (where is told above); "
                    "what was played is kept"
                )
            pipe.send(answer)
