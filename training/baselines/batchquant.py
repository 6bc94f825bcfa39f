"""BatchQuant supernet (Bai et al. 2021): uniform sampling, no device conditioning, ranges re-estimated per subnet.

The supernet is trained with ``supernet.activations: batchquant`` and ``sampler.kind: uniform``
(config/training/pusht_keypoints_batchquant.yaml). Here the activation ranges of the full-size network at the asked bits
are the means over the calibration's denoising steps; they are static from then on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from training.baselines import QuantizedPolicy
from training.baselines.bits import BaselineError, Bits
from training.baselines.calibration import Calibration
from training.baselines.elastic import extracted, integer_widths, plain_from_elastic, trained_supernet
from training.baselines.options import no_options
from training.baselines.report import calls_of, finish, report
from training.quant.batchquant import reestimated_ranges
from training.trained import TrainedPolicy


class BatchQuantSupernet:
    """See the module. Option: ``trained``, the run."""

    name = "batchquant"
    trains = True

    def quantize(
        self,
        policy: TrainedPolicy,
        bits: Bits,
        calibration: Calibration,
        *,
        seed: int = 0,  # noqa: ARG002 (of the protocol)
        trained: Path | None = None,
        **options: Any,
    ) -> QuantizedPolicy:
        """See :class:`training.baselines.Baseline`; ``seed`` has no effect, nothing is drawn."""
        no_options(self.name, options)
        integer_widths(self.name, bits)
        started = time.monotonic()
        supernet = trained_supernet(self.name, trained, policy, calibration)
        config = supernet.meaning.config
        assert config.supernet is not None
        if config.supernet.activations != "batchquant" or config.supernet.only is not None:
            raise BaselineError(
                f"{self.name}: {supernet.path} is no BatchQuant supernet (supernet.activations: batchquant, all its "
                "networks trained); train one with config/training/pusht_keypoints_batchquant.yaml"
            )
        alone = extracted(supernet, str(bits))
        with reestimated_ranges(alone), torch.no_grad():
            for call in calibration.calls:
                alone(call.noisy, call.timesteps, call.observation)
        network = plain_from_elastic(alone)
        finish(network)
        extra = {
            "trained": str(supernet.path),
            "training_steps": supernet.meaning.step,
            "sampler": config.supernet.sampler.kind,
            "distillation_weight": config.supernet.distillation,
        }
        seconds, calls = time.monotonic() - started, calls_of(calibration)
        label = "BatchQuant supernet"
        return QuantizedPolicy(network, report(self.name, label, bits, network, calibration, seconds, calls, **extra))
