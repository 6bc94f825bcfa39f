"""Real-time scheduling of threads (Linux): what is asked for, what the system grants, what is in effect.

:func:`apply` changes the thread that calls it. That alone does not keep other processes from delaying a control thread:
another thread of its process that holds the interpreter lock, or a lock of the middleware, may itself wait for a
processor, and the control thread then waits for that one (priority inversion; ticks 2 to 11 ms late were measured).
:func:`cover` gives every thread of the process a priority below, so that whoever holds a lock runs. Neither changes
processes that are started. Memory can be locked for a whole process only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dcqfa_ros.errors import UserError

SWITCH_INTERVAL_S = 0.0005
"""How long a thread of a node may keep Python's interpreter lock while another waits (``sys.setswitchinterval``).

With the default of 5 ms, whatever another thread computes delays a control tick by as much.
"""

_MCL_CURRENT, _MCL_FUTURE = 1, 2
_HINT = "see docs/realtime.md for limits.conf"


class RealtimeError(UserError, ValueError):
    """A setting that no system could grant; the message names it."""


@dataclass(frozen=True, slots=True)
class RealtimeSettings:
    """What a control thread asks for.

    Attributes:
        priority: of SCHED_FIFO, 1 to 99; 0 leaves the scheduler as it is.
        cpus: processors the thread may run on; empty leaves them as they are.
        lock_memory: keep the whole process in memory.
    """

    priority: int = 0
    cpus: tuple[int, ...] = ()
    lock_memory: bool = False

    @classmethod
    def of(cls, priority: int, cpus: str, lock_memory: bool) -> RealtimeSettings:
        """Read the settings as parameters give them; ``cpus`` is like ``1`` or ``2,3``.

        Raises:
            RealtimeError: names the parameter, what it is and what was expected.
        """
        if not 0 <= priority <= 99:
            raise RealtimeError(f"realtime_priority: expected 0 (none) to 99, got {priority}")
        words = [word.strip() for word in cpus.split(",") if word.strip()]
        if not all(word.isascii() and word.isdigit() for word in words):
            raise RealtimeError(f"cpu_affinity: expected numbers of processors such as 1 or 2,3, got {cpus!r}")
        return cls(priority, tuple(sorted({int(word) for word in words})), lock_memory)


@dataclass(frozen=True, slots=True)
class Scheduling:
    """What is in effect for one thread.

    Attributes:
        scheduler: ``SCHED_OTHER``, ``SCHED_FIFO``, ...; ``unknown`` where the system does not say.
        priority: real-time priority, 0 under SCHED_OTHER.
        cpus: processors it may run on.
    """

    scheduler: str
    priority: int
    cpus: tuple[int, ...]

    @property
    def text(self) -> str:
        """Scheduler with its priority, for reports."""
        return f"{self.scheduler} {self.priority}" if self.priority else self.scheduler


def scheduling(thread: int = 0) -> Scheduling:
    """Return what is in effect for a thread, given by its native id (0: the caller)."""
    if not hasattr(os, "sched_getscheduler"):
        return Scheduling("unknown", 0, ())
    try:
        number = os.sched_getscheduler(thread) & ~getattr(os, "SCHED_RESET_ON_FORK", 0)
        priority = os.sched_getparam(thread).sched_priority
        cpus = tuple(sorted(os.sched_getaffinity(thread)))
    except OSError:  # it has ended
        return Scheduling("unknown", 0, ())
    names = ("SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_IDLE")
    found = {getattr(os, name): name for name in names if hasattr(os, name)}
    return Scheduling(found.get(number, "unknown"), priority, cpus)


def processor_ticks(stat: Path = Path("/proc/stat")) -> list[int]:
    """Return user, nice, system, idle, iowait, irq, softirq, steal of all processors, clock ticks since boot.

    Empty where the system does not say.
    """
    try:
        words = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
        ticks = [int(word) for word in words[1:9]] if words[:1] == ["cpu"] else []
    except (OSError, ValueError):
        return []
    return ticks if len(ticks) == 8 else []


def steal_share(before: Collection[int], after: Collection[int]) -> float | None:
    """Return the share (0 to 1) of processor time that the hypervisor took between two :func:`processor_ticks`.

    None where one of them is empty; 0 where no time has passed.
    """
    if not before or not after:
        return None
    spent = [max(0, b - a) for a, b in zip(before, after, strict=True)]
    return spent[7] / sum(spent) if sum(spent) else 0.0


def apply(settings: RealtimeSettings) -> list[str]:
    """Apply ``settings`` to the calling thread; what the system refuses stays as it was.

    Returns:
        One sentence per refusal, with what to do; empty where everything was granted.
    """
    refusals = [_set_cpus(settings.cpus), _set_priority(settings.priority)]
    if settings.lock_memory:
        refusals.append(_lock_memory())
    return [text for text in refusals if text]


def cover(priority: int) -> str:
    """Give the threads of this process that are not real-time yet SCHED_FIFO, one below ``priority``.

    Threads that begin later are not; call it again.

    Args:
        priority: of the control thread; 0: nothing is done.

    Returns:
        Why the system refused, with what to do; empty where it did not.
    """
    if not priority or not hasattr(os, "sched_setscheduler"):
        return ""
    for number in _threads():
        if scheduling(number).priority == 0:
            refusal = _set_priority(_below(priority), number)
            if refusal:
                return refusal
    return ""


def uncover(priority: int) -> None:
    """Give the threads that :func:`cover` gave a priority the scheduler of every other process again."""
    if not priority or not hasattr(os, "sched_setscheduler"):
        return
    for number in _threads():
        if scheduling(number).priority == _below(priority):
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setscheduler(number, os.SCHED_OTHER, os.sched_param(0))


def _threads() -> list[int]:
    """Native ids of this process' threads, those of the middleware among them."""
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def _below(priority: int) -> int:
    return max(1, priority - 1)


