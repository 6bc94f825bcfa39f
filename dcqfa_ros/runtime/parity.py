"""Does a newly loaded variant compute what it should? Asked before it may move anything.

SHA-256 tells that a file is the one the bundle was sealed with, not that it is the right one: an export from the wrong
checkpoint, a stale engine or a runtime's bug are well-formed and finite. So every new worker computes chunks for fixed
observations with fixed noise, and these are compared with those the bundle records (``fixed_chunks``, where it does) or
with those of the variant accepted before it.

How far two variants of one bundle may lie apart follows from what the bundle records
(:class:`dcqfa_ros.bundle.provenance.ParityRecord`): each one's error ``rms`` against the full-precision policy, and
that of its export. By the triangle inequality their distance is at most the sum, on average; fixed observations that
fill the whole normalised range are further from the data than those the errors were recorded on, hence ``MARGIN``.
Measured on the Push-T policy: variants lie 0.02 to 0.05 apart and 0.17 to 0.36 are allowed; chunks that belong to other
observations lie 0.63 apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.bundle.provenance import ParityRecord
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.normalize import Normalizer
from dcqfa_ros.runtime.observations import ObservationLayout

SAMPLES = 4
SEED = 7_000_003  # of observations and noise; no training, calibration or evaluation uses it
MARGIN = 6.0
LEAST = 0.05  # what another runtime's rounding (TF32, half precision, a step of an 8-bit quantizer) may do
KEPT = 64  # chunks of accepted engines that are remembered

Predict = Callable[[Mapping[str, NDArray[Any]], int, int], Float32]
"""Observation, seed and chunk number -> actions (executed, Da), float32, raw units."""


class ParityError(PolicyError):
    """A variant computes something else than it should; says what it was compared with, found and allowed."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Outcome of a comparison that was passed.

    Attributes:
        rms: root mean square difference of normalised actions; None where there was nothing to compare with.
        allowed: upper limit of ``rms``; None likewise.
        against: engine it was compared with, empty likewise.
    """

    rms: float | None = None
    allowed: float | None = None
    against: str = ""


def fixed_observation(spec: BundleSpec, number: int) -> dict[str, NDArray[Any]]:
    """Return an observation, key -> (1, history, *shape), raw units, drawn from the policy's whole normalised range.

    Pictures have the network's size (:class:`~dcqfa_ros.runtime.observations.ObservationKey`).
    The history repeats one time step. The same numbers come on every machine (Philox, whose stream NumPy guarantees).
    """
    observation = {}
    taken = {key.name: key for key in ObservationLayout(spec).keys}
    for index, (name, key) in enumerate(spec.observations.items()):
        shape, size = taken[name].shape, taken[name].size
        bits = np.random.Philox(key=np.array([SEED, number], np.uint64), counter=np.array([0, 0, index, 0], np.uint64))
        raw = np.asarray(bits.random_raw(size))
        uniform = ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)  # -1 to 1
        values = Normalizer(key.normalizer, shape).denormalize(uniform)
        kept = np.round(values).clip(0, np.iinfo(key.dtype).max) if key.dtype != "float32" else values
        observation[name] = np.repeat(kept[None, None].astype(key.dtype), key.history, axis=1)
    return observation


def fixed_chunks(spec: BundleSpec, predict: Predict) -> Float32:
    """Return what a variant computes for the fixed observations: (SAMPLES, executed, Da), float32, normalised.

    Raises:
        ParityError: an action is not finite, or further outside the bundle's limits than these are wide.
        PolicyError: whatever ``predict`` raises.
    """
    action = spec.action
    lowest, highest = np.array(action.minimum), np.array(action.maximum)
    chunks = []
    for number in range(SAMPLES):
        chunk = predict(fixed_observation(spec, number), SEED, number)[: action.executed]
        excess = np.maximum(lowest - chunk, chunk - highest) / (highest - lowest)
        wrong = ~(excess <= 1.0)  # holds NaN, too
        if wrong.any():
            row, dim = (int(i) for i in np.argwhere(wrong)[0])
            raise ParityError(
                f"action {action.names[dim]!r} is {chunk[row, dim]:g} {action.units[dim]} for a fixed observation; its "
                f"limits are {lowest[dim]:g} to {highest[dim]:g}"
            )
        chunks.append(Normalizer(action.normalizer, (action.dim,)).normalize(chunk))
    return np.stack(chunks)


@dataclass(frozen=True, slots=True)
class _Accepted:
    engine: str
    weights: str
    record: ParityRecord
    chunks: Float32


class ParityLog:
    """Chunks of the engines accepted so far, by bundle. Not thread-safe."""

    def __init__(self) -> None:
        """Know no engine."""
        self._accepted: dict[tuple[str, str], _Accepted] = {}  # by folder and engine, oldest first

    def check(self, bundle: Bundle, variant: str, engine: str, predict: Predict) -> tuple[Parity, Callable[[], None]]:
        """Compare an engine with the chunks its bundle records, or else with the engine accepted last.

        Returns:
            What was found, and what notes the engine as accepted: to be called once it runs.

        Raises:
            ParityError: it computes something else.
            PolicyError: it does not compute.
        """
        spec = bundle.spec.variant(variant)
        folder, record = str(bundle.folder), spec.parity
        found = _Accepted(engine, spec.weights, record, fixed_chunks(bundle.spec, predict))

        def accept() -> None:
            self._accepted.pop((folder, engine), None)
            self._accepted[folder, engine] = found
            while len(self._accepted) > KEPT:
                del self._accepted[next(iter(self._accepted))]

        known = [a for (place, _), a in self._accepted.items() if place == folder]
        same = [a for a in known if a.weights == found.weights]
        if record.fixed_chunks is not None:
            recorded = np.array(record.fixed_chunks, np.float32)
            if recorded.size != found.chunks.size:
                raise ParityError(
                    f"{bundle.folder}: variant {variant!r}: parity.fixed_chunks has {recorded.size} entries, expected "
                    f"{found.chunks.size} {found.chunks.shape}: dcqfa bundle record-chunks --anew {bundle.folder}"
                )
            other = _Accepted("its bundle records", found.weights, record, recorded.reshape(found.chunks.shape))
        elif known:
            other = (same or known)[-1]  # the same weights, where they ran before, say most
        else:
            return Parity(), accept
        allowed = _allowed(found, other)
        rms = float(np.sqrt(np.mean(np.square(found.chunks.astype(np.float64) - other.chunks))))
        if not rms <= allowed:
            what = "the weights of one of the two are wrong"
            if record.fixed_chunks is not None:
                what = (
                    "the file, or the runtime, is not right; where bundle.yaml was changed on purpose: "
                    f"dcqfa bundle record-chunks --anew {bundle.folder}"
                )
            raise ParityError(
                f"{engine} computes other actions than {other.engine}: they differ by rms {rms:.3g} (normalised units, "
                f"{SAMPLES} fixed observations), allowed is {allowed:.3g}; {what}"
            )
        return Parity(rms, allowed, other.engine), accept


def _allowed(one: _Accepted, other: _Accepted) -> float:
    """Return how far two variants may lie apart, root mean square, normalised units."""
    allowed = one.record.tolerance_export_rms + other.record.tolerance_export_rms
    if one.weights != other.weights:
        allowed += MARGIN * (one.record.rms + other.record.rms)
    return max(LEAST, allowed)
