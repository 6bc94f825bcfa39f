"""The reference row of ``dcqfa bench engine``: what a user runs who takes the policy straight from PyTorch.

That is the published way to run a diffusion policy: eager FP32, the whole network at every denoising step over the
whole prediction horizon, and the DDIM scheduler of ``diffusers``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.errors import UserError
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig, parameter_count


class UnknownNetworkError(UserError):
    """A policy whose network cannot be rebuilt for comparison."""


class TorchEager:
    """One chunk with PyTorch eager FP32 and ``diffusers``' DDIM; weights are random, which does not change the time."""

    name = "torch_eager"

    def __init__(self, config: DiffusionPolicyTConfig, spec: BundleSpec, steps: int, threads: int) -> None:
        """Build a network of the policy's size on ``threads`` threads (of the whole process)."""
        torch.set_num_threads(threads)
        self._network = DiffusionPolicyT(config).eval()
        self._scheduler: Any = DDIMScheduler(
            num_train_timesteps=spec.diffusion.train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="epsilon",
            clip_sample=True,
            clip_sample_range=spec.diffusion.clip_sample,
            set_alpha_to_one=True,
        )
        self._steps = steps
        generator = torch.Generator().manual_seed(0)
        shape = (1, config.observation_horizon, config.observation_dim)
        self._observation = torch.rand(shape, generator=generator) * 2 - 1
        self._noise = torch.randn((1, config.horizon, config.action_dim), generator=generator)
        self._flag = torch.zeros((1, config.horizon, config.noisy_dim - config.action_dim))  # nothing is known

    @torch.inference_mode()
    def run(self) -> NDArray[np.float32]:
        """Denoise one whole chunk (1, horizon, Da), normalised."""
        self._scheduler.set_timesteps(self._steps)
        chunk = self._noise
        for timestep in self._scheduler.timesteps:
            noise = self._network(torch.cat([chunk, self._flag], dim=-1), timestep[None], self._observation)
            chunk = self._scheduler.step(noise, timestep, chunk, eta=0.0).prev_sample
        return chunk.numpy()


def network_config(spec: BundleSpec) -> DiffusionPolicyTConfig:
    """The configuration of a bundle's network.

    Raises:
        UnknownNetworkError: no DiffusionPolicy-T of the bundle's architecture has that number of parameters.
    """
    size = spec.architecture
    parameters = spec.variants[0].size.parameters
    try:
        config = DiffusionPolicyTConfig(
            observation_dim=sum(entry.size for entry in spec.observations.values()),
            action_dim=spec.action.dim,
            horizon=size.horizon,
            observation_horizon=next(iter(spec.observations.values())).history,
            depth=size.depth,
            heads=size.heads,
            dim=size.dim,
            ffn_ratio=size.ffn_dim // size.dim,
            prefix=spec.diffusion.prefix,
        )
    except ValueError as error:
        raise UnknownNetworkError(f"bundle {spec.name!r}: architecture is no DiffusionPolicy-T ({error})") from error
    with torch.device("meta"):
        found = parameter_count(DiffusionPolicyT(config))
    if found != parameters or size.ffn_dim % size.dim:
        raise UnknownNetworkError(
            f"bundle {spec.name!r}: its architecture makes {found} parameters, the bundle says {parameters}; the "
            "PyTorch row cannot be measured"
        )
    return config


def torch_eager(spec: BundleSpec, steps: int, threads: int) -> TorchEager:
    """Entry point of group ``dcqfa.bench_engines``."""
    return TorchEager(network_config(spec), spec, steps, threads)
