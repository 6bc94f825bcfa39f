"""The emulated rosbridge against the WebSocket client of the library itself, which shares no code with it."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.sim.rosbridge_server import RequestError, RosbridgeServer

PATIENCE_S = 20.0


class Graph:
    """Keeps what is published; serves ``/add``."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, Any], int]] = []

    def receive(self, topic: str, message: dict[str, Any], stamp_ns: int) -> None:
        if topic == "/typed" and not isinstance(message.get("data"), str):
            raise RequestError("data: expected str")
        if topic == "/defect":
            raise AttributeError("a defect of the emulator")
        self.received.append((topic, message, stamp_ns))

    def serve(self, service: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if service != "/add":
            raise RequestError(f"Service {service} does not exist")
        return {"sum": sum(value for value in arguments.values() if isinstance(value, int))}


@pytest.fixture
def graph() -> Graph:
    return Graph()


@pytest.fixture
def server(graph: Graph) -> Iterator[RosbridgeServer]:
    server = RosbridgeServer(graph)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: RosbridgeServer) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{server.port}", ping_interval=None) as connection:
        yield connection


def ask(client: ClientConnection, frame: Any) -> Any:
    client.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))
    return json.loads(client.recv(timeout=PATIENCE_S))


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


def subscribe(server: RosbridgeServer, client: ClientConnection, topic: str, **more: Any) -> None:
    client.send(json.dumps({"op": "subscribe", "topic": topic, **more}))
    settle(client)


def settle(client: ClientConnection) -> None:
    """Wait until everything sent before has been carried out: frames keep their order."""
    assert ask(client, {"op": "call_service", "service": "/add"})["result"]


def test_a_service_answers_with_its_id(client: ClientConnection) -> None:
    answer = ask(client, {"op": "call_service", "id": "7", "service": "/add", "args": {"a": 1, "b": 2}})
    assert answer == {"op": "service_response", "id": "7", "service": "/add", "values": {"sum": 3}, "result": True}


def test_an_unknown_service_answers_that_it_failed(client: ClientConnection) -> None:
    answer = ask(client, {"op": "call_service", "id": "7", "service": "/none"})
    assert answer["result"] is False and answer["values"] == "Service /none does not exist" and answer["id"] == "7"


def test_only_subscribers_get_messages_until_they_unsubscribe(
    server: RosbridgeServer, client: ClientConnection
) -> None:
    subscribe(server, client, "/a", id="one")
    server.publish("/b", {"n": 0})
    server.publish("/a", {"n": 1})
    assert json.loads(client.recv(timeout=PATIENCE_S)) == {"op": "publish", "topic": "/a", "msg": {"n": 1}}
    client.send(json.dumps({"op": "unsubscribe", "topic": "/a", "id": "one"}))
    settle(client)
    server.publish("/a", {"n": 2})
    settle(client)  # the next frame is the answer, not the message


def test_throttled_subscriptions_get_no_more_than_they_asked_for(
    server: RosbridgeServer, client: ClientConnection
) -> None:
    subscribe(server, client, "/a", throttle_rate=1_000_000)
    for number in range(5):
        server.publish("/a", {"n": number})
    assert json.loads(client.recv(timeout=PATIENCE_S))["msg"] == {"n": 0}
    settle(client)


def test_published_messages_reach_the_graph_in_order(graph: Graph, client: ClientConnection) -> None:
    before = time.monotonic_ns()
    for number in range(50):
        client.send(json.dumps({"op": "publish", "topic": "/a", "msg": {"n": number}}))
    wait_until(lambda: len(graph.received) == 50, "all messages")
    assert [message["n"] for _, message, _ in graph.received] == list(range(50))
    stamps = [stamp for *_, stamp in graph.received]
    assert before < stamps[0] and stamps == sorted(stamps)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ("{", "Expecting"),
        ("[]", "op"),
        ("{}", "op"),
        ({"op": "fly", "id": "x"}, "Unknown operation: fly"),
        ({"op": "publish"}, "topic"),
        ({"op": "publish", "topic": "/a", "msg": 3}, "msg"),
        ({"op": "publish", "topic": "/typed", "msg": {"data": 3}}, "data: expected str"),
        ({"op": "subscribe", "topic": ""}, "topic"),
        ({"op": "subscribe", "topic": "/a", "throttle_rate": "x"}, "throttle_rate"),
        ({"op": "advertise", "topic": "/a"}, "type"),
        ({"op": "call_service"}, "service"),
    ],
)
def test_what_it_cannot_do_is_answered_by_a_status(client: ClientConnection, frame: Any, words: str) -> None:
    answer = ask(client, frame)
    assert answer["op"] == "status" and answer["level"] == "error" and words in answer["msg"]
    assert answer.get("id") == (frame.get("id") if isinstance(frame, dict) else None)
    settle(client)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FRAMES = (
    st.binary(max_size=80)
    | st.text(max_size=80)
    | VALUES.map(json.dumps)
    | st.fixed_dictionaries(
        {
            "op": st.sampled_from(["publish", "subscribe", "unsubscribe", "advertise", "unadvertise", "call_service"])
            | VALUES
        },
        optional=dict.fromkeys(("topic", "msg", "id", "args", "service", "type", "throttle_rate"), VALUES),
    ).map(json.dumps)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(FRAMES, max_size=8))
