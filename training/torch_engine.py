"""The training-side network behind the robot's engine interface (NumPy in and out)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from training.policies.diffusion_policy_t import DiffusionPolicyT

Float = NDArray[np.float32]


class TorchEngine:
    """PyTorch execution of a policy network; implements :class:`dcqfa_ros.runtime.engine.Engine`.

    It runs whatever linears the network holds, so a quantized network gives the training-side reference of an export.
    """

    def __init__(self, network: DiffusionPolicyT, threads: int = 1, name: str = "torch") -> None:
        """Run ``network`` on ``threads`` threads (of the whole process)."""
        self.name = name
        self._network = network.eval()
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def observation_kv(self, observation: Float) -> Float:
        """Keys and values (B, R, To, D) of normalised observations (B, To, Do)."""
        return self._network.observation_keys_values(torch.from_numpy(observation)).numpy()

    @torch.inference_mode()
    def timestep_kv(self, timesteps: NDArray[np.int64]) -> Float:
        """Keys and values (S, R, 1, D) of integer time steps (S,)."""
        return self._network.timestep_keys_values(torch.from_numpy(timesteps)).numpy()

    @torch.inference_mode()
    def denoise(self, noisy: Float, timestep_kv: Float, observation_kv: Float, out: Float | None = None) -> Float:
        """Predicted noise (B, T, Da) of ``noisy`` (B, T, Dn), written to ``out`` where given."""
        inputs = (torch.from_numpy(array) for array in (noisy, timestep_kv, observation_kv))
        noise = self._network.denoise(*inputs).numpy()
        if out is None:
            return noise
        np.copyto(out, noise)
        return out

    def close(self) -> None:
        """Nothing to release."""
