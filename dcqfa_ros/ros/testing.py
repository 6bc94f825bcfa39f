"""A graph of real processes to test nodes with: an isolated domain, spawned nodes, and a probe that looks at them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, ShutdownException
from rclpy.parameter import Parameter
from rclpy.utilities import try_shutdown
from std_srvs.srv import Trigger

from dcqfa_ros.ros.diagnostics import Report, from_message
from dcqfa_ros.ros.discovery import discovery_profile
from dcqfa_ros.ros.executor import StreamExecutor
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.isolation import isolated_environment
from dcqfa_ros.ros.qos import qos

TIMEOUT_S = 60.0
_GOALS = {
    Transition.TRANSITION_CONFIGURE: "inactive",
    Transition.TRANSITION_ACTIVATE: "active",
    Transition.TRANSITION_DEACTIVATE: "inactive",
    Transition.TRANSITION_CLEANUP: "unconfigured",
}
QUIET_S = 0.3
"""Between the end of the processes and that of the probe: what they last announced is heard before its participant is
taken down, because Fast DDS has crashed when it was taken down while peers were still coming up."""


def wait_until(condition: Callable[[], Any], what: str, timeout: float = TIMEOUT_S) -> Any:
    """Return the first true value of ``condition``.

    Raises:
        AssertionError: it stayed false for ``timeout`` seconds; the message says ``what`` was waited for.
    """
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout:g} s: {what}")


class Spawned:
    """One process of the graph; its output goes to a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """Start the process."""
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                list(command), env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        """What the process has written so far, both streams."""
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Return the exit code (negative: killed by that signal)."""
        return self.process.wait(timeout)


class Graph:
    """An isolated ROS domain with processes and a probe node; use it as a context manager.

    Attributes:
        env: environment of the processes.
        node: the probe, spun by a thread of its own.
        reports: everything heard in ``diagnostics``, in order.
    """

    def __init__(self, namespace: str = "") -> None:
        """Prepare a graph whose probe lives in ``namespace``."""
        self._namespace = namespace
        self._spawned: list[Spawned] = []
        self.reports: list[Report] = []

    def __enter__(self) -> Graph:
        """Reserve the domain and start the probe."""
        self._stack = contextlib.ExitStack()
        isolation = self._stack.enter_context(isolated_environment())
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dcqfa_graph_")))
        self.env = isolation.env
        self.context = Context()
        with _environment(self.env), discovery_profile():
            rclpy.init(context=self.context, domain_id=isolation.domain)
            self.node = rclpy.create_node("probe", context=self.context, namespace=self._namespace)
        self._executor = StreamExecutor(context=self.context)
        self._executor.add_node(self.node)
        entry = interface("diagnostics")
        self.node.create_subscription(entry.message_class(), entry.name, self._hear, qos(entry.qos))
        self._thread = threading.Thread(target=self._spin, name="probe", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what still runs and leave the domain."""
        for spawned in self._spawned:
            if spawned.process.poll() is None:
                spawned.process.kill()
            spawned.process.wait()
        time.sleep(QUIET_S)
        self._executor.shutdown()
        self._thread.join()
        self.node.destroy_node()
        try_shutdown(context=self.context)
        self._stack.close()

    def _spin(self) -> None:
        with contextlib.suppress(ShutdownException, ExternalShutdownException):
            self._executor.spin()

    def _hear(self, message: Any) -> None:
        self.reports += from_message(message)

    # Processes -------------------------------------------------------------------------------------------------------

    def spawn(self, *command: str, env: Mapping[str, str] | None = None) -> Spawned:
        """Start any command in the graph's environment, with ``env`` added."""
        log = self._folder / f"{len(self._spawned)}.log"
        spawned = Spawned(command, {**self.env, **(env or {})}, log)
        self._spawned.append(spawned)
        return spawned

    def stop_all(self, timeout: float = 5.0) -> None:
        """End every process in an orderly way, so that the probe sees each leave; killing is left to the exit.

        Worth its time where nodes publish at high rates: Fast DDS in the probe has crashed when it was taken down
        after such a peer had been killed in the middle of a message.
        """
        running = [spawned for spawned in self._spawned if spawned.process.poll() is None]
        for spawned in running:
            spawned.send(signal.SIGTERM)
        end = time.monotonic() + timeout
        for spawned in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                spawned.wait(max(0.0, end - time.monotonic()))

    def spawn_node(self, program: str, name: str, namespace: str = "", **parameters: Any) -> Spawned:
        """Start a node: ``program`` is a module or a Python file. Parameter values are written as YAML flow."""
        arguments = ["--ros-args", "-r", f"__node:={name}", "-r", f"__ns:=/{namespace.strip('/')}"]
        for key, value in parameters.items():
            arguments += ["-p", f"{key}:={value}"]
        run = [program] if program.endswith(".py") else ["-m", program]
        return self.spawn(sys.executable, *run, *arguments)

    # Looking ---------------------------------------------------------------------------------------------------------

    def wait_graph(self, state: str, manager: str = "lifecycle_manager_node", timeout: float = TIMEOUT_S) -> None:
        """Wait until the lifecycle manager's latest report says that the graph is in ``state``."""

        def there() -> bool:
            reports = [r.status for r in list(self.reports) if r.node == manager and r.status.name == "graph"]
            return bool(reports) and reports[-1].message == state

        wait_until(there, f"graph {state}", timeout)

    def wait_for(self, node: str, name: str, text: str = "", timeout: float = TIMEOUT_S, **values: str) -> Report:
        """Return the first report of ``node`` called ``name`` whose message holds ``text`` and which has ``values``."""

        def find() -> Report | None:
            for report in list(self.reports):
                s = report.status
                if report.node == node and s.name == name and text in s.message and values.items() <= s.values.items():
                    return report
            return None

        report: Report = wait_until(find, f"{node}: {name} with {text!r} {values or ''}", timeout)
        return report

    def state(self, node: str) -> str:
        """Return a node's lifecycle state."""
        label: str = self.call(GetState, f"{node}/get_state", GetState.Request()).current_state.label
        return label

    def change(self, node: str, transition: int) -> bool:
        """Ask for a transition (``Transition.TRANSITION_...``); return whether it succeeded."""
        request = ChangeState.Request(transition=Transition(id=transition))
        for _ in range(2):
            try:
                success: bool = self.call(ChangeState, f"{node}/change_state", request, TIMEOUT_S / 2).success
            except AssertionError:
                # A server that has not met this client's writer never hears it, and one that has not met its reader
                # yet sends its answer to nobody.
                if transition in _GOALS and self.state(node) == _GOALS[transition]:
                    return True
            else:
                return success
        return False

    def configure(self, node: str) -> bool:
        """Configure a node."""
        return self.change(node, Transition.TRANSITION_CONFIGURE)

    def activate(self, node: str) -> bool:
        """Configure and activate a node."""
        return self.configure(node) and self.change(node, Transition.TRANSITION_ACTIVATE)

    def trigger(self, service: str) -> Any:
        """Call a ``std_srvs/Trigger`` service."""
        return self.call(Trigger, service, Trigger.Request())

    def set_parameter(self, node: str, name: str, value: Any) -> Any:
        """Set a parameter; return its ``SetParametersResult``."""
        message = Parameter(name, value=value).to_parameter_msg()
        return self.call(SetParameters, f"{node}/set_parameters", SetParameters.Request(parameters=[message])).results[
            0
        ]

    def call(self, service_type: Any, name: str, request: Any, timeout: float = TIMEOUT_S) -> Any:
        """Call a service and return the response."""
        client = self.node.create_client(service_type, name)
        try:
            wait_until(client.service_is_ready, f"service {name}", timeout)
            future = client.call_async(request)
            wait_until(future.done, f"answer of {name}", timeout)
            return future.result()
        finally:
            self.node.destroy_client(client)

    def publish(self, key: str, message: Any, **fields: str) -> None:
        """Publish one message on the table's ``key`` as soon as somebody subscribes."""
        entry = interface(key)
        publisher = self.node.create_publisher(entry.message_class(), entry.resolve(**fields), qos(entry.qos))
        wait_until(publisher.get_subscription_count, f"a subscriber of {entry.name}")
        publisher.publish(message)


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """Give this process ``env`` while the body runs."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
