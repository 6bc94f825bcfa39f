"""AWQ (Lin et al. 2024): scales that protect the channels with large activations, then clipping of weight rows.

s = mean|X|^r, normalised by sqrt(max s min s), r in {0, 0.05, .. 0.95} with the least output error of the quantized
weights, jointly over the linears that read one tensor; then every row's reach is searched from 1.0 down to 0.5 of its
maximum, not for q and k. The errors are exact over all calibration inputs, from their second moments.

AWQ quantizes weights alone. With quantized activations it is AWQ weights and round-to-nearest activations, and called
that.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from training.baselines import QuantizedPolicy
from training.baselines.bits import FLOAT, BaselineError, Bits
from training.baselines.calibration import Calibration, InputStatistics, policy_statistics
from training.baselines.network import plain_copy, weight_codes
from training.baselines.options import check_switch, no_options
from training.baselines.report import calls_of, finish, report
from training.baselines.rtn import quantize_activations
from training.baselines.smoothing import linears_of, smooth, usable
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.trained import TrainedPolicy

EXPONENTS = tuple(0.05 * i for i in range(20))
REACHES = tuple(1.0 - 0.05 * i for i in range(11))
UNCLIPPED = ("q", "k")  # clipping them moves the attention's products


def rounded(weight: Tensor, bits: int, reach: Tensor | None = None) -> Tensor:
    """The weight (out, in) that its codes of ``bits`` bits stand for."""
    codes, scale = weight_codes(weight, torch.full((len(weight),), bits), reach)
    return codes * scale[:, None]


def awq_scale(magnitude: Tensor, exponent: float) -> Tensor:
    """The scale s (in,) of mean magnitudes (in,), normalised."""
    scale = usable(magnitude**exponent)
    return scale / torch.sqrt(scale.max() * scale.min())


def search_scale(weight: Tensor, seen: InputStatistics, bits: int) -> tuple[Tensor, float]:
    """The best s (in,) of all linears of a group, weight (out, in) being theirs one below the other, and its r."""
    best, chosen, least = torch.ones(weight.shape[1]), 0.0, float("inf")
    for exponent in EXPONENTS:
        scale = awq_scale(seen.mean_magnitude, exponent)
        error = float(seen.output_error(rounded(weight * scale, bits) / scale - weight).sum())
        if error < least:
            best, chosen, least = scale, exponent, error
    return best, chosen


def search_reach(weight: Tensor, seen: InputStatistics, scale: Tensor, bits: int) -> Tensor:
    """Clipping magnitudes (out,) of least output error of a smoothed weight (out, in) = W * scale."""
    full = weight.abs().amax(1)
    best, least = full, torch.full_like(full, torch.inf)
    for share in REACHES:
        error = seen.output_error((rounded(weight, bits, share * full) - weight) / scale)
        better = error < least
        best, least = torch.where(better, share * full, best), torch.minimum(error, least)
    return best


def quantize_awq(
    network: DiffusionPolicyT, seen: dict[str, InputStatistics], bits: int, clip: bool = True
) -> dict[str, float]:
    """Scale, clip and quantize the weights of all plain linears; returns r by the group's name."""
    exponents, scales = {}, {}
    for name, s in seen.items():
        weight = torch.cat([linear.weight for linear in linears_of(network, s.group)])
        scales[name], exponents[name] = search_scale(weight, s, bits)
    for name, s in seen.items():
        smooth(network, s.group, scales[name])
    for name, s in seen.items():
        for path, linear in zip(s.group.linears, linears_of(network, s.group), strict=True):
            reach = None
            if clip and path.rpartition(".")[2] not in UNCLIPPED:
                reach = search_reach(linear.weight, s, scales[name], bits)
            linear.quantize_weight(bits, reach)
    return exponents


class Awq:
    """See the module. Options: ``clip`` (False leaves out the search for reaches)."""

    name = "awq"
    trains = False

    def quantize(
        self,
        policy: TrainedPolicy,
        bits: Bits,
        calibration: Calibration,
        *,
        seed: int = 0,  # noqa: ARG002 (of the protocol)
        clip: bool = True,
        **options: Any,
    ) -> QuantizedPolicy:
        """See :class:`training.baselines.Baseline`; ``seed`` has no effect, nothing is drawn."""
        no_options(self.name, options)
        check_switch(self.name, "clip", clip)
        if bits.fp8 or bits.weights == FLOAT:
            raise BaselineError(
                f"{self.name}: bits {bits}: it searches integer weights; expected such as w4a16 or w4a4"
            )
        started = time.monotonic()
        network = plain_copy(policy.network)
        exponents = quantize_awq(network, policy_statistics(policy.network, calibration), bits.weights, clip)
        quantize_activations(network, bits, calibration)
        finish(network)
        label = "AWQ" if bits.activations == FLOAT else "AWQ weights + RTN activations"
        seconds, calls = time.monotonic() - started, calls_of(calibration)
        extra = {"exponents": {name: round(value, 2) for name, value in exponents.items()}, "clipped": clip}
        return QuantizedPolicy(network, report(self.name, label, bits, network, calibration, seconds, calls, **extra))
