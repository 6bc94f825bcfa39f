"""What it costs to serve N devices: one supernet and a search for each, against one fixed-bit training for each.

Figures are measured ones, kept in a YAML file with the source of each. The full-precision policy is behind both ways
and counts for neither; nor does profiling a device, which both need to know what a network costs there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dcqfa_ros.bundle.document import DocumentError, parse_document
from dcqfa_ros.bundle.schema import Text
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.errors import UserError

DEVICES = (1, 2, 3, 5, 10, 20)  # for the table


class AmortisedError(UserError, ValueError):
    """A file of costs that cannot be used; the message names file and field."""


class Measured(StrictModel):
    """Cost of one run.

    Attributes:
        name: what ran.
        steps: optimizer steps; 0 for a search.
        hours: on the clock, one machine.
        source: where the figures come from.
    """

    name: Text
    steps: Annotated[int, Field(ge=0)]
    hours: Annotated[float, Field(gt=0.0)]
    source: Text


Runs = Annotated[tuple[Measured, ...], Field(min_length=1)]


class AmortisedCosts(StrictModel):
    """The whole file; of several runs of one kind the mean counts.

    Attributes:
        machine: where all of it ran.
        supernet: training of one supernet.
        search: search of one device in it.
        fixed_bit: quantization-aware training of one network at the bits and widths that a device was given.
    """

    machine: Text
    supernet: Runs
    search: Runs
    fixed_bit: Runs


def load_amortised(path: Path) -> AmortisedCosts:
    """Read the costs.

    Raises:
        AmortisedError: the file is missing or not of the schema.
    """
    try:
        return parse_document(path.read_bytes(), AmortisedCosts)
    except OSError as error:
        raise AmortisedError(f"{path}: cannot be read ({error.strerror}); give the file of measured costs") from error
    except DocumentError as error:
        lines = [f"{path}: {field or '(document)'}: {message}" for field, message in error.issues]
        raise AmortisedError("\n".join(lines)) from error


def break_even(once: float, each: float, other_each: float) -> int | None:
    """Fewest devices N from which ``once + N each`` is at most ``N other_each``; None where there is no such N.

    Raises:
        ValueError: a cost is negative or not finite.
    """
    if not all(math.isfinite(value) and value >= 0.0 for value in (once, each, other_each)):
        raise ValueError(f"costs: expected finite numbers from 0 on, got {once}, {each} and {other_each}")
    saved = Fraction(other_each) - Fraction(each)  # exact: nearly equal costs would be lost to rounding
    if saved <= 0:
        return 1 if once == 0.0 and saved == 0 else None
    return max(1, math.ceil(Fraction(once) / saved))


def amortised(costs: AmortisedCosts) -> dict[str, Any]:
    """Costs of both ways for some numbers of devices and the break-even N, in steps and in hours, JSON-ready."""
    units: dict[str, dict[str, Any]] = {}
    for unit in ("steps", "hours"):
        once, each, fixed = (_mean(getattr(costs, kind), unit) for kind in ("supernet", "search", "fixed_bit"))
        units[unit] = {
            "supernet": once,
            "search_per_device": each,
            "fixed_bit_per_device": fixed,
            "break_even": break_even(once, each, fixed),
            "rows": [{"devices": n, "supernet": once + n * each, "fixed_bit": n * fixed} for n in DEVICES],
        }
    return {
        "machine": costs.machine,
        **units,
        "sources": {
            kind: [run.model_dump(mode="json") for run in getattr(costs, kind)]
            for kind in ("supernet", "search", "fixed_bit")
        },
    }


def _mean(runs: Sequence[Measured], unit: str) -> float:
    return math.fsum(getattr(run, unit) for run in runs) / len(runs)
