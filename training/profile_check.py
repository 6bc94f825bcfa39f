"""Prediction against measurement of whole subnets, and what is fitted where sums of block times mislead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Generator

from training.cost import cost, fixed_bytes
from training.draws import stratified_subnet
from training.lut import LookUpTable, Validation
from training.policy_shape import PolicyShape
from training.space import SearchSpace
from training.space_counts import real_bytes
from training.subnet import FLOAT_BITS, Precision, Subnet

Measured = tuple[Subnet, float]
"""A subnet and the milliseconds of a whole chunk."""

_THRESHOLDS = 200
WORTH_A_TERM = 0.9  # a working-set term must cut the error on subnets it was not fitted to by a tenth


def validation(
    table: LookUpTable, shape: PolicyShape, precision: Precision, measured: Sequence[Measured], steps: int
) -> Validation:
    """Compare predicted with measured latencies of chunks of ``steps`` denoising steps."""
    errors = relative_errors(table, shape, measured, steps)
    size = np.abs(errors)
    return Validation(
        precision=precision,
        tokens=shape.blocks[-1].tokens,
        subnets=len(measured),
        steps=steps,
        mean=round(float(errors.mean()), 4),
        median_absolute=round(float(np.median(size)), 4),
        p90_absolute=round(float(np.percentile(size, 90)), 4),
        max_absolute=round(float(size.max()), 4),
    )


def relative_errors(
    table: LookUpTable, shape: PolicyShape, measured: Sequence[Measured], steps: int
) -> NDArray[np.float64]:
    """(predicted - measured) / measured of each subnet."""
    predicted = np.array([cost(table, shape, subnet, steps).latency_ms for subnet, _ in measured])
    return predicted / np.array([ms for _, ms in measured]) - 1.0


def reference_ms(table: LookUpTable, shape: PolicyShape, reference: Subnet, steps: int) -> float:
    """Milliseconds of a chunk of the context network when ``table`` was measured.

    They are the sum of its entries exactly, because the fixed parts are what is left of that network. A working-set
    term is left out: it is fitted afterwards, to other networks, and tells how far sums are off for those.

    Args:
        table: measured, with a working-set term or without.
        shape: the policy.
        reference: the context network (:meth:`training.profile_networks.Workbench.reference`).
        steps: denoising steps of a chunk.

    Raises:
        TableError: the table lacks an entry of it.
    """
    without = {"working_set_bytes": None, "working_set_ms_per_mb": None}
    rows = tuple(row.model_copy(update=without) for row in table.fixed)
    return cost(table.model_copy(update={"fixed": rows}), shape, reference, steps).latency_ms


def with_working_set(
    table: LookUpTable, shape: PolicyShape, measured: Sequence[Measured], steps: int
) -> tuple[LookUpTable, Sequence[Measured]]:
    """Add a working-set term for floating-point networks, where it explains what sums of block times leave.

    Fitted to every second subnet, and kept if it helps on the others. It holds for every precision that is executed as
    that of the subnets is.

    Returns:
        The table, and the subnets it was not fitted to.
    """
    fit, held = measured[::2], measured[1::2]
    if not held:
        return table, measured
    sizes = np.array([real_bytes(shape, s) - fixed_bytes(shape, s.precision) for s, _ in fit], np.float64)
    times = np.array([ms for _, ms in fit])
    predicted = np.array([cost(table, shape, s, steps).latency_ms for s, _ in fit])
    missing = 1.0 - predicted / times
    best = (float((missing**2).sum()), 0.0, 0.0)
    for threshold in np.linspace(0.0, sizes.max(), _THRESHOLDS, endpoint=False):
        beyond = steps * np.maximum(0.0, sizes - threshold) / 1e6 / times
        slope = max(0.0, float(beyond @ missing) / float(beyond @ beyond))
        best = min(best, (float(((missing - slope * beyond) ** 2).sum()), float(threshold), slope))
    term = {"working_set_bytes": int(best[1]), "working_set_ms_per_mb": best[2]}
    executed = {form.precision: form.executed for form in table.forms}
    alike = executed[measured[0][0].precision]
    rows = tuple(row.model_copy(update=term) if executed[row.precision] == alike else row for row in table.fixed)
    fitted = table.model_copy(update={"fixed": rows})
    before, after = (float((relative_errors(t, shape, held, steps) ** 2).mean()) for t in (table, fitted))
    return (fitted, held) if after < WORTH_A_TERM**2 * before else (table, measured)


def random_subnet(space: SearchSpace, precision: Precision, generator: Generator) -> Subnet:
    """Draw a subnet of one precision; depth, width and bits are each spread evenly over their range."""
    drawn = stratified_subnet(space, generator, whole_network=False)
    bits = FLOAT_BITS.get(precision)
    if bits is None:
        return drawn
    return Subnet(tuple(x and replace(x, w=bits, a=bits) for x in drawn.layers), precision)
