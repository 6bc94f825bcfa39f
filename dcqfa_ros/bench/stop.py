"""Measure how soon a contact stops the arm: through pseudo-terminal, wrench_node, arm_node and WebSocket."""

from __future__ import annotations

import threading
import time

from dcqfa_ros.bench.arm import ArmBench, Cell, check, repeat, summarize
from dcqfa_ros.bench.conditions import watch_conditions
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.ros.testing import Graph, wait_until
from dcqfa_ros.sim.ft300s import FT300SEmulator, FT300SOptions, SentFrame
from dcqfa_ros.sim.inovo import InovoEmulator

_CONTACT_N = 60.0  # well beyond the force guard's limit
_SPEED = 0.02  # m/s
_COUNTS_PER_N = 100.0
_WAIT_S = 5.0


def run_stop_bench(trials: int = 50, rate_hz: float = 100.0) -> ArmBench:
    """Measure from the last byte of the frame that crosses the limit to zero twist on the socket.

    The emulated sensor paces its bytes at 19200 baud.

    Raises:
        BenchError: a value is out of range, or a process failed.
    """
    check(trials, rate_hz)
    with (
        Graph() as graph,
        InovoEmulator(ready=True) as emulator,
        FT300SEmulator(FT300SOptions(paced=True)) as sensor,
    ):
        sensor_node = graph.spawn_node("dcqfa_ros.nodes.wrench_node", "wrench_node", port=sensor.port)
        cell = Cell(graph, emulator, rate_hz)
        if not graph.activate("wrench_node"):
            raise BenchError(f"wrench_node was not activated: {sensor_node.output[-500:]}")
        cell.activate()
        conditions = watch_conditions()
        latencies, repeated = repeat(trials, lambda n: _trial(cell, sensor, _SPEED if n % 2 else -_SPEED))
        seen = conditions()
        graph.stop_all()
    what = "from the last byte of the crossing frame on the serial line to zero twist read on the socket"
    return summarize(latencies, 15.0, rate_hz, what, seen, repeated)


def _trial(cell: Cell, sensor: FT300SEmulator, speed: float) -> float:
    """Move, touch, and return the milliseconds until the zero twist."""
    sensor.set_load([0.0] * 6)
    cell.arm()
    halt = threading.Event()

    def drive() -> None:
        while not halt.wait(0.02):
            cell.command(speed)

    driver = threading.Thread(target=drive, name="commands", daemon=True)
    driver.start()
    try:
        after = cell.last
        cell.frame(lambda f: f.values is not None and abs(f.values[0]) > 0.8 * _SPEED, after)
        time.sleep(0.1)
        after, since = cell.last, sensor.frames[-1].number
        sensor.set_load([0.0, 0.0, _CONTACT_N, 0.0, 0.0, 0.0])
        stop = cell.frame(lambda f: f.values is not None and not f.moves, after)
        crossing = _crossing(sensor, since)
    finally:
        halt.set()
        driver.join()
    if [f for f in cell.emulator.frames if f.number > stop.number and f.moves]:
        raise BenchError("arm_node sent a motion command after the stop")
    return (stop.stamp_ns - crossing.last_byte_ns) / 1e6


def _crossing(sensor: FT300SEmulator, since: int) -> SentFrame:
    """Return the first frame after number ``since`` that shows the contact."""

    def find() -> SentFrame | None:
        limit = 0.5 * _CONTACT_N * _COUNTS_PER_N
        return next((f for f in list(sensor.frames) if f.number > since and abs(f.counts[2]) > limit), None)

    frame: SentFrame = wait_until(find, "crossing frame", _WAIT_S)
    return frame
