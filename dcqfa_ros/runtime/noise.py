"""Noise as a pure function of (seed, chunk, step), so that runs are paired and repeatable on every machine.

The bits come from Philox-4x64 (Salmon et al. 2011), whose stream NumPy guarantees; they become normal variates by the
Box-Muller transform in float64. ``numpy.random.Generator`` is not used for that second part because its methods may
change from one NumPy version to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dcqfa_ros.runtime.engine import Float32

_LIMIT = 2**64
_CHUNK_START = 0  # counter word of the noise a chunk starts from; denoising step n uses n + 1


def _normal(seed: int, chunk: int, stream: int, shape: Sequence[int]) -> Float32:
    for label, value in (("seed", seed), ("chunk", chunk)):
        if not 0 <= value < _LIMIT:
            raise ValueError(f"noise {label}: expected 0 to 2**64 - 1, got {value}")
    count = 1
    for n in shape:
        count *= n
    pairs = (count + 1) // 2
    # The stream number sits in a high counter word: streams of one key can never overlap.
    bits = np.random.Philox(key=np.array([seed, chunk], np.uint64), counter=np.array([0, 0, stream, 0], np.uint64))
    raw = bits.random_raw(2 * pairs)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1), so log is finite
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].astype(np.float32).reshape(shape)


def chunk_noise(seed: int, chunk: int, shape: Sequence[int]) -> Float32:
    """Return the standard normal noise that denoising of a chunk starts from, float32.

    Args:
        seed: seed of the trial or episode.
        chunk: number of the chunk within it, from 0.
        shape: (horizon, action_dim). Always ask for the whole horizon and slice: the values depend on the shape.

    Raises:
        ValueError: seed or chunk is outside 0..2**64-1.
    """
    return _normal(int(seed), int(chunk), _CHUNK_START, shape)


def step_noise(seed: int, chunk: int, step: int, shape: Sequence[int]) -> Float32:
    """Return the standard normal noise, float32, that DDPM adds after denoising step ``step`` (from 0).

    Independent of :func:`chunk_noise` and of every other step.

    Raises:
        ValueError: seed or chunk is outside 0..2**64-1, or step is negative.
    """
    if step < 0:
        raise ValueError(f"noise step: expected at least 0, got {step}")
    return _normal(int(seed), int(chunk), int(step) + 1, shape)
