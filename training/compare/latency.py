"""Latency of one chunk of an entry: from a device's look-up table, or measured here, and which of the two."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from dcqfa_ros.bench.conditions import no_garbage_collection, versions, watch_conditions
from dcqfa_ros.devices.detect import detect
from dcqfa_ros.runtime.policy import PolicyRuntime
from training.compare.config import CompareConfig, found
from training.compare.contenders import Runnable
from training.cost import CostError, cost
from training.lut import TableError, load_table
from training.policy_shape import PolicyShape
from training.subnet import Subnet

WARM_UP = 5
ENGINE = "without a memory arena"  # how engines run; latencies of others are measured again
NO_SUBNET = "not told: the table knows no network of mixed bits outside a search space"
NOT_MEASURED = {"ms": None, "device": None, "kind": "measured", "note": "not measured: it has no exported form"}


def table_latency(
    config: CompareConfig, shape: PolicyShape, subnet: Subnet | None, steps: int, simulated: bool
) -> dict[str, Any]:
    """Latency by the look-up table of the comparison.

    Args:
        config: names the table.
        shape: the policy.
        subnet: what the table knows the entry as; None where it cannot be told.
        steps: denoising steps of a chunk.
        simulated: the entry has no exported form, so its method's own operations are not in the table.

    Raises:
        TableError: the table cannot be read.
    """
    assert config.latency.table is not None
    table = load_table(found(config.latency.table))
    kind = "modelled table" if table.modelled else "table"
    row: dict[str, Any] = {"ms": None, "device": table.name, "kind": kind, "note": None}
    if subnet is None:
        return row | {"note": NO_SUBNET}
    try:
        row["ms"] = cost(table, shape, subnet, steps).latency_ms
    except (CostError, TableError) as error:
        return row | {"note": f"not told: {error}"}
    if simulated:
        row["note"] = "as the whole network at these bits; operations of the method's own are not counted"
    return row


def measured_latency(runnables: Mapping[str, Runnable], rounds: int, steps: int | None) -> dict[str, dict[str, Any]]:
    """Median latency of one chunk of exported entries, batch 1, one thread, in turn within every round."""
    device = f"{detect().processor.model}, 1 thread"
    policies = {
        name: PolicyRuntime(runnable.spec, runnable.engine(large_batches=False)) for name, runnable in runnables.items()
    }
    times: dict[str, list[float]] = {name: [] for name in policies}
    conditions = watch_conditions()
    try:
        for policy in policies.values():
            policy.warm_up(steps, runs=WARM_UP)
        with no_garbage_collection():
            for number in range(rounds):
                for name, policy in policies.items():
                    observation = {
                        key.name: np.zeros((1, policy.observations.history, *key.shape), key.dtype)
                        for key in policy.observations.keys
                    }
                    started = time.perf_counter()
                    policy.predict(observation, [0], [number], steps)
                    times[name].append(1e3 * (time.perf_counter() - started))
    finally:
        for policy in policies.values():
            policy.close()
    seen = conditions()
    facts = {"device": device, "kind": "measured", **versions(["onnxruntime"])}
    note = f"median of {rounds}, batch 1, load {seen.load_1min:.1f}"
    return {name: {"ms": float(np.median(taken)), "note": note, **facts} for name, taken in times.items()}
