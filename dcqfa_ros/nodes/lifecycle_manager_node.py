"""lifecycle_manager_node: brings the graph up and down in order, and to a safe stop when a needed node is lost.

Every node reports its lifecycle state, the identity of its process and its stop reason in ``diagnostics`` at 1 Hz and
at every transition; the manager watches that. It asks for transitions through the nodes' ``change_state`` services. Its
sequences are generators that yield wherever they wait: the executor is never blocked and never spun from a callback.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from typing import Any

from lifecycle_msgs.msg import Transition
from std_msgs.msg import String

from dcqfa_ros.errors import UserError
from dcqfa_ros.ros.diagnostics import LIFECYCLE, Level, Status, from_message
from dcqfa_ros.ros.lifecycle_client import BringUpError, DuplicateError, LifecycleClients, Sequencer, Steps, pause
from dcqfa_ros.ros.node import ManagedNode, Refused, run_node
from dcqfa_ros.ros.peers import ACTIVE, FINALIZED, INACTIVE, UNCONFIGURED, Finding, Peer, crowded

WATCH_S = 0.25
LISTEN_S = 2.5  # two heartbeats: enough to hear a second process of the same name
SAFE_STOP_TIMEOUT_S = 1.0
LEAVE_TIMEOUT_S = 0.4
RECOVERY_WINDOW_S = 60.0
RIVAL_ADVICE = "end it, or choose another namespace:= or ROS_DOMAIN_ID"


class LifecycleManagerNode(ManagedNode):
    """Manages the nodes named in the parameter ``node_names``, in that order.

    Activates itself: it is the one node nobody else manages. The state of the graph is published on ``~/graph_state``.
    """

    NODE_NAME = "lifecycle_manager_node"

    def declare(self) -> None:
        """Declare the parameters."""
        add = self.add_parameter
        add("node_names", [""], "nodes in the order of their bring-up, relative to the namespace", read_only=True)
        add("optional_names", [""], "those of node_names whose loss does not stop the graph", read_only=True)
        add("autostart", True, "bring the graph up at once", read_only=True)
        add("exit_on_failure", True, "end the process when the automatic bring-up fails", read_only=True)
        add("appear_timeout_s", 30.0, "how long nodes may take to appear, seconds", minimum=0.1)
        add("transition_timeout_s", 60.0, "how long a transition may take, seconds", minimum=0.1)
        add("lost_after_s", 2.5, "silence after which a node counts as lost, seconds", minimum=1.5)
        add("max_recoveries", 3, "automatic bring-ups after a loss, per minute", minimum=0)
        self._sequencer = Sequencer(self)
        self._lifecycle_clients: LifecycleClients | None = None
        self._state = ""
        self._in_charge = False
        self._leaving = False
        self._recoveries: deque[float] = deque()
        self._warned: set[str] = set()
        self.peers: list[Peer] = []
        self.post(self._begin)

    def _begin(self) -> None:
        self.trigger_configure()
        if self.lifecycle_label == INACTIVE:
            self.trigger_activate()
        if self.lifecycle_label != ACTIVE:
            self.finish(self.stop_reason, exit_code=1)

    def setup(self) -> None:
        """Create a client pair per node and begin to listen."""
        names = [n for n in self.parameter("node_names") if n]
        optional = {n for n in self.parameter("optional_names") if n}
        if not names:
            raise UserError("parameter node_names is empty: name the nodes to manage, in order")
        if len(set(names)) != len(names):
            raise UserError(f"parameter node_names holds a name twice: {', '.join(names)}")
        if optional - set(names):
            raise UserError(f"parameter optional_names: not in node_names: {', '.join(sorted(optional - set(names)))}")
        prefix = self.get_namespace().rstrip("/")
        self.peers = [Peer(name, f"{prefix}/{name}", name not in optional) for name in names]
        self._self = Peer(self.get_name(), self.get_fully_qualified_name())
        self._self.hear(self.lifecycle_status().values, float("inf"), 0.0)
        self._lifecycle_clients = LifecycleClients(self, self.peers, self._sequencer)
        self._graph_state = self.create_interface_publisher("graph_state")
        self.create_guarded_subscription("diagnostics", self._hear)
        self.create_guarded_service("graph_activate", self._serve_activate)
        self.create_guarded_service("graph_deactivate", self._serve_deactivate)
        self._last_watch = time.monotonic()
        self.create_guarded_timer(WATCH_S, self._watch)

    def start(self) -> None:
        """Bring the graph up, unless that is left to an operator."""
        self._set_state(INACTIVE)
        if self.parameter("autostart"):
            self._sequencer.run(self._bring_up(first=True))

    def stop(self, reason: str) -> None:
        """Bring the graph down too: without its manager it would be unwatched."""
        down = self._stop_together(reason, SAFE_STOP_TIMEOUT_S) if self._in_charge and not self._leaving else None
        self._sequencer.run(down)

    def teardown(self) -> None:
        """Destroy the clients."""
        clients, self._lifecycle_clients = self._lifecycle_clients, None
        if clients is not None:
            clients.destroy()

    def leave(self, reason: str) -> bool:
        """Deactivate the graph before this node goes."""
        if not self._leaving:
            self._leaving = True
            if self._in_charge and self.is_active:
                self._sequencer.run(self._stop_together(reason, LEAVE_TIMEOUT_S))
        return self._sequencer.idle

    def status(self) -> Sequence[Status]:
        """Report the graph's state with one value per node."""
        values = {p.name: p.state or "not heard" for p in self.peers}
        level = {"safe_stop": Level.ERROR, "refused": Level.ERROR, ACTIVE: Level.OK}.get(self._state, Level.WARN)
        return [Status(level, "graph", self._state, values)]

    @property
    def _transitions(self) -> LifecycleClients:
        if self._lifecycle_clients is None:
            raise BringUpError(f"{self.get_name()} is not configured")
        return self._lifecycle_clients

    # Up --------------------------------------------------------------------------------------------------------------

    def _bring_up(self, first: bool = False) -> Steps:
        self._set_state("starting")
        began = time.monotonic()
        try:
            yield from self._transitions.appear(
                self.parameter("appear_timeout_s"), self.parameter("transition_timeout_s")
            )
            if not self._in_charge:
                yield from self._look_for_rivals()
            self._in_charge = True
            for wanted_from, transition in (
                (UNCONFIGURED, Transition.TRANSITION_CONFIGURE),
                (INACTIVE, Transition.TRANSITION_ACTIVATE),
            ):
                for peer in self.peers:
                    if peer.state == wanted_from:
                        yield from self._change_or_report(peer, transition)
        except BringUpError as error:
            yield from self._give_up((yield from self._or_rivals(error)), first)
            return
        for peer in self.peers:  # also those that were active before a restart of this node
            peer.wanted = peer.state == ACTIVE
        self._set_state(ACTIVE)
        self.event(Level.OK, f"graph active after {time.monotonic() - began:.1f} s", nodes=len(self.peers))

    def _give_up(self, error: BringUpError, first: bool) -> Steps:
        duplicate = isinstance(error, DuplicateError)
        self.event(Level.ERROR, f"bring-up failed: {error}", reason=error)
        if not duplicate:  # the other stack's nodes listen to the same services: leave them alone
            yield from self._transitions.deactivate_all(SAFE_STOP_TIMEOUT_S)
        self._set_state("refused" if duplicate else INACTIVE)
        if duplicate or (first and self.parameter("exit_on_failure")):
            self.finish(str(error), exit_code=1)

    def _look_for_rivals(self) -> Steps:
        """Refuse when two live processes share a node's name.

        A process killed hard stays in the graph for 10 s, so a name seen twice is only a suspicion: what is alive is
        heard within two heartbeats.
        """
        managed = [self._self, *self.peers]
        counts = Counter(f"{space.rstrip('/')}/{name}" for name, space in self.get_node_names_and_namespaces())
        if not crowded(counts, [p.path for p in managed]):
            return
        yield from pause(LISTEN_S)
        now = time.monotonic()
        found = {p.path: p.rivals(now, LISTEN_S) for p in managed}
        texts = [f"{path} (processes {' and '.join(r.pid for r in rs)})" for path, rs in found.items() if rs]
        if texts:
            raise DuplicateError(f"another stack runs under the same names: {', '.join(texts)}; {RIVAL_ADVICE}")

    def _or_rivals(self, error: BringUpError) -> Generator[None, None, BringUpError]:
        """What a bring-up failed for: another stack, where one that was not discovered before shows itself now."""
        if not isinstance(error, DuplicateError):
            try:
                yield from self._look_for_rivals()
            except DuplicateError as duplicate:
                self._in_charge = False
                return duplicate
        return error

    def _change_or_report(self, peer: Peer, transition: int) -> Steps:
        try:
            yield from self._transitions.change(peer, transition, self.parameter("transition_timeout_s"))
        except BringUpError as error:
            if peer.needed:
                raise
            self.event(Level.WARN, f"{error}; the graph goes on without it", node=peer.name)

    # Down ------------------------------------------------------------------------------------------------------------

    def _bring_down(self, reason: str, timeout: float) -> Steps:
        """Deactivate in reverse order; a node that does not answer does not keep the others waiting for long."""
        self._set_state("stopping")
        for peer in reversed(self.peers):
            if peer.state != ACTIVE:
                continue
            try:
                yield from self._transitions.change(peer, Transition.TRANSITION_DEACTIVATE, timeout)
            except BringUpError as error:
                if peer.state != FINALIZED:  # it may have been stopped by the same signal meanwhile
                    self.event(Level.WARN, str(error), node=peer.name)
        self._set_state(INACTIVE)
        self.event(Level.OK, f"graph deactivated: {reason}")

    def _stop_together(self, reason: str, timeout: float) -> Steps:
        """Deactivate every node at once: when the graph ends, the arm must not wait for a policy that hangs."""
        self._set_state("stopping")
        yield from self._transitions.deactivate_all(timeout)
        self._set_state(INACTIVE)
        self.event(Level.OK, f"graph deactivated: {reason}")

    def _safe_stop(self, lost: Peer, finding: Finding, text: str) -> Steps:
        lost.wanted = False
        self._set_state("safe_stop")
        self.event(Level.ERROR, f"safe stop: {text}", node=lost.name, finding=finding.value)
        gone = finding in (Finding.SILENT, Finding.ENDED)
        yield from self._transitions.deactivate_all(SAFE_STOP_TIMEOUT_S, except_for=[lost] if gone else [])
        for peer in self.peers:
            peer.wanted = False
        if finding not in (Finding.SILENT, Finding.RESTARTED):
            return  # it stopped for a reason of its own, which an operator looks at first
        if not self._may_recover():
            self.event(
                Level.ERROR, f"{lost.name} was lost too often: call {self.get_name()}/activate when it is mended"
            )
            return
        while lost.silent_for(time.monotonic()) > self.parameter("lost_after_s"):
            yield
        self.event(Level.WARN, f"{lost.name} is back: bringing the graph up again", node=lost.name)
        if lost.state == ACTIVE:  # it was only unreachable, and has worked on its own since
            yield from self._transitions.deactivate_all(SAFE_STOP_TIMEOUT_S)
        yield from self._bring_up()

    def _may_recover(self) -> bool:
        now = time.monotonic()
        while self._recoveries and now - self._recoveries[0] > RECOVERY_WINDOW_S:
            self._recoveries.popleft()
        self._recoveries.append(now)
        return len(self._recoveries) <= self.parameter("max_recoveries")

    # Watching --------------------------------------------------------------------------------------------------------

    def _hear(self, message: Any) -> None:
        now, lost_after = time.monotonic(), self.parameter("lost_after_s")
        for report in from_message(message):
            if report.status.name != LIFECYCLE:
                continue
            for peer in self.peers:
                if peer.path == report.path:
                    peer.hear(report.status.values, now, lost_after)
            if report.path == self._self.path and report.status.values.get("instance") != self.instance:
                self._self.hear(report.status.values, now, lost_after)
                self._meet_rival(report.status.values)

    def _meet_rival(self, values: Any) -> None:
        """Of two managers under one name the younger gives way."""
        if not self._in_charge or self._leaving or values.get("state") == FINALIZED:
            return
        pid = values.get("pid", "?")
        if float(values.get("started", "inf")) < self.started:
            text = f"another stack runs under the same names: {self._self.path} (process {pid}); {RIVAL_ADVICE}"
            self._in_charge = False
            self._set_state("refused")
            self.event(Level.ERROR, text)
            self.finish(text, exit_code=1)
        elif pid not in self._warned:
            self._warned.add(pid)
            self.event(Level.WARN, f"a second stack started under the same names (process {pid}); this one goes on")

    def _watch(self) -> None:
        now, lost_after = time.monotonic(), self.parameter("lost_after_s")
        late = now - self._last_watch - WATCH_S
        self._last_watch = now
        if late > WATCH_S:  # this process did not run, so it heard nobody: that is nobody's fault
            for peer in self.peers:
                peer.excuse(late)
        if self._leaving or not self._in_charge or not self.is_active:
            return
        for peer in self.peers:
            self._warn_of_strangers(peer, now)
            finding = peer.finding(now, lost_after)
            if finding is None:
                continue
            text = peer.describe(finding, now)
            peer.wanted = False
            if finding is Finding.DEACTIVATED:
                self.event(Level.WARN, text, node=peer.name)
            elif finding is Finding.FINISHED:
                self.event(Level.OK, text, node=peer.name)
                if peer.needed:
                    self._sequencer.run(self._stop_together(text, SAFE_STOP_TIMEOUT_S))
                    return
            elif peer.needed:
                self._sequencer.run(self._safe_stop(peer, finding, text))
                return
            else:
                self.event(Level.WARN, f"{text}; the graph goes on without it", node=peer.name)
                if finding in (Finding.SILENT, Finding.RESTARTED) and self._sequencer.idle:
                    self._sequencer.run(self._restore(peer))

    def _warn_of_strangers(self, peer: Peer, now: float) -> None:
        for process in peer.rivals(now, LISTEN_S)[1:]:
            if process.pid not in self._warned:
                self._warned.add(process.pid)
                self.event(Level.WARN, f"a second process {process.pid} runs under the name {peer.path}")

    def _restore(self, peer: Peer) -> Steps:
        """Bring back one optional node when it is heard again."""
        if not self._may_recover():
            return
        while peer.silent_for(time.monotonic()) > self.parameter("lost_after_s"):
            yield
        for state, transition in (
            (UNCONFIGURED, Transition.TRANSITION_CONFIGURE),
            (INACTIVE, Transition.TRANSITION_ACTIVATE),
        ):
            if peer.state == state:
                yield from self._change_or_report(peer, transition)
        peer.wanted = peer.state == ACTIVE

    # Services --------------------------------------------------------------------------------------------------------

    def _serve_activate(self, _request: Any, response: Any) -> Any:
        self._refuse_while_busy()
        self._sequencer.run(self._bring_up())
        response.success, response.message = True, "bringing the graph up; see ~/graph_state"
        return response

    def _serve_deactivate(self, _request: Any, response: Any) -> Any:
        self._refuse_while_busy()
        self._sequencer.run(self._bring_down("on request", self.parameter("transition_timeout_s")))
        response.success, response.message = True, "deactivating the graph; see ~/graph_state"
        return response

    def _refuse_while_busy(self) -> None:
        if not self.is_active:
            raise Refused(f"{self.get_name()} is not active")
        if not self._sequencer.idle and self._state in ("starting", "stopping"):
            raise Refused(f"the graph is {self._state}")

    def _set_state(self, state: str) -> None:
        if state != self._state:
            self._state = state
            self._graph_state.publish(String(data=state))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node; see :func:`~dcqfa_ros.ros.node.run_node`."""
    return run_node(LifecycleManagerNode, argv)


if __name__ == "__main__":
    sys.exit(main())
