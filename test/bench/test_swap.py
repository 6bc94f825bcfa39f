"""The benchmark of exchanges: it really exchanges, and what it reports is what happened."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time

import pytest

from dcqfa_ros.bench import bare_tick, swap_cell
from dcqfa_ros.bench.processes import BenchError, children
from dcqfa_ros.bench.swap import run_swap_bench
from dcqfa_ros.bench.swap_cell import running_cell
from dcqfa_ros.bench.swap_tick import TickProcess
from dcqfa_ros.bundle.load import load_bundle
from test.runtime.conftest import policy_bundle

__all__ = ["policy_bundle"]


class _Halted(TickProcess):
    """A control tick that is halted for a while once counting has begun."""

    def count_anew(self) -> None:
        super().count_anew()
        os.kill(self.pid, signal.SIGSTOP)
        time.sleep(0.1)
        os.kill(self.pid, signal.SIGCONT)


def test_exchanges_and_late_ticks_are_counted_and_nothing_is_left(policy_bundle, monkeypatch) -> None:
    monkeypatch.setattr(swap_cell, "TickProcess", _Halted)
    bench = run_swap_bench(load_bundle(policy_bundle()), swaps=2, seed=3)
    assert (bench.swaps, bench.failures, bench.reasons) == (2, 0, ())
    assert (bench.workers_left, bench.fds_left, bench.memory_files_left) == (0, 0, 0)
    assert bench.chunks >= 2 and bench.ticks > 5 and bench.rss_before_mb > 50.0
    assert bench.swap_ms_max >= bench.swap_ms_p50 > bench.gap_ms_max >= 0.0
    assert bench.variants == ("fp32", "w8a8") and bench.python == sys.executable and bench.runtime_version[0].isdigit()
    assert json.loads(json.dumps(dataclasses.asdict(bench)))["missed_ticks"] == bench.missed_ticks
    assert bench.reference_missed is not None and bench.reference_missed >= 0
    assert bench.reference_max_ms is not None and bench.reference_max_ms > 0.0
    assert bench.missed_alone is None, "the references had no priority"
    assert bench.missed_ticks >= 5 and bench.jitter_max_ms > 50.0 and not bench.goals_met
    assert bench.conditions.load_1min > 0.0 and bench.tick_scheduler.startswith("SCHED_")


def test_a_lost_reference_process_loses_no_exchange(policy_bundle, monkeypatch, capfd) -> None:
    make = bare_tick.BareTicks

    def lost(*given):
        ticks = make(*given)
        os.kill(ticks.pids[-1], signal.SIGKILL)
        return ticks

    monkeypatch.setattr(bare_tick, "BareTicks", lost)
    bench = run_swap_bench(load_bundle(policy_bundle()), swaps=1)
    assert (bench.swaps, bench.failures, bench.fds_left, bench.workers_left) == (1, 0, 0, 0)
    assert (bench.reference_missed, bench.reference_max_ms, bench.missed_alone) == (None, None, None)
    assert "the reference tick ended with code -9" in capfd.readouterr().err


def test_a_control_tick_can_be_kept_on_a_processor(policy_bundle, monkeypatch) -> None:
    seen, processor = [], max(os.sched_getaffinity(0))

    class Watched(swap_cell.TickProcess):
        def report(self):
            seen.append(os.sched_getaffinity(self.pid))
            return super().report()

    monkeypatch.setattr(swap_cell, "TickProcess", Watched)
    bench = run_swap_bench(load_bundle(policy_bundle()), swaps=1, processor=processor)
    assert bench.processor == processor and seen == [{processor}]
    assert bench.missed_while_processor_ran is None, "the references had no priority"


def test_without_its_control_tick_nothing_is_measured_and_nothing_is_left(policy_bundle) -> None:
    before, others = swap_cell.Left.now(), children()  # of other tests
    with running_cell(load_bundle(policy_bundle()), 100.0, 1) as cell:
        assert cell.exchange("fp32", "onnxruntime").ok
        workers = [pid for pid in children() if pid not in (cell.tick.pid, *others)]
        resident = sum(swap_cell.resident_bytes(pid) for pid in (os.getpid(), *workers, *others))
        assert len(workers) == 1 and cell.memory() == pytest.approx(resident, rel=0.05)  # the tick's is not in it
        os.kill(cell.tick.pid, signal.SIGKILL)
        with pytest.raises(BenchError, match=rf"control tick's process \(pid {cell.tick.pid}\) was killed by signal 9"):
            cell.exchange("w8a8", "onnxruntime")
    assert swap_cell.Left.now() == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"swaps": 0}, "swaps: expected 1"),
        ({"rate_hz": float("nan")}, "rate: expected 1"),
        ({"variants": ["fp32", "fp32"]}, "at least two different"),
        ({"variants": ["fp32", "w2a2"]}, "w2a2"),
        ({"processor": 4321}, "processor: expected one of 0.*, got 4321"),
        ({"runtime": "tensorflow"}, "tensorflow"),
        ({"python": "/nowhere/python"}, "--python /nowhere/python"),
        ({"python": "/bin/true"}, "onnxruntime is not installed there"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(policy_bundle, options, told) -> None:
    with pytest.raises(Exception, match=told) as refused:
        run_swap_bench(load_bundle(policy_bundle()), **options)
    assert isinstance(refused.value, BenchError) or "tensorflow" in told
