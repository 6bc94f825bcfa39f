"""Options of methods as they come from a command line: known, of the right kind and in range, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from training.baselines.bits import BaselineError


def no_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse options that ``method`` does not have.

    Raises:
        BaselineError: naming them.
    """
    if options:
        raise BaselineError(f"{method}: takes no option {', '.join(sorted(options))}")


def check_switch(method: str, name: str, value: object) -> None:
    """Refuse what is neither true nor false.

    Raises:
        BaselineError: naming the option.
    """
    if not isinstance(value, bool):
        raise BaselineError(f"{method}: {name}: expected true or false, got {value!r}")


def check_count(method: str, name: str, value: object, least: int) -> None:
    """Refuse anything but a whole number of at least ``least``.

    Raises:
        BaselineError: naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BaselineError(f"{method}: {name}: expected a whole number from {least}, got {value!r}")


def check_number(method: str, name: str, value: object, low: float, high: float) -> None:
    """Refuse anything but a number from ``low`` to ``high``.

    Raises:
        BaselineError: naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limits = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise BaselineError(f"{method}: {name}: expected a number {limits}, got {value!r}")
