"""The engine: the three parts of a diffusion policy's network as a runtime executes them.

The parts run at different rates: the observation encoder once per chunk, the time-step encoder once per step count (its
result is tabulated), the denoiser at every denoising step. Arrays are C-contiguous NumPy arrays; ``B`` is the batch,
``To`` the observation history, ``Do`` and ``Da`` the widths of observation and action vectors, ``Dn`` that of a noisy
action token (``Da``, and one more where the network takes known tokens, which a last channel flags), ``T`` the number
of action tokens computed (attention is causal, so the first T tokens of a chunk do not depend on the later ones), ``S``
the number of noise levels, ``D`` the width of a head and ``R`` the rows of cross-attention keys and values: for every
block in order the keys of its heads, then the values (blocks of a searched variant keep different numbers of heads).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

ROLES = ("encoder", "timestep", "denoiser")  # the files of a variant, in the order in which a chunk needs them


@runtime_checkable
class Engine(Protocol):
    """A loaded variant. Not thread-safe: one engine belongs to one thread.

    A returned array may be the engine's own buffer: it holds until the same method is called again.
    """

    @property
    def name(self) -> str:
        """Runtime and what it executes, for reports: ``onnxruntime/w8a8``."""
        ...

    def observation_kv(self, observation: Float32) -> Float32:
        """Encode normalised observations (B, To, Do) to cross-attention keys and values (B, R, To, D)."""
        ...

    def timestep_kv(self, timesteps: Int64) -> Float32:
        """Encode noise levels (S,) to cross-attention keys and values (S, R, 1, D)."""
        ...

    def denoise(
        self, noisy: Float32, timestep_kv: Float32, observation_kv: Float32, out: Float32 | None = None
    ) -> Float32:
        """Predict the noise in the first T tokens of normalised action chunks.

        Args:
            noisy: (B, T, Dn), T at most the horizon.
            timestep_kv: (1, R, 1, D), one row of :meth:`timestep_kv`.
            observation_kv: (B, R, To, D).
            out: where to write the result, (B, T, Da); must not overlap ``noisy``.

        Returns:
            Predicted noise (B, T, Da): ``out`` where it was given.
        """
        ...

    def close(self) -> None:
        """Release the runtime's memory. The engine cannot be used afterwards; closing twice is allowed."""
        ...
