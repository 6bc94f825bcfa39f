"""RTN: round to nearest at the absolute maximum, weights per output channel, activations per token.

Nothing is calibrated in integers. FP8 has static per-tensor activation scales, which come from the calibration.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from training.baselines import QuantizedPolicy
from training.baselines.bits import FLOAT, BaselineError, Bits
from training.baselines.calibration import Calibration, InputStatistics, statistics
from training.baselines.network import plain_copy, plain_linears, quantize_weights
from training.baselines.parts import Part, PerTensorFp8, PerToken, Unquantized
from training.baselines.report import calls_of, finish, report
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.quant.fp8 import E4M3_MAX
from training.quant.quantizer import TINY
from training.trained import TrainedPolicy


def activation_quantizer(bits: Bits, peak: float | None = None) -> Part:
    """The round-to-nearest quantizer of an input: per token, or per tensor at ``peak`` (greatest magnitude) in FP8."""
    if bits.fp8:
        assert peak is not None
        return PerTensorFp8(max(peak / E4M3_MAX, TINY))
    return Unquantized() if bits.activations == FLOAT else PerToken(bits.activations)


def quantize_activations(
    network: DiffusionPolicyT, bits: Bits, calibration: Calibration, seen: Mapping[str, InputStatistics] | None = None
) -> int:
    """Give every plain linear its round-to-nearest input quantizer; call it before weights are rounded.

    Args:
        network: with plain linears, transforms in place.
        bits: as asked for.
        calibration: for the scales of FP8.
        seen: statistics of the network's inputs behind its transforms, where they are known already.

    Returns:
        Passes over the calibration that it took.
    """
    passes = 0
    peaks: dict[str, float] = {}
    if bits.fp8:
        if seen is None:
            seen, passes = statistics(network, calibration), 1
        peaks = {name: float(s.peak.max()) for s in seen.values() for name in s.group.linears}
    for name, linear in plain_linears(network).items():
        linear.activation = activation_quantizer(bits, peaks.get(name))
    return passes


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


class Rtn:
    """See the module."""

    name = "rtn"
    trains = False

    def quantize(
        self,
        policy: TrainedPolicy,
        bits: Bits,
        calibration: Calibration,
        *,
        seed: int = 0,  # noqa: ARG002 (of the protocol)
        **options: Any,
    ) -> QuantizedPolicy:
        """See :class:`training.baselines.Baseline`; ``seed`` has no effect, nothing is drawn."""
        no_options(self.name, options)
        started = time.monotonic()
        network = plain_copy(policy.network)
        passes = quantize_activations(network, bits, calibration)
        quantize_weights(network, bits)
        finish(network)
        used = calibration if passes else None
        seconds = time.monotonic() - started
        return QuantizedPolicy(
            network, report(self.name, "RTN", bits, network, used, seconds, calls_of(calibration, passes))
        )
