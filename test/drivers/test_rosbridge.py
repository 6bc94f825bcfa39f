"""The rosbridge client against a WebSocket server of the library itself, which shares no code with it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.sync.server import ServerConnection, serve

from dcqfa_ros.drivers.rosbridge import LinkError, RosbridgeClient, ServiceError

PATIENCE_S = 20.0


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


class Peer:
    """Keeps every frame, and answers with what a test puts into ``answers``."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.connections: list[ServerConnection] = []
        self.answer: Callable[[dict[str, Any]], Any] = lambda frame: None
        self.server = serve(self._handle, "127.0.0.1", 0, compression="deflate")
        self.port = self.server.socket.getsockname()[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _handle(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        for text in connection:
            frame = json.loads(text)
            self.frames.append(frame)
            answer = self.answer(frame)
            if answer is not None:
                connection.send(json.dumps(answer))

    def send(self, data: str | bytes) -> None:
        self.connections[-1].send(data)

    def drop(self) -> None:
        self.connections[-1].socket.shutdown(socket.SHUT_RDWR)

    def of(self, operation: str) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if frame["op"] == operation]

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        self.server.shutdown()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.stop()


@pytest.fixture
def client(peer: Peer) -> Iterator[RosbridgeClient]:
    client = RosbridgeClient("127.0.0.1", peer.port, name="arm", reconnect_delay_s=0.01)
    client.connect()
    wait_until(lambda: peer.connections, "the peer's thread")
    yield client
    client.close()


def test_messages_reach_the_peer_as_rosbridge_writes_them(peer: Peer, client: RosbridgeClient) -> None:
    client.advertise("/cmd", "std_msgs/String")
    client.subscribe("/state", lambda *_: None, type="std_msgs/String", throttle_ms=20)
    client.publish("/cmd", {"data": "ä"})
    client.unsubscribe("/state")
    client.unadvertise("/cmd")
    wait_until(lambda: len(peer.frames) == 5, "five frames")
    assert [frame["op"] for frame in peer.frames] == [
        "advertise", "subscribe", "publish", "unsubscribe", "unadvertise",
    ]  # fmt: skip
    assert peer.frames[0]["type"] == "std_msgs/String"
    assert peer.frames[1] == {
        "op": "subscribe", "id": "subscribe:/state", "topic": "/state", "type": "std_msgs/String", "throttle_rate": 20,
    }  # fmt: skip
    assert peer.frames[2] == {"op": "publish", "topic": "/cmd", "msg": {"data": "ä"}}


def test_published_messages_reach_their_callbacks_with_the_time_of_arrival(peer: Peer, client: RosbridgeClient) -> None:
    seen: list[tuple[dict[str, Any], int]] = []
    client.subscribe("/state", lambda message, stamp: seen.append((message, stamp)))
    before = time.monotonic_ns()
    peer.send(json.dumps({"op": "publish", "topic": "/state", "msg": {"data": 1}}))
    wait_until(lambda: seen, "the message")
    assert seen[0][0] == {"data": 1}
    assert before <= seen[0][1] <= time.monotonic_ns()


def test_a_service_answers_fails_is_unknown_or_stays_silent(peer: Peer, client: RosbridgeClient) -> None:
    def answer(frame: dict[str, Any]) -> dict[str, Any] | None:
        base = {"op": "service_response", "id": frame["id"], "service": frame["service"]}
        return {
            "/good": {**base, "values": {"sum": 3, "args": frame["args"]}, "result": True},
            "/bad": {**base, "values": "Service /bad does not exist", "result": False},
            "/odd": {**base, "values": [1], "result": True},
        }.get(frame["service"])

    peer.answer = answer
    assert client.call_service("/good", {"a": 1}) == {"sum": 3, "args": {"a": 1}}
    with pytest.raises(ServiceError, match=r"/bad: failed: Service /bad does not exist"):
        client.call_service("/bad")
    with pytest.raises(ServiceError, match="/odd"):
        client.call_service("/odd")
    with pytest.raises(ServiceError, match=r"/silent did not answer within 0\.05 s"):
        client.call_service("/silent", timeout_s=0.05)


def test_a_loss_fails_calls_that_wait(peer: Peer, client: RosbridgeClient) -> None:
    call = client.start_call("/slow")
    wait_until(lambda: peer.of("call_service"), "the call")
    peer.drop()
    with pytest.raises(ServiceError, match="/slow: the connection was lost"):
        call.wait(PATIENCE_S)


def test_waiting_in_a_callback_is_refused_because_nothing_would_arrive(peer: Peer, client: RosbridgeClient) -> None:
    errors: list[Exception] = []

    def callback(_: dict[str, Any], __: int) -> None:
        try:
            client.call_service("/any")
        except RuntimeError as error:
            errors.append(error)

    client.subscribe("/state", callback)
    peer.send(json.dumps({"op": "publish", "topic": "/state", "msg": {}}))
    wait_until(lambda: errors, "the refusal")
    assert "callback" in str(errors[0])


def test_after_a_loss_it_reconnects_and_renews_all_but_what_was_published(peer: Peer) -> None:
    lost: list[str] = []
    sessions: list[object] = []
    client = RosbridgeClient(
        "127.0.0.1", peer.port, name="arm", reconnect_delay_s=0.01, on_lost=lost.append, on_connected=sessions.append
    )
    client.subscribe("/state", lambda *_: None)
    client.advertise("/cmd", "t")
    client.connect()
    try:
        session = client.session
        client.publish("/cmd", {"data": 1}, session=session)
        wait_until(lambda: peer.of("publish"), "the message")
        peer.drop()
        wait_until(lambda: client.statistics.connections == 2 and client.is_connected, "a new connection")
        assert len(lost) == client.statistics.losses == 1
        assert len(sessions) == 2
        with pytest.raises(LinkError, match="made anew meanwhile"):
            client.publish("/cmd", {"data": 2}, session=session)
        wait_until(lambda: len(peer.of("subscribe")) == 2 and len(peer.of("advertise")) == 2, "renewals")
        assert len(peer.of("publish")) == 1
    finally:
        client.close()


def test_it_can_be_closed_and_connected_any_number_of_times(peer: Peer) -> None:
    threads = threading.active_count()
    client = RosbridgeClient("127.0.0.1", peer.port)
    for number in range(5):
        client.connect()
        client.connect()
        client.publish("/cmd", {"n": number})
        client.close()
        client.close()
    wait_until(lambda: len(peer.of("publish")) == 5, "five messages: close sends what waits")
    assert client.statistics.connections == 5
    assert client.statistics.sent >= 5
    assert client.statistics.losses == 0
    with pytest.raises(LinkError, match="not connected"):
        client.publish("/cmd", {})
    wait_until(lambda: threading.active_count() <= threads, "all threads ended")


def test_nan_is_not_sent(peer: Peer, client: RosbridgeClient) -> None:
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises(ValueError):
            client.publish("/cmd", {"data": value})
    client.publish("/cmd", {"data": 1.5})
    wait_until(lambda: peer.frames, "a message")
    assert [frame["msg"] for frame in peer.of("publish")] == [{"data": 1.5}]


def test_a_peer_that_hangs_is_lost_and_publishing_never_waits_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        greeted = threading.Event()

        def greet() -> None:  # answers the handshake, then reads nothing more
            from websockets.server import ServerProtocol

            sock, _ = listener.accept()
            protocol = ServerProtocol()
            protocol.receive_data(sock.recv(65536))
            protocol.send_response(protocol.accept(protocol.events_received()[0]))
            sock.sendall(b"".join(protocol.data_to_send()))
            greeted.sock = sock  # type: ignore[attr-defined]
            greeted.set()

        threading.Thread(target=greet, daemon=True).start()
        lost: list[str] = []
        client = RosbridgeClient(
            "127.0.0.1", listener.getsockname()[1], ping_interval_s=0.1, ping_timeout_s=1.0, reconnect=False,
            on_lost=lost.append,
        )  # fmt: skip
        client.connect()
        greeted.wait(PATIENCE_S)
        refused, slowest = 0, 0.0
        filler = {"data": "x" * 20_000}
        try:
            for _ in range(2000):
                begun = time.monotonic()
                try:
                    client.publish("/cmd", filler)
                except LinkError:
                    refused += 1
                slowest = max(slowest, time.monotonic() - begun)
                if refused > 5:
                    break
            assert refused > 5  # the queue is bounded
            assert slowest < 0.9  # it never waited for the peer, which would have taken for ever
            wait_until(lambda: lost, "the loss")
            assert "no answer to a ping" in lost[0]
        finally:
            client.close()
            greeted.sock.close()  # type: ignore[attr-defined]


def test_an_urgent_message_overtakes_what_waits_and_replaces_its_own_kind() -> None:
    ours, theirs = socket.socketpair()
    try:
        link, received = _blocked_link(ours)
        for number in range(5):
            link.send(b'{"number":%d}' % number, key="/other")
        for number in range(5):
            link.send(b'{"jog":%d}' % number, key="/jog", latest=True)
        link.send(b'{"stop":0}', key="/jog", urgent=True)
        assert link.counts.superseded == 5
        texts = received(theirs)
        assert texts.index("stop") < texts.index("number")
        assert "jog" not in texts
        link.close(0.1)
    finally:
        theirs.close()


def _blocked_link(sock: socket.socket) -> tuple[Any, Callable[[socket.socket], str]]:
    """Return a link whose socket is full already, and what reads everything that comes out of the other end."""
    from websockets.protocol import SERVER, Protocol

    from dcqfa_ros.drivers.rosbridge_link import WebSocketLink

    sock.setblocking(False)
    filled = 0
    try:
        while True:
            filled += sock.send(b"\0" * 65536)
    except BlockingIOError:
        pass
    link = WebSocketLink(
        sock, Protocol(SERVER), [], name="test", on_text=lambda *_: None, on_end=lambda _: None,
        ping_interval_s=float("inf"),
    )  # fmt: skip

    def read(other: socket.socket) -> str:
        other.settimeout(PATIENCE_S)
        left = filled
        while left:
            left -= len(other.recv(min(left, 65536)))
        text = b""
        while text.count(b"number") < 5:
            text += other.recv(65536)
        return text.decode(errors="replace")

    return link, read


def test_errors_of_connecting_say_what_is_wrong(peer: Peer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cases: list[tuple[str, int, str]] = [
        ("127.0.0.1", port, "connection refused"),
        ("no-such-host.invalid", 9090, "host name is unknown"),
        ("bad host", 9090, "host"),
        ("127.0.0.1", 70_000, "127.0.0.1:70000"),
    ]
    for host, number, words in cases:
        with pytest.raises(LinkError, match=words):
            RosbridgeClient(host, number, name="Inovo arm", open_timeout_s=1.0).connect()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "handshake failed"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP 404"),
        (b"", "closed|failed"),
        (None, "no WebSocket handshake within"),
    ],
)
def test_what_is_no_websocket_server_is_named(reply: bytes | None, words: str) -> None:
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                if reply is None:
                    done.wait(PATIENCE_S)
                else:
                    sock.sendall(reply)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        timeout = 0.3 if reply is None else 5.0
        with pytest.raises(LinkError, match=words):
            RosbridgeClient("127.0.0.1", listener.getsockname()[1], open_timeout_s=timeout).connect()
        done.set()
        thread.join(PATIENCE_S)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FRAMES = (
    st.binary(max_size=60)
    | st.text(max_size=60)
    | JSON.map(json.dumps)
    | st.fixed_dictionaries(
        {"op": st.sampled_from(["publish", "service_response", "status", "png", "fragment"]) | JSON},
        optional={
            "topic": st.just("/state") | JSON,
            "msg": JSON,
            "id": JSON,
            "values": JSON,
            "result": JSON,
            "level": JSON,
        },
    ).map(json.dumps)
    | st.integers(2, 60_000).map(lambda depth: "[" * depth)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(FRAMES, min_size=1, max_size=8))
