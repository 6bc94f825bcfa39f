"""SQIL at fixed bits: quantization-aware training of one full-size network with saliency-weighted distillation.

The training is that of one subnet of the supernet alone, with learned steps, the same teacher, loss and schedule:
``dcqfa train --config config/training/pusht_keypoints_sqil.yaml``, or any supernet configuration with ``--only w4a4``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from training.baselines import QuantizedPolicy
from training.baselines.bits import BaselineError, Bits
from training.baselines.calibration import Calibration
from training.baselines.elastic import extracted, integer_widths, plain_from_elastic, trained_supernet
from training.baselines.options import no_options
from training.baselines.report import finish, report
from training.trained import TrainedPolicy


class Sqil:
    """See the module. Option: ``trained``, the run."""

    name = "sqil"
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
        """See :class:`training.baselines.Baseline`; ``calibration`` tells the data, the steps were learned."""
        no_options(self.name, options)
        integer_widths(self.name, bits)
        started = time.monotonic()
        supernet = trained_supernet(self.name, trained, policy, calibration)
        config = supernet.meaning.config
        assert config.supernet is not None
        if config.supernet.only is None or config.supernet.activations != "learned":
            raise BaselineError(
                f"{self.name}: {supernet.path} is a supernet's run, expected one network's; train with --only {bits} "
                "or config/training/pusht_keypoints_sqil.yaml"
            )
        only, asked = supernet.space.parse(config.supernet.only), supernet.space.parse(str(bits))
        if only != asked:
            raise BaselineError(f"{self.name}: {supernet.path} was trained at {config.supernet.only}, not at {bits}")
        network = plain_from_elastic(extracted(supernet, str(bits)))
        finish(network)
        extra = {
            "trained": str(supernet.path),
            "training_steps": supernet.meaning.step,
            "batch": config.supernet.sandwich.sampled_batch,
            "distillation_weight": config.supernet.distillation,
            "saliency_percentile": config.supernet.saliency_percentile,
        }
        seconds = time.monotonic() - started
        return QuantizedPolicy(network, report(self.name, "SQIL", bits, network, None, seconds, 0, **extra))