def test_no_frame_of_a_client_ends_its_connection(client: ClientConnection, frames: list[str | bytes]) -> None:
    for frame in frames:
        client.send(frame)
    client.send(json.dumps({"op": "call_service", "service": "/add", "id": "last", "args": {"a": 4}}))
    while True:
        answer = json.loads(client.recv(timeout=PATIENCE_S))
        if answer.get("id") == "last" and answer["op"] == "service_response":
            assert answer["values"] == {"sum": 4}
            break


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=200))
def test_bytes_that_are_no_websocket_harm_nobody_else(
    server: RosbridgeServer, client: ClientConnection, data: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as stranger:
        stranger.sendall(data)
    settle(client)


def test_dropped_connections_are_gone_and_new_ones_refused_for_a_while(server: RosbridgeServer) -> None:
    with connect(f"ws://127.0.0.1:{server.port}", ping_interval=None) as client:
        settle(client)
        server.drop_connections(refuse_for_s=1e6)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=PATIENCE_S)
    wait_until(lambda: server.clients == 0, "the client is forgotten")
    with pytest.raises((OSError, EOFError, WebSocketException)):
        connect(f"ws://127.0.0.1:{server.port}", open_timeout=PATIENCE_S)
    server.drop_connections()
    with connect(f"ws://127.0.0.1:{server.port}", ping_interval=None) as client:
        settle(client)


def test_a_paused_server_is_silent_and_goes_on_afterwards(
    graph: Graph, server: RosbridgeServer, client: ClientConnection
) -> None:
    subscribe(server, client, "/a")
    server.pause()
    client.send(json.dumps({"op": "publish", "topic": "/x", "msg": {}}))
    server.publish("/a", {})
    with pytest.raises(TimeoutError):
        client.recv(timeout=0.2)
    assert not graph.received
    server.resume()
    settle(client)
    assert len(graph.received) == 1


def test_muted_topics_are_silent(server: RosbridgeServer, client: ClientConnection) -> None:
    subscribe(server, client, "/a")
    server.mute(["/a"])
    server.publish("/a", {})
    settle(client)
    server.mute([])
    server.publish("/a", {})
    assert json.loads(client.recv(timeout=PATIENCE_S))["op"] == "publish"


def test_delays_keep_the_order_and_leave_the_time_of_receipt(
    graph: Graph, server: RosbridgeServer, client: ClientConnection
) -> None:
    server.latency_s, server.jitter_s = 0.02, 0.02
    begun = time.monotonic()
    for number in range(20):
        client.send(json.dumps({"op": "publish", "topic": "/a", "msg": {"n": number}}))
    settle(client)
    assert time.monotonic() - begun > 0.04  # one way in, one way out
    assert [message["n"] for _, message, _ in graph.received] == list(range(20))
    server.latency_s = server.jitter_s = 0.0
    settle(client)


@pytest.mark.parametrize("latency_s", [0.0, 0.01])
def test_a_defect_of_the_graph_ends_no_connection(
    server: RosbridgeServer, client: ClientConnection, latency_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    server.latency_s = latency_s
    client.send(json.dumps({"op": "publish", "topic": "/defect", "msg": {}}))
    settle(client)
    assert "a defect of the emulator" in caplog.text
    server.latency_s = 0.0


def test_it_comes_back_on_its_port_and_a_taken_port_is_named(graph: Graph) -> None:
    server = RosbridgeServer(graph)
    server.start()
    port = server.port
    with pytest.raises(DriverError, match=f"cannot listen on 127.0.0.1:{port}"):
        RosbridgeServer(graph, port=port).start()
    server.stop()
    server.stop()
    server.start()
    assert server.port == port
    with connect(f"ws://127.0.0.1:{port}", ping_interval=None) as client:
        settle(client)
    server.stop()


def test_without_websockets_the_server_does_not_start_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.server", None)
    with pytest.raises(DriverError, match=r"pip install -r requirements/cell\.txt"):
        RosbridgeServer(Graph()).start()