def _set_cpus(cpus: Collection[int]) -> str:
    if not cpus:
        return ""
    if not hasattr(os, "sched_setaffinity"):
        return "cpu_affinity: this system has no affinity of threads"
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        if error.errno != errno.EINVAL:
            return f"cpu_affinity {sorted(cpus)} refused: {error.strerror}"
        missing = sorted(cpus)
    else:  # the system leaves out those that there are not
        missing = sorted(set(cpus) - os.sched_getaffinity(0))
    if not missing:
        return ""
    os.sched_setaffinity(0, before)
    return f"cpu_affinity: there is no processor {missing[0]}, or it is not in this container's set"


def _set_priority(priority: int, thread: int = 0) -> str:
    if not priority:
        return ""
    if not hasattr(os, "sched_setscheduler"):
        return "realtime_priority: this system has no real-time scheduler"
    policy = os.SCHED_FIFO | getattr(os, "SCHED_RESET_ON_FORK", 0)  # processes it starts do not inherit it
    try:
        os.sched_setscheduler(thread, policy, os.sched_param(priority))
    except ProcessLookupError:
        return ""  # that thread has ended
    except OSError as error:
        limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0] if hasattr(resource, "RLIMIT_RTPRIO") else 0
        return f"realtime_priority {priority} refused: {error.strerror}, the limit (rtprio) is {limit}; {_HINT}"
    return ""


def _lock_memory() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if sys.platform != "linux":
        return "lock_memory: only on Linux"
    if limit != resource.RLIM_INFINITY and os.geteuid() != 0:
        # With a limit the call may succeed now and every later allocation beyond it fail.
        return f"lock_memory refused: the limit (memlock) is {limit} bytes, expected unlimited; {_HINT}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        return f"lock_memory refused: {os.strerror(ctypes.get_errno())}; {_HINT}"
    return ""