def test_malformed_frames_are_counted_and_the_connection_lives_on(
    peer: Peer, client: RosbridgeClient, frames: list[str | bytes]
) -> None:
    seen: list[Any] = []
    client.unsubscribe("/state")
    client.subscribe("/state", lambda message, _: seen.append(message))
    before = client.statistics
    for frame in frames:
        peer.send(frame)
    peer.send(json.dumps({"op": "publish", "topic": "/state", "msg": {"last": True}}))
    wait_until(lambda: {"last": True} in seen, "the message after the fuzz")
    after = client.statistics
    assert after.received - before.received == len(frames) + 1
    assert after.losses == before.losses == 0
    assert after.callback_errors == 0


def test_a_callback_that_raises_is_counted_and_the_others_go_on(
    peer: Peer, client: RosbridgeClient, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    client.subscribe("/bad", lambda *_: 1 / 0)
    client.subscribe("/good", lambda message, _: seen.append(message))
    peer.send(json.dumps({"op": "publish", "topic": "/bad", "msg": {}}))
    peer.send(json.dumps({"op": "publish", "topic": "/good", "msg": {}}))
    wait_until(lambda: seen, "the message after the failure")
    assert client.statistics.callback_errors == 1
    assert "ZeroDivisionError" in caplog.text


def test_bytes_that_break_the_protocol_end_the_connection_by_name_and_it_recovers(peer: Peer) -> None:
    lost: list[str] = []
    client = RosbridgeClient("127.0.0.1", peer.port, reconnect_delay_s=0.01, on_lost=lost.append)
    client.connect()
    try:
        wait_until(lambda: peer.connections, "a connection")
        peer.connections[-1].socket.sendall(b"\xff\xff\xff\xff\xff")
        wait_until(lambda: lost, "the loss")
        assert "broke the protocol" in lost[0]
        wait_until(lambda: client.is_connected and len(peer.connections) == 2, "a new connection")
    finally:
        client.close()


def test_a_connection_whose_end_is_told_late_takes_the_next_one_not_down(peer: Peer, client: RosbridgeClient) -> None:
    seen: list[Any] = []
    client.subscribe("/state", lambda message, _: seen.append(message))
    session = client.session
    client._on_end("an earlier connection")  # as its thread does that was kept from the processor meanwhile
    wait_until(lambda: not client._lost.is_set(), "the supervisor has seen that nothing is to be done")
    assert client.session is session and client.is_connected
    peer.send(json.dumps({"op": "publish", "topic": "/state", "msg": {}}))
    wait_until(lambda: seen, "a message")
    assert len(peer.connections) == 1
    peer.drop()
    wait_until(lambda: client.session not in (None, session), "a real loss is still mended")
