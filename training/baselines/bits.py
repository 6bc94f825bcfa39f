"""Bit widths that a baseline is asked for, by name: ``w8a8``, ``w4a4``, ``w4a16`` (weights alone), ``fp8``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dcqfa_ros.errors import UserError

FLOAT = 16  # bits of what is left in floating point
WEIGHT_BITS = (2, 3, 4, 8, FLOAT)
ACTIVATION_BITS = (4, 8, FLOAT)


class BaselineError(UserError, ValueError):
    """A baseline that cannot be made; the message says what was expected and what to do."""


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits of weights and activations of the quantized linears; 16 means left in floating point.

    ``fp8`` makes both E4M3 codes in place of integers (weights and activations are 8 then).

    Raises:
        BaselineError: no quantizer has such bits.
    """

    weights: int
    activations: int
    fp8: bool = False

    def __post_init__(self) -> None:
        """Refuse what no quantizer has."""
        if self.weights not in WEIGHT_BITS or self.activations not in ACTIVATION_BITS:
            raise BaselineError(
                f"bits w{self.weights}a{self.activations}: expected weights of {_listed(WEIGHT_BITS)} and activations "
                f"of {_listed(ACTIVATION_BITS)} bits, such as w8a8, w4a4 or w4a16"
            )
        if self.fp8 and (self.weights, self.activations) != (8, 8):
            raise BaselineError(f"bits w{self.weights}a{self.activations}: FP8 has 8 bits of both")

    def __str__(self) -> str:
        return "fp8" if self.fp8 else f"w{self.weights}a{self.activations}"


def parse_bits(text: str) -> Bits:
    """The bits called ``text``.

    Raises:
        BaselineError: there are none of that name.
    """
    if text == "fp8":
        return Bits(8, 8, fp8=True)
    match = re.fullmatch(r"w(\d{1,2})a(\d{1,2})", text)
    if match is None:
        raise BaselineError(f"bits {text!r}: expected fp8 or weight and activation bits such as w8a8, w4a4 or w4a16")
    return Bits(int(match[1]), int(match[2]))


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values[:-1]) + f" or {values[-1]}"
