"""A direct sensitivity kept layer by layer: hours of work that go on where they were interrupted."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.baselines.allocation import CHANNEL_BITS
from training.baselines.bits import BaselineError
from training.baselines.calibration import Calibration
from training.baselines.qvla_sensitivity import Floats
from training.files import write_atomically
from training.trained import TrainedPolicy
from training.warm_start import state_sha256

VERSION = 1  # raised when the same weights would give other sensitivities
KEY = "key"


class SensitivityStore:
    """One ``.npz`` file of sensitivities (out, widths) by layer, and of what they depend on."""

    def __init__(self, path: Path, policy: TrainedPolicy, calibration: Calibration, observations: int) -> None:
        """Keep sensitivities in ``path``; nothing is read or written yet."""
        self.path = path
        self._key: dict[str, Any] = {
            "version": VERSION,
            "network": state_sha256(policy.network.state_dict()),
            "data": calibration.data_sha256,
            "seed": calibration.seed,
            "drawn": len(calibration.observation),
            "observations": observations,
            "steps": [int(call.timesteps[0]) for call in calibration.calls],
            "widths": list(CHANNEL_BITS),
        }
        self._shapes = {
            name: (module.out_features, len(CHANNEL_BITS))
            for name, module in policy.network.named_modules()
            if isinstance(module, torch.nn.Linear)
        }

    def read(self, names: Sequence[str]) -> dict[str, Floats]:
        """Sensitivities of those of the layers that are kept already.

        Raises:
            BaselineError: the file is damaged, or of another network, calibration or version.
        """
        if not self.path.exists():
            return {}
        advice = "remove it or name another file"
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                key = json.loads(str(stored[KEY]))
                found = {name: np.asarray(stored[name], np.float64) for name in names if name in stored.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise BaselineError(f"{self.path}: no file of sensitivities ({error}); {advice}") from error
        differing = [field for field in self._key if not isinstance(key, dict) or key.get(field) != self._key[field]]
        if differing:
            raise BaselineError(f"{self.path}: was measured with another {', '.join(differing)}; {advice}")
        for name, value in found.items():
            if value.shape != self._shapes[name] or not np.isfinite(value).all():
                raise BaselineError(f"{self.path}: {name}: expected finite values {self._shapes[name]}; {advice}")
        return found

    def write(self, found: Mapping[str, Floats]) -> None:
        """Exchange the file for one with all of ``found``, at once."""
        arrays: dict[str, Any] = {KEY: np.asarray(json.dumps(self._key)), **found}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(self.path, buffer.getvalue())
