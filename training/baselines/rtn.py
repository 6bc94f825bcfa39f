"""RTN: round to nearest at the absolute maximum, weights per output channel, activations per token.

Nothing is calibrated in integers. FP8 has static per-tensor activation scales, which come from the calibration, and
integers have them on request: not every device quantizes at run time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from training.baselines import QuantizedPolicy
from training.baselines.bits import FLOAT, Bits
from training.baselines.calibration import Calibration, InputStatistics, policy_statistics, statistics
from training.baselines.network import plain_copy, plain_linears, quantize_weights
from training.baselines.options import check_switch, no_options
from training.baselines.parts import Part, PerTensor, PerTensorFp8, PerToken, Unquantized
from training.baselines.report import calls_of, finish, report
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.quant.fp8 import E4M3_MAX
from training.quant.quantizer import TINY, code_range
from training.trained import TrainedPolicy


def activation_quantizer(bits: Bits, peak: float | None = None) -> Part:
    """The round-to-nearest quantizer of an input: per token, or per tensor at ``peak``, the greatest magnitude."""
    if bits.activations == FLOAT:
        return Unquantized()
    if bits.fp8:
        assert peak is not None
        return PerTensorFp8(max(peak / E4M3_MAX, TINY))
    if peak is None:
        return PerToken(bits.activations)
    low, high = code_range(bits.activations)
    return PerTensor(bits.activations, max(peak / high, TINY), low, high)


def quantize_activations(
    network: DiffusionPolicyT,
    bits: Bits,
    calibration: Calibration,
    seen: Mapping[str, InputStatistics] | None = None,
    static: bool = False,
) -> int:
    """Give every plain linear its round-to-nearest input quantizer; call it before weights are rounded.

    Args:
        network: with plain linears, transforms in place.
        bits: as asked for.
        calibration: for static scales, which FP8 always has.
        seen: statistics of the network's inputs behind its transforms, where they are known already.
        static: one scale per tensor from the calibration, in place of one per token at run time.

    Returns:
        Passes over the calibration that it took.
    """
    passes = 0
    peaks: dict[str, float] = {}
    if bits.activations != FLOAT and (bits.fp8 or static):
        if seen is None:
            seen, passes = statistics(network, calibration), 1
        peaks = {name: float(s.peak.max()) for s in seen.values() for name in s.group.linears}
    for name, linear in plain_linears(network).items():
        linear.activation = activation_quantizer(bits, peaks.get(name))
    return passes


class Rtn:
    """See the module. Option: ``static`` (True: one activation scale per tensor, from the calibration)."""

    name = "rtn"
    trains = False

    def quantize(
        self,
        policy: TrainedPolicy,
        bits: Bits,
        calibration: Calibration,
        *,
        seed: int = 0,  # noqa: ARG002 (of the protocol)
        static: bool = False,
        **options: Any,
    ) -> QuantizedPolicy:
        """See :class:`training.baselines.Baseline`; ``seed`` has no effect, nothing is drawn."""
        no_options(self.name, options)
        check_switch(self.name, "static", static)
        started = time.monotonic()
        network = plain_copy(policy.network)
        seen = policy_statistics(policy.network, calibration) if bits.fp8 or static else None
        quantize_activations(network, bits, calibration, seen, static)
        passes = 0 if seen is None else 1
        quantize_weights(network, bits)
        finish(network)
        used = calibration if passes else None
        seconds = time.monotonic() - started
        return QuantizedPolicy(
            network, report(self.name, "RTN", bits, network, used, seconds, calls_of(calibration, passes))
        )
