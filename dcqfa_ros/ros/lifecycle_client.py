"""Asking other nodes for lifecycle transitions without blocking or spinning the executor.

Sequences are generators that yield wherever they wait; :class:`Sequencer` resumes them from a timer and whenever an
answer arrives, so each line of a sequence reads as if it blocked.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState

from dcqfa_ros.errors import UserError
from dcqfa_ros.ros.diagnostics import Level
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.ros.peers import ACTIVE, FINALIZED, INACTIVE, Peer

Steps = Generator[None, None, None]

TICK_S = 0.05
RESEND_S = 0.5
REASON_DELAY_S = 0.3  # a refusal's reason travels on another topic than the refusal

_VERBS = {
    Transition.TRANSITION_CONFIGURE: ("configure", INACTIVE),
    Transition.TRANSITION_ACTIVATE: ("activate", ACTIVE),
    Transition.TRANSITION_DEACTIVATE: ("deactivate", INACTIVE),
}


class BringUpError(UserError, RuntimeError):
    """A node did not come up; the message names it and says why."""


class DuplicateError(BringUpError):
    """Another stack runs under the same names."""


def pause(seconds: float) -> Steps:
    """Wait."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def _running(steps: Steps) -> bool:
    """Return whether ``steps`` is on the call stack, where it can neither be resumed nor closed."""
    return inspect.getgeneratorstate(steps) == inspect.GEN_RUNNING


class Sequencer:
    """Drives one sequence at a time on a node's executor."""

    def __init__(self, node: ManagedNode) -> None:
        """Create the timer on ``node`` (in its present scope)."""
        self._node = node
        self._steps: Steps | None = None
        self._timer = node.create_guarded_timer(TICK_S, self.advance)
        self._timer.cancel()

    @property
    def idle(self) -> bool:
        """Whether no sequence is under way."""
        return self._steps is None

    def run(self, steps: Steps | None) -> None:
        """Replace the running sequence; None ends it. May be called from inside the running sequence's node only."""
        previous, self._steps = self._steps, steps
        if previous is not None and not _running(previous):
            previous.close()
        if steps is not None:
            self._timer.reset()
            self._node.post(self.advance)

    def advance(self, *_: Any) -> None:
        """Resume the sequence up to its next wait; also the callback of futures."""
        steps = self._steps
        if steps is None:
            self._timer.cancel()
        elif not _running(steps):
            try:
                next(steps)
            except StopIteration:
                if self._steps is steps:
                    self._steps = None


class LifecycleClients:
    """Clients of the ``change_state`` and ``get_state`` services of the managed nodes."""

    def __init__(self, node: ManagedNode, peers: Sequence[Peer], sequencer: Sequencer) -> None:
        """Create two clients per peer on ``node``."""
        self._node, self._peers, self._sequencer = node, peers, sequencer
        self._change_clients = {p.name: node.create_client(ChangeState, f"{p.name}/change_state") for p in peers}
        self._state_clients = {p.name: node.create_client(GetState, f"{p.name}/get_state") for p in peers}

    def destroy(self) -> None:
        """Destroy the clients."""
        for client in [*self._change_clients.values(), *self._state_clients.values()]:
            self._node.destroy_client(client)

    def _call(self, client: Any, request: Any) -> Any:
        future = client.call_async(request)
        future.add_done_callback(self._sequencer.advance)
        return future

    def appear(self, appear_timeout: float, answer_timeout: float) -> Steps:
        """Wait until every node's services are there, then learn the states.

        Raises:
            BringUpError: a node did not appear or does not answer.
        """
        end = time.monotonic() + appear_timeout
        for peer in self._peers:
            clients = self._change_clients[peer.name], self._state_clients[peer.name]
            while not all(c.service_is_ready() for c in clients):
                if time.monotonic() > end:
                    missing = [p.name for p in self._peers if not self._change_clients[p.name].service_is_ready()]
                    raise BringUpError(
                        f"not there after {appear_timeout:g} s: {', '.join(missing)} "
                        f"(in namespace {self._node.get_namespace()}); see whether their processes run"
                    )
                yield
        futures = {p.name: self._call(self._state_clients[p.name], GetState.Request()) for p in self._peers}
        began = asked = time.monotonic()
        while not all(future.done() for future in futures.values()):
            now = time.monotonic()
            if now > began + answer_timeout:
                silent = [name for name, future in futures.items() if not future.done()]
                raise BringUpError(f"{', '.join(silent)}: no answer to get_state within {answer_timeout:g} s")
            if now > asked + RESEND_S:  # a server that has not met our reader yet sends its answer to nobody
                asked = now
                for name, future in futures.items():
                    if not future.done():
                        self._state_clients[name].remove_pending_request(future)
                        futures[name] = self._call(self._state_clients[name], GetState.Request())
            yield
        for peer in self._peers:
            peer.arrive(futures[peer.name].result().current_state.label, time.monotonic())

    def change(self, peer: Peer, transition: int, timeout: float) -> Steps:
        """Ask ``peer`` for a transition and wait.

        Raises:
            BringUpError: it refused or did not answer in time.
        """
        verb, goal = _VERBS[transition]
        client = self._change_clients[peer.name]
        peer.busy, peer.restarted = True, False
        peer.wanted = transition == Transition.TRANSITION_ACTIVATE
        future = self._call(client, ChangeState.Request(transition=Transition(id=transition)))
        try:
            began = time.monotonic()
            end = began + timeout
            while not future.done():
                if peer.state == goal and time.monotonic() > began + RESEND_S:  # it says so itself: its answer was lost
                    client.remove_pending_request(future)
                    break
                if time.monotonic() > end:
                    client.remove_pending_request(future)
                    raise BringUpError(f"{peer.name} did not {verb} within {timeout:g} s")
                yield
            if future.done() and not future.result().success:
                peer.wanted = False
                end = time.monotonic() + REASON_DELAY_S
                while not peer.faulted and time.monotonic() < end:
                    yield
                raise BringUpError(f"{peer.name} refused to {verb}: {peer.reason or 'it gave no reason'}")
        finally:
            peer.busy = False
            peer.excuse(max(0.0, peer.silent_for(time.monotonic())) if peer.process else 0.0)
        peer.arrive(goal, time.monotonic())

    def deactivate_all(self, timeout: float, except_for: Iterable[Peer] = ()) -> Steps:
        """Deactivate every active node at once: in a safe stop none waits for another."""
        spared = [p.name for p in except_for]
        active = [p for p in self._peers if p.state == ACTIVE and p.name not in spared]
        request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_DEACTIVATE))
        futures = []
        for peer in active:
            peer.wanted = False
            futures.append((peer, self._call(self._change_clients[peer.name], request)))
        end = time.monotonic() + timeout
        while any(not f.done() and p.state != FINALIZED for p, f in futures) and time.monotonic() < end:
            yield
        for peer, future in futures:
            if future.done():
                peer.state = INACTIVE if future.result().success else peer.state
                if peer.state == ACTIVE:
                    self._node.event(Level.ERROR, f"{peer.name} refused to deactivate", node=peer.name)
            else:
                self._change_clients[peer.name].remove_pending_request(future)
                if peer.state == FINALIZED:  # Ctrl-C in a terminal reaches every node: it has stopped by itself
                    continue
                self._node.event(Level.ERROR, f"{peer.name} did not deactivate within {timeout:g} s", node=peer.name)
