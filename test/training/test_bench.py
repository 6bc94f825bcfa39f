from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcqfa_ros.runtime.denoising import DenoisingLoop
from training.bench import TorchEager, UnknownNetworkError, network_config, torch_eager
from training.export import bundle as bundle_module
from training.export.bundle import ExportOptions, export_bundle
from training.torch_engine import TorchEngine


@pytest.fixture
def spec(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bundle_module, "PARITY_SAMPLES", 2)
    return export_bundle(trained_run, tmp_path / "policy", ExportOptions(variants=("fp32",)))


def test_the_reference_runs_the_bundles_network_for_the_whole_horizon(spec: Any) -> None:
    config = network_config(spec)
    assert (config.depth, config.heads, config.dim, config.ffn_ratio, config.horizon) == (2, 2, 32, 2, 16)
    chunk = torch_eager(spec, steps=3, threads=1).run()
    assert chunk.shape == (1, 16, 2)
    assert np.abs(chunk).max() <= 1.0 + 1e-6


@pytest.mark.parametrize("steps", [1, 7, 16])
def test_the_reference_and_the_robots_loop_denoise_alike(spec: Any, steps: int) -> None:
    torch.manual_seed(0)
    reference = TorchEager(network_config(spec), spec, steps, threads=1)
    engine = TorchEngine(reference._network)
    loop = DenoisingLoop(spec.diffusion, 16, 2, steps=steps)
    ours = loop.run(
        engine,
        reference._noise.numpy(),
        engine.timestep_kv(loop.timesteps),
        engine.observation_kv(reference._observation.numpy()),
    )
    np.testing.assert_allclose(ours, reference.run(), atol=1e-5)


def test_a_network_of_unknown_size_is_refused_by_its_numbers(spec: Any) -> None:
    (variant,) = spec.variants
    odd = variant.model_copy(update={"size": variant.size.model_copy(update={"parameters": 12345})})
    with pytest.raises(UnknownNetworkError, match="the bundle says 12345"):
        network_config(spec.model_copy(update={"variants": (odd,)}))
