"""StreamExecutor runs what rclpy's own executor runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import rclpy
from rclpy.context import Context
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from std_msgs.msg import String
from std_srvs.srv import Trigger

from dcqfa_ros.ros.executor import StreamExecutor
from dcqfa_ros.ros.isolation import isolated_environment

TIMEOUT_S = 20.0


class Pair:
    """A node on the executor under test, and another one that talks to it, turned by rclpy's executor."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.node, self.other = (rclpy.create_node(name, context=context) for name in ("one", "other"))
        self.executor, self.own = StreamExecutor(context=context), SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        self.own.add_node(self.other)

    def until(self, condition: Callable[[], Any], each: Callable[[], None] = lambda: None) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end
            each()
            self.executor.spin_once(timeout_sec=0.02)
            self.own.spin_once(timeout_sec=0.0)

    def turn(self, times: int, timeout_s: float | None) -> None:
        for _ in range(times):
            self.executor.spin_once(timeout_sec=timeout_s)

    def talk(self, topic: str) -> Callable[[], None]:
        publisher = self.other.create_publisher(String, topic, 10)
        count = iter(range(10_000))
        return lambda: publisher.publish(String(data=str(next(count))))


@pytest.fixture
def pair() -> Iterator[Pair]:
    with isolated_environment() as isolation:
        context = Context()
        rclpy.init(context=context, domain_id=isolation.domain)
        pair = Pair(context)
        yield pair
        pair.executor.shutdown()
        pair.own.shutdown()
        for node in (pair.node, pair.other):
            node.destroy_node()
        context.try_shutdown()


def test_messages_bytes_and_infos_reach_their_callbacks_in_order(pair: Pair) -> None:
    words: list[str] = []
    octets: list[bytes] = []
    infos: list[Any] = []
    pair.node.create_subscription(String, "word", lambda m: words.append(m.data), 10)
    pair.node.create_subscription(String, "word", octets.append, 10, raw=True)
    pair.node.create_subscription(String, "word", lambda message, info: infos.append((message, info)), 10)
    pair.until(lambda: len(words) > 20 and len(octets) > 20 and len(infos) > 20, pair.talk("word"))
    assert words == sorted(words, key=int) and len(set(words)) == len(words)
    assert all(isinstance(o, bytes) for o in octets) and all("source_timestamp" in info for _, info in infos)


def test_bytes_that_come_while_others_are_taken_are_taken_in_the_same_turn(pair: Pair) -> None:
    first, second = pair.talk("first"), pair.talk("second")
    order: list[str] = []

    def take(_: bytes) -> None:
        order.append("first")
        second()
        time.sleep(0.2)  # for it to arrive

    pair.node.create_subscription(String, "first", take, 10, raw=True)
    pair.node.create_subscription(String, "second", lambda _: order.append("bytes"), 10, raw=True)
    pair.node.create_subscription(String, "second", lambda _: order.append("message"), 10)
    pair.until(lambda: "bytes" in order and "message" in order, first)
    pair.turn(30, 0.02)  # what was sent until then
    order.clear()
    first()
    while "first" not in order:
        pair.turn(1, TIMEOUT_S)
    assert order == ["first", "bytes"], "of streams of bytes alone, without another wait"
    pair.until(lambda: "message" in order)
    assert order == ["first", "bytes", "message"]


def test_callbacks_can_be_replaced_by_others_of_another_kind(pair: Pair) -> None:
    heard: list[str] = []

    async def later(message: bytes) -> None:
        heard.append("coroutine")

    subscription = pair.node.create_subscription(String, "word", lambda _: heard.append("function"), 10, raw=True)
    talk = pair.talk("word")
    pair.until(lambda: heard, talk)
    subscription.callback = later
    pair.until(lambda: "coroutine" in heard, talk)
    if hasattr(subscription, "_callback_type"):  # not in Humble
        subscription.callback = lambda message, info: heard.append("with info" if info else "")
        pair.until(lambda: "with info" in heard, talk)


