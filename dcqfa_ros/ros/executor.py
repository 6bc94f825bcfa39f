"""An executor for streams of messages.

rclpy's own gathers every entity of its nodes, enters every handle and makes a wait set anew before each wait, runs each
callback as a task, and wakes itself up twice for every callback it has run: two or three wait sets per message. With
the dozens of entities that a lifecycle node has, that costs several times as much as the messages do. This one keeps
its wait set for as long as the entities stay the same, and calls subscriptions, timers and guard conditions directly.
Whatever else becomes ready (services, clients, events, coroutines) is left to rclpy.

Only what is the same in rclpy of Humble and Jazzy is used of its inside: handles, ``WaitSet``, the lists of a node's
entities, and the guard conditions of an executor.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from rclpy.context import Context
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation as _rclpy
from rclpy.node import Node

_EVENTS_S = 0.5
"""Time between two looks at events (a peer of incompatible quality of service, ...): every publisher and subscription
has some, and waiting for them costs more than waiting for everything else."""

_COUNTED = ("subscriptions", "guard_conditions", "timers", "clients", "services", "events")
_KINDS = ("subscriptions", "guards", "timers", "clients", "services", "waitables")


class StreamExecutor(SingleThreadedExecutor):
    """Runs the callbacks of its nodes in the thread that calls :meth:`spin_once`."""

    def __init__(self, *, context: Context | None = None) -> None:
        """Begin without nodes, in ``context`` (None: rclpy's default)."""
        super().__init__(context=context)
        self._entities: _Entities | None = None
        self._changed = True  # whether there may be other entities now
        self._waiting = threading.RLock()  # while handles are waited on, which must not be let go

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Wait until something is ready, at most ``timeout_sec`` seconds (None: for ever), and run all that is.

        Raises:
            ExternalShutdownException: the context was shut down.
            Exception: what a callback raised; the others that were ready are run by the next call.
        """
        if self._over():
            return
        with self._tasks_lock:
            tasks = bool(self._tasks)
        if tasks:
            super().spin_once(0.0)
            timeout_sec = 0.0
        with self._waiting:
            entities = self._current()
            if self._over():  # asked again: what wakes it is gone after its end
                return
            if entities.take_triggered():  # by a wait of rclpy's own
                timeout_sec = 0.0
            others = entities.wait(-1 if timeout_sec is None or timeout_sec < 0 else round(timeout_sec * 1e9))
        if self._over():
            return
        if not self._context.ok():
            raise ExternalShutdownException
        entities.run(self._over)
        if others:
            super().spin_once(0.0)

    def wake(self) -> None:
        """End a wait; nodes call it when entities were added to them or destroyed."""
        self._changed = True
        super().wake()

    def add_node(self, node: Node) -> bool:
        """Run the callbacks of ``node``, too; returns False where that is so already."""
        added: bool = super().add_node(node)
        self.wake()  # again: what rclpy has woken may have looked before this node was to be seen
        return added

    def remove_node(self, node: Node) -> None:
        """Run the callbacks of ``node`` no more."""
        super().remove_node(node)
        self.wake()

    def shutdown(self, timeout_sec: float | None = None) -> bool:
        """Run nothing more, from whichever thread, and release what the wait set holds; see rclpy."""
        done = super().shutdown(timeout_sec)  # ends a wait
        with self._waiting:
            entities, self._entities = self._entities, None
            if entities is not None:
                entities.release()
        return done

    def _over(self) -> bool:
        return self._is_shutdown

    def _current(self) -> _Entities:
        """Return the wait set of what there is now."""
        if self._entities is not None and not self._changed:
            return self._entities
        self._changed = False  # before looking, so that what changes meanwhile is looked at the next time
        found = {kind: [entity for node in self.get_nodes() for entity in getattr(node, kind)] for kind in _KINDS}
        found["guards"] += [self._guard, self._sigint_gc]
        old = self._entities
        if old is not None and old.are(found):
            return old
        self._entities = None  # should the next line fail, it is tried again
        if old is not None:
            old.release()
        self._entities = _Entities(found, self._context)
        if old is not None:
            self._entities.take_over(old)
        return self._entities


class _Entities:
    """Entities whose handles are held, their wait set, and what of them is ready."""

    def __init__(self, found: dict[str, list[Any]], context: Context) -> None:
        self._found = found
        self._held = ExitStack()
        assert context.handle is not None, "the context was not initialised"
        self._held.enter_context(context.handle)
        held = {kind: self._hold(found[kind]) for kind in _KINDS if kind != "waitables"}
        self._waitables = [w for w in found["waitables"] if self._enter(w)]
        self._add: list[tuple[str, list[Any]]] = [
            ("add_subscription", [e.handle for e in held["subscriptions"]]),
            ("add_guard_condition", [e.handle for e in held["guards"]]),
            ("add_timer", [e.handle for e in held["timers"]]),
            ("add_client", [e.handle for e in held["clients"]]),
            ("add_service", [e.handle for e in held["services"]]),
        ]
        self._events = [w for w in self._waitables if _is_event(w)]
        self._waitables = [w for w in self._waitables if not _is_event(w)]
        self._wait_set = self._make([len(handles) for _, handles in self._add], self._waitables, context)
        self._event_set = self._make([0] * len(self._add), self._events, context)
        self._events_due_s = 0.0
        # The guard conditions of the executor itself only wake it.
        self._guards = _by_pointer((guard for guard in held["guards"] if guard.callback is not None), _guard)
        self._kinds = (
            ("guard_condition", self._guards),
            ("timer", _by_pointer(held["timers"], _timer)),
            ("subscription", _by_pointer(held["subscriptions"], _subscription)),
        )
        # Of raw messages, which are streams of large ones.
        self._streams = [runner for runner in self._kinds[2][1].values() if runner.streams]
        self._streaming = False  # whether one of them is in line
        self._ready: list[_Runner] = []

    @staticmethod
    def _make(counts: list[int], waitables: list[Any], context: Context) -> Any:
        more = [waitable.get_num_entities() for waitable in waitables]
        sums = (sum(getattr(numbers, f"num_{name}") for numbers in more) for name in _COUNTED)
        counts = [count + further for count, further in zip([*counts, 0], sums, strict=True)]
        return _rclpy.WaitSet(*counts, context.handle)

    def _hold(self, entities: list[Any]) -> list[Any]:
        return [entity for entity in entities if entity is not None and self._enter(entity.handle)]

    def _enter(self, handle: Any) -> bool:
        try:
            self._held.enter_context(handle)
        except InvalidHandle:  # destroyed, and not yet off its node's list
            return False
        return True

    def are(self, found: dict[str, list[Any]]) -> bool:
        """Whether these are all of ``found``; each is held here, so that no other can have taken its identity."""
        return all(list(map(id, self._found[kind])) == list(map(id, found[kind])) for kind in _KINDS)

    def release(self) -> None:
        """Let go of the handles: what was destroyed meanwhile ends now."""
        self._held.close()
        self._wait_set.destroy_when_not_in_use()
        self._event_set.destroy_when_not_in_use()

    def take_over(self, old: _Entities) -> None:
        """Put guard conditions in line that were so there, and not run: they say only once that they were triggered."""
        own = {id(runner.entity): runner for runner in self._guards.values()}
        self._ready += [own[id(runner.entity)] for runner in old._ready if id(runner.entity) in own]

    def take_triggered(self) -> bool:
        """Put guard conditions in line that rclpy has seen triggered; returns whether there were any."""
        for guard in self._guards.values():
            if guard.entity._executor_triggered:
                self._ready.append(guard)
        return bool(self._ready)

    def wait(self, timeout_ns: int) -> bool:
        """Wait for something; returns whether anything is ready that :meth:`run` does not run."""
        wait_set = self._wait_set
        wait_set.clear_entities()
        for name, handles in self._add:
            add = getattr(wait_set, name)
            for handle in handles:
                add(handle)
        for waitable in self._waitables:
            waitable.add_to_wait_set(wait_set)
        wait_set.wait(timeout_ns if not self._ready else 0)
        others = False
        for kind, runners in self._kinds:
            for pointer in wait_set.get_ready_entities(kind):
                runner = runners.get(pointer)
                if runner is None:
                    continue
                if runner.is_coroutine():
                    others = True
                    if runners is self._guards:
                        runner.entity._executor_triggered = True
                else:
                    self._ready.append(runner)
                    self._streaming |= runner.streams
        if others or wait_set.get_ready_entities("service") or wait_set.get_ready_entities("client"):
            return True
        return any(waitable.is_ready(wait_set) for waitable in self._waitables) or self._event()

    def _event(self) -> bool:
        """Whether an event is there, asked now and then."""
        now = time.monotonic()
        if now < self._events_due_s:
            return False
        wait_set = self._event_set
        wait_set.clear_entities()
        for event in self._events:
            event.add_to_wait_set(wait_set)
        wait_set.wait(0)
        if any(event.is_ready(wait_set) for event in self._events):
            return True  # there may be more: ask again at once
        self._events_due_s = now + _EVENTS_S
        return False

    def run(self, over: Callable[[], bool]) -> None:
        """Run what is ready until ``over``; where a callback raises, the rest stays in line.

        Large messages come together (color and depth of a camera, cameras of one tick): what has come while one was
        taken is taken without another wait, of each stream one more message at most.
        """
        while self._ready and not over():
            self._ready.pop(0).run()
        if not self._streaming:
            return
        self._streaming = False
        for runner in self._streams:
            if not runner.is_coroutine() and not over():
                runner.run()


def _is_event(waitable: Any) -> bool:
    numbers = waitable.get_num_entities()
    return [name for name in _COUNTED if getattr(numbers, f"num_{name}")] == ["events"]


class _Runner:
    """How an entity is run."""

    __slots__ = ("_callback", "_is_coroutine", "entity", "run", "streams")

    def __init__(self, entity: Any, make: Callable[[Any], Callable[[], None]]) -> None:
        self.entity, self.run = entity, make(entity)
        self.streams = bool(getattr(entity, "raw", False))
        self._callback: Any = None
        self._is_coroutine = False

    def is_coroutine(self) -> bool:
        """Whether rclpy has to run it; looked up once per callback, which may be replaced."""
        callback = self.entity.callback
        if callback is not self._callback:
            self._callback, self._is_coroutine = callback, inspect.iscoroutinefunction(callback)
        return self._is_coroutine


def _by_pointer(entities: Iterable[Any], make: Callable[[Any], Callable[[], None]]) -> dict[int, _Runner]:
    return {entity.handle.pointer: _Runner(entity, make) for entity in entities}


def _guard(guard: Any) -> Callable[[], None]:
    def run() -> None:
        guard._executor_triggered = False
        guard.callback()

    return run


def _timer(timer: Any) -> Callable[[], None]:
    def run() -> None:
        try:
            with timer.handle:
                if not timer.handle.is_timer_ready():  # cancelled meanwhile
                    return
                timer.handle.call_timer()
        except InvalidHandle:
            return
        timer.callback()

    return run


def _subscription(subscription: Any) -> Callable[[], None]:
    def run() -> None:
        try:
            with subscription.handle:
                taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
        except InvalidHandle:
            return
        if taken is not None:
            kind = getattr(subscription, "_callback_type", None)  # Humble has no other
            with_info = kind is not None and kind.name != "MessageOnly"
            subscription.callback(*(taken if with_info else taken[:1]))

    return run
