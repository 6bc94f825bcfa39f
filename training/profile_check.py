"""Prediction against measurement of whole subnets, and tables that explain all networks that were timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Generator

from training.cost import cost, fixed_bytes
from training.draws import stratified_subnet
from training.lut import LookUpTable, Validation, stored_subnet
from training.policy_shape import PolicyShape
from training.profile_fit import Timed, fit_networks
from training.profile_graphs import BlockSize
from training.profile_networks import Workbench
from training.profile_table import GroupTimes
from training.space import SearchSpace
from training.space_counts import real_bytes
from training.subnet import FLOAT_BITS, Precision, Subnet, make_layer

Measured = tuple[Subnet, float]
"""A subnet and the milliseconds of a whole chunk."""

REFERENCE_WEIGHT = 5.0  # the context network is part of every group: its time is known best


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


def fitted(
    table: LookUpTable,
    bench: Workbench,
    precision: Precision,
    results: Mapping[str, GroupTimes],
    measured: Sequence[Measured],
) -> LookUpTable:
    """Put what all networks of one precision tell together in the place of differences (``training.profile_fit``).

    The fixed part is set so that the context network takes in the table what it took.

    Args:
        table: of differences.
        bench: the space and the networks that were timed.
        precision: of whole networks; every precision that executes as this one gets the same.
        results: groups of networks around the context network.
        measured: random subnets with their milliseconds per chunk.
    """
    shape, layout, forms = bench.space.shape, bench.layout, bench.runtime.forms
    steps, row = bench.settings.diffusion.steps, table.fixed_parts(shape, precision)
    executed = [forms[precision].executed, *(n for n in [forms[precision].narrow] if n in layout.executed)]
    entries = {BlockSize(e.heads, e.mlp, e.executed): e for e in table.blocks if e.executed in executed}

    def bytes_of(size: BlockSize) -> int:
        widest = max(bench.space.weight_bits), max(bench.space.activation_bits)
        layer = make_layer((size.heads, size.mlp), precision, *widest)
        stored = stored_subnet(table, Subnet((layer,) + (None,) * (len(shape.blocks) - 1), precision))
        return real_bytes(shape, stored) - fixed_bytes(shape, stored.precision)

    timed = []
    for form in executed:
        step_ms = layout.context_ms(results, form) / steps
        timed.append(Timed(tuple(layout.context(form)), step_ms, REFERENCE_WEIGHT))
        for key, networks in layout.networks(bench.space, form):
            group = results[key]
            for blocks, ms in zip(networks, group.median_ms[1:], strict=True):
                timed.append(Timed(tuple(blocks), ms / group.median_ms[0] * step_ms))
    for subnet, ms in measured:
        blocks = bench.blocks(subnet)
        chunk = row.encoder_ms + sum(entries[size].kv_ms for size in blocks)
        timed.append(Timed(tuple(blocks), (ms - chunk) / steps))
    fit = fit_networks([t for t in timed if t.step_ms > 0.0], list(entries), bytes_of)
    context = round(layout.context_ms(results, executed[0]) / steps, 6)
    missing = context - fit.step_ms(layout.context(executed[0]), bytes_of)
    entered = tuple(
        e.model_copy(update={"step_ms": round(fit.block_ms[BlockSize(e.heads, e.mlp, e.executed)], 6)})
        if e.executed in executed
        else e
        for e in table.blocks
    )
    change = {
        "step_fixed_ms": round(max(0.0, fit.fixed_ms + missing), 6),
        "cache": fit.cache,
        "context_step_ms": context,
    }
    fixed = tuple(r.model_copy(update=change) if forms[r.precision].executed == executed[0] else r for r in table.fixed)
    return table.model_copy(update={"blocks": entered, "fixed": fixed})


def random_subnet(space: SearchSpace, precision: Precision, generator: Generator) -> Subnet:
    """Draw a subnet of one precision; depth, width and bits are each spread evenly over their range."""
    drawn = stratified_subnet(space, generator, whole_network=False)
    bits = FLOAT_BITS.get(precision)
    if bits is None:
        return drawn
    return Subnet(tuple(x and replace(x, w=bits, a=bits) for x in drawn.layers), precision)
