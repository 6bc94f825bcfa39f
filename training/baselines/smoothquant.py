"""SmoothQuant (Xiao et al. 2023): s_j = max|X_j|^a / max|W_j|^(1 - a), a = 0.5, then round to nearest.

s is taken over all linears that read the same tensor, of this backbone's six per block and of the memory that the k and
v of every block share; see :mod:`training.baselines.smoothing` for where it folds. Activations are quantized per token,
as for RTN; FP8 has static per-tensor scales of the smoothed activations.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from training.baselines import QuantizedPolicy
from training.baselines.bits import Bits
from training.baselines.calibration import Calibration, InputStatistics, policy_statistics
from training.baselines.network import plain_copy, quantize_weights
from training.baselines.options import check_number, check_switch, no_options
from training.baselines.report import calls_of, finish, report
from training.baselines.rtn import quantize_activations
from training.baselines.smoothing import smooth, usable, weight_peaks
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.trained import TrainedPolicy

ALPHA = 0.5


def smoothing_scale(peak: Tensor, weight_peak: Tensor, alpha: float = ALPHA) -> Tensor:
    """The scale s (in,) of greatest magnitudes of inputs and weights (in,); 1 where a channel is silent on a side."""
    return usable(peak**alpha / weight_peak ** (1.0 - alpha))


def smooth_all(
    network: DiffusionPolicyT, seen: dict[str, InputStatistics], alpha: float = ALPHA, fold: bool = True
) -> dict[str, Tensor]:
    """Smooth every group of a network of plain linears; returns s by the group's name."""
    scales = {name: smoothing_scale(s.peak, weight_peaks(network, s.group), alpha) for name, s in seen.items()}
    for name, scale in scales.items():
        smooth(network, seen[name].group, scale, fold)
    return scales


class SmoothQuant:
    """See the module.

    Options: ``alpha`` (0 to 1), ``fold`` (False keeps every multiplication explicit), ``static`` (True: one activation
    scale per tensor).
    """

    name = "smoothquant"
    trains = False

    def quantize(
        self,
        policy: TrainedPolicy,
        bits: Bits,
        calibration: Calibration,
        *,
        seed: int = 0,  # noqa: ARG002 (of the protocol)
        alpha: float = ALPHA,
        fold: bool = True,
        static: bool = False,
        **options: Any,
    ) -> QuantizedPolicy:
        """See :class:`training.baselines.Baseline`; ``seed`` has no effect, nothing is drawn."""
        no_options(self.name, options)
        check_number(self.name, "alpha", alpha, 0.0, 1.0)
        check_switch(self.name, "fold", fold)
        check_switch(self.name, "static", static)
        started = time.monotonic()
        network = plain_copy(policy.network)
        smooth_all(network, policy_statistics(policy.network, calibration), alpha, fold)
        passes = 1 + quantize_activations(network, bits, calibration, static=static)
        quantize_weights(network, bits)
        finish(network)
        seconds, calls = time.monotonic() - started, calls_of(calibration, passes)
        extra = {"alpha": alpha, "folded": fold}
        return QuantizedPolicy(
            network, report(self.name, "SmoothQuant", bits, network, calibration, seconds, calls, **extra)
        )
