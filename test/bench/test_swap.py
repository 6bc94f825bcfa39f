"""The benchmark of exchanges: it really exchanges, and what it reports is what happened."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bench.swap import run_swap_bench
from dcqfa_ros.bundle.load import load_bundle
from test.runtime.conftest import policy_bundle

__all__ = ["policy_bundle"]


def test_every_exchange_is_counted_and_nothing_is_left(policy_bundle) -> None:
    bench = run_swap_bench(load_bundle(policy_bundle()), swaps=2, seed=3)
    assert (bench.swaps, bench.failures, bench.reasons) == (2, 0, ())
    assert (bench.workers_left, bench.fds_left, bench.memory_files_left) == (0, 0, 0)
    assert bench.chunks >= 2 and bench.ticks > 5 and bench.rss_before_mb > 50.0
    assert bench.swap_ms_max >= bench.swap_ms_p50 > bench.gap_ms_max >= 0.0
    assert bench.variants == ("fp32", "w8a8") and bench.python == sys.executable and bench.runtime_version[0].isdigit()
    assert json.loads(json.dumps(dataclasses.asdict(bench)))["missed_ticks"] == bench.missed_ticks


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"swaps": 0}, "swaps: expected 1"),
        ({"rate_hz": float("nan")}, "rate: expected 1"),
        ({"variants": ["fp32", "fp32"]}, "at least two different"),
        ({"variants": ["fp32", "w2a2"]}, "w2a2"),
        ({"runtime": "tensorflow"}, "tensorflow"),
        ({"python": "/nowhere/python"}, "--python /nowhere/python"),
        ({"python": "/bin/true"}, "onnxruntime is not installed there"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(policy_bundle, options, told) -> None:
    with pytest.raises(Exception, match=told) as refused:
        run_swap_bench(load_bundle(policy_bundle()), **options)
    assert isinstance(refused.value, BenchError) or "tensorflow" in told