def test_a_flood_of_bytes_leaves_time_to_others_and_the_executor_can_be_shut_down_in_it(pair: Pair) -> None:
    talk, ticks, turns = pair.talk("word"), [], []
    heard = {"one": 0, "other": 0}

    def take(name: str) -> None:
        heard[name] += 1
        talk()  # there is always one more
        time.sleep(0.01)

    streams = [
        pair.node.create_subscription(String, "word", lambda _, name=name: take(name), 1000, raw=True) for name in heard
    ]
    pair.node.create_timer(0.01, lambda: ticks.append(1))

    def count() -> None:
        turns.append(dict(heard))
        talk()

    pair.until(lambda: len(ticks) > 10 and min(heard.values()) > 20, count)
    steps = [after[name] - before[name] for before, after in pairwise(turns) for name in heard]
    assert max(steps) <= 2, "what was ready, and one more"

    at_end: list[dict[str, int]] = []

    def end(_: bytes) -> None:
        pair.executor.shutdown(0.0)
        at_end.append(dict(heard))

    streams[0].callback = end
    pair.until(lambda: at_end, talk)
    pair.turn(3, 0.02)
    assert at_end == [heard], "nothing more is run, of the same turn either"


def test_bytes_whose_turn_a_callback_ended_come_with_the_next(pair: Pair) -> None:
    heard: list[str] = []

    def fail(_: bytes) -> None:
        heard.append("fails")
        if heard.count("fails") == 2:
            raise RuntimeError("of a stream")

    def destroy(_: bytes) -> None:
        if "gone" not in heard:
            heard.append("gone")
            pair.node.destroy_subscription(gone)

    talk = pair.talk("word")
    gone = pair.node.create_subscription(String, "word", lambda _: heard.append("of one that is gone"), 10, raw=True)
    pair.until(lambda: heard, talk)
    for callback in (destroy, fail, lambda _: heard.append("heard")):
        pair.node.create_subscription(String, "word", callback, 10, raw=True)
    with pytest.raises(RuntimeError, match="of a stream"):
        pair.until(lambda: False, talk)
    count = heard.count("heard")
    pair.until(lambda: heard.count("heard") >= max(count + 2, heard.count("fails") - 1) and "gone" in heard, talk)
    assert "of one that is gone" not in heard[heard.index("gone") :]


def test_timers_services_parameters_and_posted_work_run(pair: Pair) -> None:
    ticks, answers = [], []
    pair.node.create_timer(0.01, lambda: ticks.append(time.monotonic()))
    pair.node.create_service(Trigger, "ask", lambda _, response: setattr(response, "success", True) or response)
    guard, posted = pair.node.create_guard_condition(lambda: answers.append("posted")), threading.Thread()
    client = pair.other.create_client(Trigger, "ask")
    pair.until(client.service_is_ready)
    future = client.call_async(Trigger.Request())
    posted = threading.Thread(target=guard.trigger)
    posted.start()
    pair.until(lambda: future.done() and len(ticks) > 5 and answers)
    posted.join()
    assert future.result().success
    own = pair.node.create_client(Trigger, "told")
    pair.other.create_service(Trigger, "told", lambda _, response: response)
    pair.until(own.service_is_ready)
    told = own.call_async(Trigger.Request())
    pair.until(told.done)
    assert told.result() == Trigger.Response()


def test_a_timer_that_is_cancelled_ticks_no_more(pair: Pair) -> None:
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        timer.cancel()

    timer = pair.node.create_timer(0.01, tick)
    others: list[int] = []
    pair.node.create_timer(0.01, lambda: others.append(1))
    pair.until(lambda: len(others) > 10)
    assert len(ticks) == 1


def test_coroutines_and_tasks_run(pair: Pair) -> None:
    heard: list[str] = []

    async def callback(message: String) -> None:
        heard.append(message.data)

    async def task() -> str:
        return "done"

    pair.node.create_subscription(String, "word", callback, 10)
    future = pair.executor.create_task(task)
    pair.until(lambda: len(heard) > 3 and future.done(), pair.talk("word"))
    assert future.result() == "done"


def test_an_exception_reaches_the_caller_and_nothing_else_that_was_ready_is_lost(pair: Pair) -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("failed")
        raise RuntimeError("of a callback")

    guards = [pair.node.create_guard_condition(fail), pair.node.create_guard_condition(lambda: done.append("other"))]
    for guard in guards:
        guard.trigger()
    with pytest.raises(RuntimeError, match="of a callback"):
        pair.turn(100, 0.02)
    pair.until(lambda: set(done) == {"failed", "other"})
    assert done.count("failed") == 1


def test_posted_work_is_not_lost_where_a_callback_makes_an_entity_and_raises(pair: Pair) -> None:
    done: list[str] = []

    def fail() -> None:
        pair.node.create_timer(10.0, lambda: None)
        raise RuntimeError("of a callback")

    guards = [pair.node.create_guard_condition(fail), pair.node.create_guard_condition(lambda: done.append("other"))]
    pair.turn(3, 0.02)
    for guard in guards:
        guard.trigger()
    with pytest.raises(RuntimeError, match="of a callback"):
        pair.turn(100, 0.02)
    pair.turn(2, 0.02)
    assert done == ["other"]


