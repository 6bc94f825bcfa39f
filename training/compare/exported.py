"""Graphs that an entry is exported to compute what its network computes, or they are refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from training.compare.config import CompareError, Entry
from training.export.calibration import denoise_chunks
from training.export.variant import rms_error
from training.policies.diffusion_policy_t import DiffusionPolicyT

CHECK_SAMPLES, CHECK_SEED = 16, 9


def check_export(
    entry: Entry, engine: Engine, graphs: Mapping[str, bytes], spec: BundleSpec, network: DiffusionPolicyT, rms: float
) -> None:
    """Refuse graphs that compute other chunks than the network they are of.

    Observations are made up: within the range that normalised ones have. Demonstrations are not needed for it.

    Args:
        entry: for the message.
        engine: of the network.
        graphs: by role.
        spec: how chunks are sampled.
        network: of which the sizes are taken.
        rms: most difference of normalised actions, root mean square.

    Raises:
        CompareError: the chunks differ by more.
    """
    config = network.config
    generator = np.random.default_rng(CHECK_SEED)
    shape = (CHECK_SAMPLES, config.observation_horizon, config.observation_dim)
    inputs = generator.uniform(-1.0, 1.0, shape).astype(np.float32)
    expected = denoise_chunks(engine, spec.diffusion, config, inputs)
    running = OnnxRuntimeEngine(dict(graphs), threads=1)
    try:
        error = rms_error(denoise_chunks(running, spec.diffusion, config, inputs), expected)
    finally:
        running.close()
    if not error <= rms:
        raise CompareError(
            f"entry {entry.name}: its exported chunks differ from the network's by rms {error:.3g}, allowed is "
            f"{rms:g}; leave the entry out with --only and the names of the others"
        )
