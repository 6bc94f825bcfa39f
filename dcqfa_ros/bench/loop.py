"""Measure the real graph: the control tick while two RGB-D streams arrive and a policy infers all the time.

Every node is a process of its own, in a ROS domain of its own: two ``camera_node`` on the synthetic source,
``arm_node`` of a cell with an arm at 100 Hz, ``policy_node`` with its engine's worker. The arm is emulated behind its
WebSocket, in this process, which also publishes wrenches. The policy has random weights: its twists are slow and mean
nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcqfa_ros.bench import bare_tick
from dcqfa_ros.bench.arm import ARM_NODE, PARAMETERS, available_cores, wrenches
from dcqfa_ros.bench.arm_policy import CAMERAS, SOURCES, VARIANT, ArmPolicy, write_arm_policy
from dcqfa_ros.bench.conditions import Conditions, watch_conditions
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.ros.camera_stream import cpu_seconds
from dcqfa_ros.ros.diagnostics import from_message
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.memory import process_tree
from dcqfa_ros.ros.qos import qos
from dcqfa_ros.ros.testing import Graph, Spawned, wait_until
from dcqfa_ros.runtime.ticker import Stall, stalls_of
from dcqfa_ros.sim.inovo import InovoEmulator

CAMERA_NODE, POLICY_NODE = "dcqfa_ros.nodes.camera_node", "dcqfa_ros.nodes.policy_node"
JITTER_LIMIT_MS, OVERHEAD_LIMIT_MS = 2.0, 5.0
_SETTLE_S = 3.0  # from the first chunk: imports, discovery and the first allocations are over
_POLL_S = 0.25
Figures = tuple[Mapping[str, str], Mapping[str, str], float]  # of arm and policy, and when the latter came
BELOW_ARM = 10  # priority of cameras and policy below that of the arm


@dataclass(frozen=True, slots=True)
class LoopBench:
    """Result of one run.

    Attributes:
        jitter_p50_ms, jitter_p99_ms, jitter_max_ms: how late control ticks began, all of them since the last arming.
        missed: ticks that began over a full period late.
        missed_alone: what would have been missed had the time not passed in which none of the processes that only tick
            ran; None where these have no real-time priority, or where the arm stalled more often than it can tell.
        ticks: in the measured span.
        reference_missed, reference_max_ms: of processes that only tick, one per processor (one in all beyond eight),
            at a priority above: periods by which they were late, in all, and the greatest lateness.
        overhead_p50_ms, overhead_p99_ms, overhead_max_ms: from when an observation could be complete (the tick of the
            last camera that had to be waited for) to the publication of its chunk, less inference.
        since_stamp_p50_ms, since_stamp_p99_ms: the same from the observation's own stamp, which is the first camera's:
            cameras run freely, and the second one's picture may be taken a few ms after it.
        chunks: in the measured span.
        inference_p50_ms: of one chunk.
        inference_share: of the time in which the engine worked, 0 to 1.
        images_per_s: color and depth pictures that the policy's process received, all streams together.
        images_due_per_s: that the cameras were to send.
        cpu: cores used per process; ``policy_worker`` is the engine, ``bench`` the emulated arm and the wrenches.
        stops: why the arm stopped in the measured span; it was armed again each time.
        rate_hz, seconds, width, height, camera_rate: what was measured.
        realtime_priority: asked for the arm, cameras and policy get BELOW_ARM less; what was in effect is
            ``scheduler``, of the control thread.
        scheduler: scheduler and priority of the control thread.
        engine_threads: of the engine.
        conditions: what else went on.
        goals_met: jitter p99 below 2 ms, overhead p99 below 5 ms and no miss.
        problem: why figures may not be those of the software, or None.
    """

    jitter_p50_ms: float
    jitter_p99_ms: float
    jitter_max_ms: float
    missed: int
    missed_alone: int | None
    ticks: int
    reference_missed: int
    reference_max_ms: float
    overhead_p50_ms: float
    overhead_p99_ms: float
    overhead_max_ms: float
    since_stamp_p50_ms: float
    since_stamp_p99_ms: float
    chunks: int
    inference_p50_ms: float
    inference_share: float
    images_per_s: float
    images_due_per_s: float
    cpu: dict[str, float]
    stops: tuple[str, ...]
    rate_hz: float
    seconds: float
    width: int
    height: int
    camera_rate: float
    realtime_priority: int
    scheduler: str
    engine_threads: int
    conditions: Conditions
    goals_met: bool
    problem: str | None


def run_loop_bench(
    seconds: float = 600.0,
    rate_hz: float = 100.0,
    width: int = 640,
    height: int = 480,
    camera_rate: float = 30.0,
    realtime_priority: int = 0,
    seed: int = 0,
) -> LoopBench:
    """Run the graph for ``seconds`` and return what its nodes measured of themselves.

    Raises:
        BenchError: a value is out of range, or a process failed.
    """
    for name, value, low, high in (
        ("seconds", seconds, 2.0, 86_400.0), ("rate", rate_hz, 20.0, 500.0), ("width", width, 96, 4096),
        ("height", height, 96, 4096), ("camera rate", camera_rate, 1.0, 120.0), ("priority", realtime_priority, 0, 99),
        ("seed", seed, 0, 2**31 - 1),
    ):  # fmt: skip
        if not low <= value <= high:
            raise BenchError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
    size = ArmPolicy(width=width, height=height, camera_rate=camera_rate, rate=camera_rate, executed=1, seed=seed)
    with (
        tempfile.TemporaryDirectory(prefix="dcqfa_loop_") as folder,
        Graph() as graph,
        InovoEmulator(ready=True) as emulator,
        wrenches(graph),
    ):
        bundle = write_arm_policy(Path(folder) / "random_arm", size)
        run = _Run(graph, emulator.port, bundle, size, rate_hz, realtime_priority)
        result = run.measure(seconds)
        graph.stop_all()
    return result


class _Run:
    """The processes of one measurement."""

    def __init__(
        self, graph: Graph, port: int, bundle: Path, size: ArmPolicy, rate_hz: float, realtime_priority: int
    ) -> None:
        self._graph, self._size, self._rate_hz, self._priority = graph, size, rate_hz, realtime_priority
        below = max(1, realtime_priority - BELOW_ARM) if realtime_priority else 0
        camera: dict[str, Any] = {
            "source": "synthetic",
            "width": size.width,
            "height": size.height,
            "fps": float(size.camera_rate),
            "realtime_priority": below,
        }
        arm: dict[str, Any] = {
            **PARAMETERS, "command_source": "policy", "rate": rate_hz, "cameras": str(list(CAMERAS)),
            "state_rate": size.state_rate, "inovo.host": "127.0.0.1", "inovo.port": port,
            "realtime_priority": realtime_priority, "maximum_age.observation": 1.0, "maximum_age.camera": 1.0,
            # One computer: what a busy one delays must not end the measurement.
            "clock.maximum_skew_ms": 1000.0, "clock.silence_s": 10.0,
        }  # fmt: skip
        policy: dict[str, Any] = {"bundle": bundle, "variant": VARIANT, "runtime": "onnxruntime"}
        policy["realtime_priority"] = below
        policy["observation_sources"] = _list(SOURCES)
        self._nodes: dict[str, Spawned] = {
            **{
                f"{name}_camera_node": graph.spawn_node(CAMERA_NODE, f"{name}_camera_node", camera_name=name, **camera)
                for name in CAMERAS
            },
            "arm_node": graph.spawn_node(ARM_NODE, "arm_node", **arm),
            "policy_node": graph.spawn_node(POLICY_NODE, "policy_node", **policy),
        }
        self._stops: list[str] = []
        self._stalls: set[Stall] = set()  # that the arm has told
        self._reports: dict[str, tuple[Mapping[str, str], float]] = {}  # newest values, and when they came
        entry = interface("diagnostics")
        graph.node.create_subscription(entry.message_class(), entry.name, self._hear, qos(entry.qos))

    def _hear(self, message: Any) -> None:
        for report in from_message(message):
            name, values = f"{report.node}/{report.status.name}", report.status.values
            if name == "arm_node/arm":  # before the report is to be seen: whoever sees it has its stalls, too
                self._stalls.update(stalls_of(values.get("stalls", "")))
            self._reports[name] = values, time.monotonic()

    def _values(self, name: str) -> Mapping[str, str]:
        return self._reports.get(name, ({}, 0.0))[0]

    def measure(self, seconds: float) -> LoopBench:
        for name, node in self._nodes.items():
            if not self._graph.activate(name):
                raise BenchError(f"{name} was not activated: {node.output[-500:]}")
        try:
            wait_until(self._loaded, "a loaded variant")
            wait_until(lambda: self._armed() and self._published() > 1, "chunks")
        except AssertionError as error:
            told = {name: node.output[-300:] for name, node in self._nodes.items() if node.output}
            raise BenchError(f"{error}: {self._values('policy_node/policy')}; {told}") from error
        time.sleep(_SETTLE_S)
        self._graph.trigger("arm_node/disarm")
        wait_until(self._armed, "an armed arm")  # jitter and misses are counted from here
        bare = bare_tick.BareTicks(self._rate_hz, self._priority)
        try:
            self._stops.clear()
            self._reports.clear()
            before, cpu_before, begun = self._figures(), self._cpu(), time.monotonic()
            conditions = watch_conditions()
            while (left := begun + seconds - time.monotonic()) > 0:
                time.sleep(min(_POLL_S, left))
                self._armed()
                self._check_alive()
            span, cpu_after, seen = time.monotonic() - begun, self._cpu(), conditions()
            self._reports.clear()
            after, stalls = self._figures(), tuple(self._stalls)
            reference = bare.result()
        finally:
            bare.end()
        alone = missed_alone(stalls, _missed(before, after), round(begun * 1e9), reference, round(1e9 / self._rate_hz))
        cpu = {name: round((used - cpu_before.get(name, 0.0)) / span, 4) for name, used in cpu_after.items()}
        return self._result(seconds, span, before, after, cpu, seen, reference, alone)

    def _result(
        self,
        seconds: float,
        span: float,
        before: Figures,
        after: Figures,
        cpu: dict[str, float],
        seen: Conditions,
        reference: bare_tick.Told,
        alone: int | None,
    ) -> LoopBench:
        (arm, policy, at), (arm_before, policy_before, at_before) = after, before
        pictures = _pictures(policy) - _pictures(policy_before)
        chunks = int(policy["published"]) - int(policy_before["published"])
        inference = float(policy["inference_p50_ms"])
        jitter, overhead = float(arm["jitter_p99_ms"]), float(policy["overhead_p99_ms"])
        size = self._size
        missed = _missed(before, after)
        problem = self._problem(seen)
        return LoopBench(
            jitter_p50_ms=float(arm["jitter_p50_ms"]),
            jitter_p99_ms=jitter,
            jitter_max_ms=float(arm["jitter_max_ms"]),
            missed=missed,
            missed_alone=alone,
            ticks=int(arm["ticks"]) - int(arm_before["ticks"]),
            reference_missed=reference.missed,
            reference_max_ms=reference.max_ms,
            overhead_p50_ms=float(policy["overhead_p50_ms"]),
            overhead_p99_ms=overhead,
            overhead_max_ms=float(policy["overhead_max_ms"]),
            since_stamp_p50_ms=float(policy["since_stamp_p50_ms"]),
            since_stamp_p99_ms=float(policy["since_stamp_p99_ms"]),
            chunks=chunks,
            inference_p50_ms=inference,
            inference_share=round(min(1.0, chunks * inference / 1e3 / span), 3),
            images_per_s=round(pictures / (at - at_before), 2),
            images_due_per_s=2.0 * len(size.cameras) * size.camera_rate,
            cpu=cpu,
            stops=tuple(self._stops),
            rate_hz=self._rate_hz,
            seconds=seconds,
            width=size.width,
            height=size.height,
            camera_rate=size.camera_rate,
            realtime_priority=self._priority,
            scheduler=arm["scheduler"],
            engine_threads=1,
            conditions=seen,
            goals_met=jitter < JITTER_LIMIT_MS and overhead < OVERHEAD_LIMIT_MS and not missed and not self._stops,
            problem=problem,
        )

    def _problem(self, seen: Conditions) -> str | None:
        cores = available_cores()
        told = []
        if seen.load_1min > cores - 0.5:
            told.append(f"load {seen.load_1min:.1f} on {cores} cores before the run: other programs delayed this one")
        if self._stops:
            told.append(f"the arm stopped {len(self._stops)} times: {self._stops[0]}")
        return "; ".join(told) or None

    def _published(self) -> int:
        return int(self._values("policy_node/policy").get("published") or 0)

    def _loaded(self) -> bool:
        values = self._values("policy_node/policy")
        if int(values.get("swap_failures", "0")):
            raise BenchError(f"policy_node did not load its variant: {values.get('last_swap', '')}")
        return bool(values.get("variant"))

    def _armed(self) -> bool:
        """Arm where the arm is disarmed, and note why it was."""
        values = self._values("arm_node/arm")
        if values and values.get("activity") != "disarmed":
            return True
        if values.get("stop_code") not in (None, "never_armed", "operator"):
            self._stops.append(values["stop_code"])
        self._graph.trigger("arm_node/reset_stop")
        response = self._graph.trigger("arm_node/arm")
        if response.success:
            self._reports.pop("arm_node/arm", None)  # what was said before this arming is not what is so now
        return bool(response.success) or response.message == "already armed"

    def _check_alive(self) -> None:
        for name, node in self._nodes.items():
            if node.process.poll() is not None:
                raise BenchError(f"{name} ended: {node.output[-500:]}")

    def _figures(self) -> Figures:
        """Newest reports of arm and policy, and when the latter came."""
        wait_until(lambda: {"arm_node/arm", "policy_node/policy"} <= self._reports.keys(), "reports")
        policy, at = self._reports["policy_node/policy"]
        return self._values("arm_node/arm"), policy, at

    def _cpu(self) -> dict[str, float]:
        """Processor seconds per process so far."""
        pids = {name: node.process.pid for name, node in self._nodes.items()}
        workers = process_tree(pids["policy_node"])[1:]
        used = {name: cpu_seconds(pid) for name, pid in pids.items()}
        used["policy_worker"] = sum(cpu_seconds(pid) for pid in workers)
        used["bench"] = time.process_time()
        return used


def missed_alone(
    stalls: Iterable[Stall], missed: int, begun_ns: int, reference: bare_tick.Told, period_ns: int
) -> int | None:
    """Ticks that the control tick would have missed had the computer not stood still; None where that is not known.

    Args:
        stalls: that the arm has told, some from before the measured span.
        missed: in the measured span.
        begun_ns: when it began, monotonic.
        reference: what the processes that only tick have measured.
        period_ns: of the control tick.
    """
    seen = sorted(stall for stall in stalls if stall[0] >= begun_ns)
    if sum((begin - deadline) // period_ns for deadline, begin in seen) != missed:
        return None  # more stalls in a second than a report names
    return bare_tick.missed_alone(seen, reference, period_ns)


def _missed(before: Figures, after: Figures) -> int:
    """Ticks missed in between, also those of before a stop."""
    return int(after[0]["missed_ticks_in_all"]) - int(before[0]["missed_ticks_in_all"])


def _list(values: tuple[str, ...]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


def _pictures(policy: Mapping[str, str]) -> int:
    return sum(int(value) for key, value in policy.items() if key.startswith("pictures."))