def test_what_is_made_while_it_waits_is_heard_and_what_is_destroyed_is_not(pair: Pair) -> None:
    talk, heard, later = pair.talk("word"), [], []
    subscription = pair.node.create_subscription(String, "word", lambda _: heard.append(1), 10)
    pair.until(lambda: len(heard) > 2, talk)

    def make() -> None:
        time.sleep(0.1)
        pair.node.create_subscription(String, "word", lambda _: later.append(1), 10)

    thread = threading.Thread(target=make)
    thread.start()
    begin = time.monotonic()
    pair.executor.spin_once(timeout_sec=TIMEOUT_S)  # ends when something is made
    while time.monotonic() - begin < 0.1:
        pair.executor.spin_once(timeout_sec=TIMEOUT_S)
    thread.join()
    assert time.monotonic() - begin < TIMEOUT_S / 2
    pair.node.destroy_subscription(subscription)
    count = len(heard)
    pair.until(lambda: len(later) > 5, talk)
    assert len(heard) == count


def test_a_subscription_destroyed_by_a_callback_of_the_same_turn_is_not_called(pair: Pair) -> None:
    calls: list[str] = []
    subscriptions: dict[str, Any] = {}

    def take(name: str) -> Callable[[String], None]:
        def callback(_: String) -> None:
            calls.append(name)
            for other in [n for n in subscriptions if n != name]:
                pair.node.destroy_subscription(subscriptions.pop(other))

        return callback

    for name in ("a", "b"):
        subscriptions[name] = pair.node.create_subscription(String, "word", take(name), 10)
    pair.until(lambda: len(calls) > 5, pair.talk("word"))
    assert len(set(calls)) == 1


def test_events_of_topics_are_told(pair: Pair) -> None:
    told: list[Any] = []
    reliable = QoSProfile(depth=1, reliability=QoSReliabilityPolicy.RELIABLE)
    effort = QoSProfile(depth=1, reliability=QoSReliabilityPolicy.BEST_EFFORT)
    callbacks = SubscriptionEventCallbacks(incompatible_qos=told.append)
    pair.node.create_subscription(String, "word", lambda _: None, reliable, event_callbacks=callbacks)
    pair.other.create_publisher(String, "word", effort)
    pair.until(lambda: told)


def test_a_wait_ends_in_time_and_at_the_end_of_the_context(pair: Pair) -> None:
    pair.turn(3, 0.0)
    begin = time.monotonic()
    while time.monotonic() - begin < 0.3:
        pair.executor.spin_once(timeout_sec=0.1)
    assert time.monotonic() - begin < TIMEOUT_S
    thread = threading.Timer(0.1, pair.context.shutdown)
    thread.start()
    with pytest.raises(ExternalShutdownException):
        pair.turn(100, None)
    thread.join()


def test_after_its_end_it_runs_nothing(pair: Pair) -> None:
    ticks: list[int] = []
    pair.node.create_timer(0.001, lambda: ticks.append(1))
    pair.until(lambda: ticks)
    pair.executor.shutdown()
    count = len(ticks)
    pair.executor.spin_once(timeout_sec=0.1)
    assert len(ticks) == count


def test_another_thread_can_end_it_while_it_waits_or_turns(pair: Pair) -> None:
    for busy in (False, True):
        executor = StreamExecutor(context=pair.context)
        node: Node = rclpy.create_node("spun", context=pair.context)
        ticks: list[int] = []
        if busy:
            node.create_timer(0.0005, lambda ticks=ticks: ticks.append(1))
        executor.add_node(node)
        thread = threading.Thread(target=executor.spin)
        thread.start()
        time.sleep(0.1)
        executor.shutdown()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive() and bool(ticks) == busy
        node.destroy_node()


def test_nodes_come_and_go(pair: Pair) -> None:
    ticks: list[int] = []
    node: Node = rclpy.create_node("third", context=pair.context)
    node.create_timer(0.001, lambda: ticks.append(1))
    pair.executor.add_node(node)
    pair.until(lambda: len(ticks) > 3)
    pair.executor.remove_node(node)
    pair.executor.spin_once(timeout_sec=0.01)
    count = len(ticks)
    pair.turn(20, 0.005)
    assert len(ticks) == count
    node.destroy_node()
