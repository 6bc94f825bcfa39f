"""trial_node: runs planned trials of the cell's task through the graph, judged by the cell, and writes the records.

The node acts as the operator: per trial it sets the cell's seed and pace, resets the cell, arms the arm, and waits
until the arm is disarmed. Trials are named in the parameter ``trials`` and begun by ``~/start``, or at once with
``autostart``; with ``exit_when_done`` the node then ends the run (exit code 0, or 3 when a trial ended by a fault).
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from dcqfa_ros.devices.detect import detect
from dcqfa_ros.errors import UserError
from dcqfa_ros.ros.conversions import MessageError, status_values
from dcqfa_ros.ros.diagnostics import EVENT, Status, from_message
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.node import ManagedNode, Refused, run_node
from dcqfa_ros.trials.collector import NORMAL_STOPS, PlannedTrial, TrialCollector
from dcqfa_ros.trials.records import TrialMode, TrialRecord
from dcqfa_ros.trials.session import TrialSession

READY_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 10.0
SETTLE_S = 10.0  # for what the nodes tell of an ended trial
FAULTY_SETTLE_S = 2.0  # the same where the policy has a problem and may tell nothing
POLL_S = 0.02
ABNORMAL_EXIT = 3


class TrialError(UserError):
    """A trial that could not be run; the message says which call failed and why."""


def _plan(texts: Sequence[str]) -> tuple[list[PlannedTrial], str | None]:
    """The trials named in a parameter, or why they cannot be run."""
    try:
        return [PlannedTrial.parse(str(text)) for text in texts if text], None
    except ValueError as error:
        return [], str(error)


class TrialNode(ManagedNode):
    """Conducts trials."""

    NODE_NAME = "trial_node"

    def declare(self) -> None:
        """Declare the parameters (see ``config/pusht_cell.yaml``)."""
        add = self.add_parameter
        add("trials", [""], "trials in order: realtime:SEED or lockstep:SEED")
        add("output", "", "folder for records and report; empty: out/trials/<UTC time>")
        add("overwrite", False, "replace the records of an earlier series in that folder")
        add("bundle", "pusht_keypoints", "bundle named in the records", read_only=True)
        add("cell", "pusht", "cell named in the records", read_only=True)
        add("autostart", False, "start the trials when the graph is ready; else wait for ~/start", read_only=True)
        add("exit_when_done", False, "end this process after the last trial", read_only=True)
        add("timeout_s", 120.0, "wall-clock limit of one trial, seconds", minimum=1.0, maximum=3600.0)
        add("videos", 1, "how many trials to embed as video in the report", minimum=0, maximum=100)
        self.on_parameter("trials", lambda texts: _plan(texts)[1])
        self._halt = threading.Event()  # one per activation, so that an old thread can never come back to life
        self._go = threading.Event()
        self._trial_lock = threading.Lock()
        self._trial_thread: threading.Thread | None = None
        self._current: TrialCollector | None = None
        self._arm: dict[str, str] = {}
        self._variant = ""
        self._progress = "idle: set parameter trials, then call ~/start"
        self._series_running = False
        self._problems: dict[str, str] = {}
        self._service_clients: list[Any] = []

    def setup(self) -> None:
        """Check the plan, create clients and subscriptions."""
        plan, problem = _plan(self.parameter("trials"))
        if problem or (self.parameter("autostart") and not plan):
            raise TrialError(f"parameter trials: {problem or 'empty; name trials such as lockstep:200000'}")
        self._device = detect().name
        self.create_guarded_subscription("judgement", self._on_judgement)
        self.create_guarded_subscription("arm_state", self._on_arm_state)
        self.create_guarded_subscription("active_variant", self._on_variant)
        self.create_guarded_subscription("diagnostics", self._on_diagnostics)
        self.create_guarded_service("trial_start", self._on_start)
        self._triggers = {key: self._client(Trigger, interface(key).name) for key in ("arm", "disarm", "reset_cell")}
        self._setters = {
            node: self._client(SetParameters, f"{node}/set_parameters") for node in ("arm_node", "policy_node")
        }

    def _client(self, kind: Any, name: str) -> Any:
        client = self.create_client(kind, name)
        self._service_clients.append(client)
        return client

    def start(self) -> None:
        """Begin to conduct trials on an own thread, now or at ``~/start``."""
        self._halt = threading.Event()
        if self.parameter("autostart"):
            self._go.set()
        conduct = functools.partial(self._conduct, self._halt)
        self._trial_thread = threading.Thread(target=self.guard(conduct), name="trials", daemon=True)
        self._trial_thread.start()

    def stop(self, reason: str) -> None:
        """Abandon the trials not yet done; the arm node disarms by itself when it is deactivated."""
        self._halt.set()
        if self._series_running or self._go.is_set():
            self._series_running = False
            self._end(ABNORMAL_EXIT, f"trials abandoned: {reason}")
        thread, self._trial_thread = self._trial_thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)

    def teardown(self) -> None:
        """Let go of the service clients."""
        while self._service_clients:
            self.destroy_client(self._service_clients.pop())

    # callbacks

    def _on_judgement(self, message: Any) -> None:
        with self._trial_lock:
            if self._current is not None:
                self._take(self._current.judgement, message)

    def _on_arm_state(self, message: Any) -> None:
        with self._trial_lock:
            self._take(self._arm_state, message)

    def _arm_state(self, values: dict[str, str]) -> None:
        int(values["episode"])  # refuses what is no state of an arm before it is kept
        self._arm = values
        if self._current is not None:
            self._current.arm_state(values)

    def _take(self, take: Callable[[dict[str, str]], None], message: Any) -> None:
        try:
            take(status_values(message))
        except (MessageError, KeyError, ValueError) as error:
            self.event(1, f"malformed status message ignored: {error!r}")

    def _on_variant(self, message: Any) -> None:
        with self._trial_lock:
            self._variant = str(message.data)
            if self._current is not None:
                self._current.variant(self._variant)

    def _on_diagnostics(self, message: Any) -> None:
        for report in from_message(message):
            status = report.status
            with self._trial_lock:
                told = status.values if report.node == "policy_node" and status.name == EVENT else {}
                if "inference_p50_ms" in told or ("swap_id" in told and self._current is not None):
                    self._policy_report(told)
                elif status.level >= 2 and report.node != self.get_name() and status.name == EVENT:
                    self._problems[report.node] = status.message

    def _policy_report(self, values: Mapping[str, str]) -> None:
        if self._current is None:
            return
        take = self._current.swap if "swap_id" in values else self._current.policy_report
        try:
            take(values)
        except (KeyError, ValueError) as error:
            self.event(1, f"malformed report of the policy ignored: {error!r}")

    def _on_start(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        plan, _problem = _plan(self.parameter("trials"))
        if not self.is_active:
            raise Refused("trial_node is not active")
        if not plan:
            raise Refused("there are no trials: set parameter trials, such as ['lockstep:200000']")
        if self._series_running or self._go.is_set():
            raise Refused(f"trials are under way: {self._progress}")
        self._go.set()
        response.success, response.message = True, f"{len(plan)} trials"
        return response

    # trial thread

    def _conduct(self, halt: threading.Event) -> None:
        while not halt.is_set():
            if not self._go.wait(POLL_S):
                continue
            self._series_running = True
            self._go.clear()
            try:
                self._series(halt)
            except UserError as error:
                if halt.is_set():
                    return
                self._progress = str(error)
                self.event(2, str(error))
                self._series_running = False
                self._end(ABNORMAL_EXIT, str(error))

    def _series(self, halt: threading.Event) -> None:
        plan, _ = _plan(self.parameter("trials"))
        default = f"out/trials/{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
        folder = Path(str(self.parameter("output")) or default)
        session = TrialSession(folder, str(self.parameter("bundle")), bool(self.parameter("overwrite")))
        self._await_ready()
        for number, planned in enumerate(plan, start=1):
            self._progress = f"trial {number} of {len(plan)} ({planned})"
            record, collector = self._run_trial(planned, halt)
            session.add(record, collector.states, collector.targets)
            normal = record.stop_reason in NORMAL_STOPS
            self.event(
                0 if normal else 2,
                f"{self._progress}: score {record.score:.3f} after {record.steps} steps, "
                f"{record.stop_reason}{'' if normal else f' ({collector.stop_reason})'}",
                seed=record.seed,
                score=record.score,
            )
        summary = session.finish(videos=int(self.parameter("videos")))
        for note in session.notes:
            self.event(1, note)
        self._progress = f"done: mean score {summary.mean_score:.3f} over {len(summary.trials)} trials"
        self._series_running = False  # before it is told: who hears it may start the next series
        self.event(0, self._progress, report=summary.report)
        normal = all(t.stop_reason in NORMAL_STOPS for t in summary.trials)
        self._end(0 if normal else ABNORMAL_EXIT, self._progress)

    def _end(self, code: int, reason: str) -> None:
        if self.parameter("exit_when_done"):
            self.post(lambda: self.finish(reason, code))

    def _await(self, what: str, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._halt.is_set():
                raise TrialError("stopped")
            if time.monotonic() > deadline:
                with self._trial_lock:
                    problems = "; ".join(f"{node}: {text}" for node, text in self._problems.items())
                raise TrialError(f"{what} within {timeout_s:.0f} s" + (f" ({problems})" if problems else ""))
            time.sleep(POLL_S)

    def _await_ready(self) -> None:
        self._progress = "waiting for the graph"
        clients = [*self._triggers.values(), *self._setters.values()]
        self._await(
            "arm and policy nodes did not come up", lambda: all(c.service_is_ready() for c in clients), READY_TIMEOUT_S
        )
        self._await("no variant was loaded", lambda: bool(self._variant) and bool(self._arm), READY_TIMEOUT_S)

    def _run_trial(self, planned: PlannedTrial, halt: threading.Event) -> tuple[TrialRecord, TrialCollector]:
        pace = "max" if planned.mode is TrialMode.LOCKSTEP else "realtime"
        if self._arm.get("state") == "armed":
            self._trigger("disarm")
        self._set("arm_node", seed=planned.seed, rate=pace)
        self._set("policy_node", rate=pace)
        self._trigger("reset_cell")
        with self._trial_lock:
            collector = TrialCollector(planned, int(self._arm["episode"]) + 1)
            collector.variant(self._variant)
            self._current = collector
            self._problems.clear()
        self._trigger("arm")
        limit = float(self.parameter("timeout_s"))
        try:
            self._await(f"trial {planned}: not finished", lambda: collector.stopped, limit)
        except TrialError:
            if halt.is_set():
                raise
            with self._trial_lock:  # before the arm says "operator"
                collector.stop_code, collector.stop_reason = "trial_timeout", f"not finished within {limit:g} s"
            self._trigger("disarm")
        ended = time.monotonic()
        while not collector.complete and not halt.is_set():
            if time.monotonic() > ended + (FAULTY_SETTLE_S if "policy_node" in self._problems else SETTLE_S):
                break
            time.sleep(POLL_S / 4)
        with self._trial_lock:
            self._current = None
            cause = self._problems.get("policy_node")
        if cause and collector.stop_code not in NORMAL_STOPS:
            collector.stop_reason = f"{collector.stop_reason}; policy_node: {cause}"
        if collector.lost:
            self.event(1, f"trial {planned}: {collector.lost} judgements were lost on the way")
        return collector.record(self._device, str(self.parameter("cell"))), collector

    def _trigger(self, key: str) -> None:
        response = self._call(self._triggers[key], Trigger.Request(), interface(key).name)
        if not response.success:
            raise TrialError(f"{interface(key).name} refused: {response.message}")

    def _set(self, node: str, **values: Any) -> None:
        messages: list[ParameterMessage] = [Parameter(k, value=v).to_parameter_msg() for k, v in values.items()]
        response = self._call(self._setters[node], SetParameters.Request(parameters=messages), f"{node}/set_parameters")
        for message, result in zip(messages, response.results, strict=True):
            if not result.successful:
                raise TrialError(f"{node} refused parameter {message.name}: {result.reason}")

    def _call(self, client: Any, request: Any, name: str) -> Any:
        answered = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: answered.set())
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while not answered.wait(POLL_S):
            if self._halt.is_set() or time.monotonic() > deadline:
                client.remove_pending_request(future)
                raise TrialError(
                    "stopped" if self._halt.is_set() else f"{name} did not answer within {CALL_TIMEOUT_S:g} s"
                )
        return future.result()

    def status(self) -> list[Status]:
        """What the trials are at."""
        return [Status(0, "trials", self._progress, {"running": str(self._series_running).lower()})]


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``trial_node``."""
    return run_node(TrialNode, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
