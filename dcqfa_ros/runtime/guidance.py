"""What the previous chunk does to the denoising of the next one, for a batch of continuations.

Real-time chunking by inpainting (Black et al. 2025), after pseudoinverse-guided diffusion (Song et al. 2023), for a
variance-preserving policy. With ``sigma = sqrt((1 - abar) / abar)``, the soft mask W, the previous
chunk Y and the predicted clean sample x0::

    soft:    x0' = x0 + min(1, beta sigma / (1 + sigma), (1 + sigma^2) / (1 + sigma)) W (Y - x0)
    guided:  x0' = x0 + min(beta sigma, 1 + sigma^2) sqrt(abar) (d x0 / d x)^T [W (Y - x0)]

``soft`` puts ``1 / (1 + sigma)`` in the place of the Jacobian, so that it needs no derivative and integer engines can
run it. ``trained`` overwrites the clean prefix instead.

``guided`` draws no further than the network would: ``sqrt(abar) d x0 / d x`` is the covariance of the actions given the
sample, over sigma^2, which is small at high noise where the observation decides the actions (0.00 to 0.04 for the
Push-T policy above sigma 0.2), and at low noise beta sigma is small. Attention is causal, so the transpose carries the
errors of later tokens to earlier ones only. Such a policy keeps nearer to the previous chunk with ``soft``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.chunking import Continuation, Method, soft_mask
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.normalize import Normalizer

BETA = 5.0


class Pullback(Protocol):
    """The denoiser's vector-Jacobian product with respect to its input ``noisy``."""

    def pull(self, noisy: Float32, timestep_kv: Float32, observation_kv: Float32, cotangent: Float32) -> Float32:
        """Return ``(d noise / d noisy)^T cotangent``.

        Args:
            noisy: (B, T, Da), one more channel where the network has it.
            timestep_kv: (1, R, 1, D).
            observation_kv: (B, R, To, D).
            cotangent: (B, T, Da).

        Returns:
            Gradient, shape of ``noisy``; it may be a buffer that holds until the next call.
        """
        ...

    def close(self) -> None:
        """Release the runtime's memory. Closing twice is allowed."""
        ...


@dataclass(frozen=True, slots=True)
class Guidance:
    """Continuations of a batch, over the T action tokens that are computed.

    Attributes:
        target: previous chunks Y, normalised, (B, T, Da); 0 where nothing is known.
        soft: weights W of rows with method SOFT, (B, T, 1); 0 elsewhere.
        guided: likewise of rows with method GUIDED.
        clean: tokens that are known, rows with method TRAINED, (B, T, 1), bool.
    """

    target: Float32
    soft: Float32
    guided: Float32
    clean: NDArray[np.bool_]

    @classmethod
    def of(
        cls, continuations: Sequence[Continuation | None], spec: BundleSpec, tokens: int, normalizer: Normalizer
    ) -> Guidance | None:
        """Lay continuations out for the denoising loop; None where no row has one.

        Args:
            continuations: of each row of the batch.
            spec: the bundle's description.
            tokens: T, tokens that are computed.
            normalizer: of the actions.

        Raises:
            PolicyError: a continuation that this bundle or number of tokens cannot follow; the message names the row.
        """
        if not any(entry is not None for entry in continuations):
            return None
        batch, dim = len(continuations), spec.action.dim
        target = np.zeros((batch, tokens, dim), np.float32)
        weights = {method: np.zeros((batch, tokens, 1), np.float32) for method in (Method.SOFT, Method.GUIDED)}
        clean = np.zeros((batch, tokens, 1), np.bool_)
        for row, entry in enumerate(continuations):
            if entry is None:
                continue
            _check(entry, row, spec, tokens)
            known = min(len(entry.previous), tokens)
            target[row, :known] = normalizer.normalize(entry.previous[:known])
            if entry.method is Method.TRAINED:
                clean[row, : entry.frozen] = True
            else:
                mask = soft_mask(spec.action.horizon, entry.frozen, entry.horizon, len(entry.previous))
                weights[entry.method][row, :, 0] = mask[:tokens]
        return cls(target, weights[Method.SOFT], weights[Method.GUIDED], clean)

    @property
    def needs_pullback(self) -> bool:
        """Whether a row asks for the vector-Jacobian product."""
        return bool(self.guided.any())

    @property
    def corrects(self) -> bool:
        """Whether a row draws the predicted clean sample towards its target."""
        return bool(self.soft.any()) or self.needs_pullback


def soft_strength(sigma: float) -> float:
    """Factor of ``W (Y - x0)`` without the Jacobian."""
    return min(1.0, BETA * sigma / (1.0 + sigma), (1.0 + sigma**2) / (1.0 + sigma))


def guided_strength(sigma: float) -> float:
    """Factor of ``sqrt(abar) (d x0 / d x)^T [W (Y - x0)]``."""
    return min(BETA * sigma, 1.0 + sigma**2)


def method_refusal(method: Method, spec: BundleSpec, variant: str = "", runtime: str = "onnxruntime") -> str | None:
    """Return why a bundle's variant on a runtime cannot be run with a method, and what can be used; None where it can.

    Args:
        method: how chunks follow each other.
        spec: the bundle's description.
        variant: name of a variant of it; "" asks about the bundle only.
        runtime: what executes the variant.
    """
    first, diffusion = spec.action.first_executed, spec.diffusion
    if method is Method.TRAINED and diffusion.prefix <= first:
        return (
            f"chunking trained needs a bundle with diffusion.prefix above {first}, trained for known leading actions; "
            f"bundle {spec.name!r} has {diffusion.prefix}: use soft, ensemble or asynchronous"
        )
    if method not in (Method.SOFT, Method.GUIDED):
        return None
    if diffusion.sampler != "ddim":
        return (
            f"chunking {method.value} is defined for sampler ddim, bundle {spec.name!r} has {diffusion.sampler}: "
            "use trained, ensemble or asynchronous"
        )
    if method is Method.SOFT or not variant:
        return None
    if runtime != "onnxruntime":
        return (
            f"chunking guided needs the denoiser's derivative, which runtime {runtime} does not give: "
            "use runtime onnxruntime, or chunking soft or trained"
        )
    described = spec.variant(variant)
    rounded = sorted({(b.exported.kind, b.exported.activation) for b in described.layers if b.exported.activation < 16})
    if rounded:
        grids = " and ".join(f"{kind}{bits}" for kind, bits in rounded)
        return (
            f"chunking guided needs the denoiser's derivative, and variant {variant!r} rounds activations to {grids}: "
            "use a variant in floating point of 16 bits or more, or chunking soft or trained"
        )
    return None


def _check(entry: Continuation, row: int, spec: BundleSpec, tokens: int) -> None:
    """Refuse a continuation that does not fit the bundle or the tokens computed."""
    where, horizon, dim = f"continuation of batch row {row}", spec.action.horizon, spec.action.dim
    previous, prefix = entry.previous, spec.diffusion.prefix
    if not entry.method.continues:
        raise PolicyError(f"{where}: expected method soft, guided or trained, got {entry.method.value}")
    if previous.ndim != 2 or previous.shape[1] != dim or not 1 <= len(previous) <= horizon:
        raise PolicyError(
            f"{where}: expected previous actions of shape ('n', {dim}), n from 1 to {horizon}, got {previous.shape}"
        )
    if not np.isfinite(previous).all():
        step, column = (int(i) for i in np.argwhere(~np.isfinite(previous))[0])
        raise PolicyError(
            f"{where}: previous action {step} is {previous[step, column]} in {spec.action.names[column]!r}; "
            "expected finite"
        )
    if not 0 <= entry.frozen <= min(len(previous), tokens) or entry.horizon < 0:
        raise PolicyError(
            f"{where}: expected frozen from 0 to {min(len(previous), tokens)} and a horizon of at least 0, "
            f"got frozen {entry.frozen}, horizon {entry.horizon}"
        )
    reason = method_refusal(entry.method, spec)
    if reason:
        raise PolicyError(f"{where}: {reason}")
    if entry.method is Method.TRAINED and entry.frozen > prefix:
        raise PolicyError(
            f"{where}: frozen {entry.frozen} exceeds diffusion.prefix {prefix} of bundle {spec.name!r}, the largest "
            "number of known leading actions its network was trained for"
        )


def correct(
    clean: Float32, noise: Float32, guidance: Guidance, sigma: float, clip: np.float32, gradient: Float32 | None
) -> None:
    """Draw the predicted clean sample towards the target, and change the predicted noise along with it, in place.

    A token with weight 0 keeps both bit by bit: the noise is corrected by the change of the clean sample, which for a
    sample inside the clip range is the same as computing it anew from x0'.

    Args:
        clean: x0, clipped, (B, T, Da).
        noise: eps, (B, T, Da).
        guidance: of the batch.
        sigma: ``sqrt((1 - abar) / abar)`` of this step; above 0 at every noise level.
        clip: x0' is clipped to +- this.
        gradient: ``sqrt(abar) (d x0 / d x)^T [W (Y - x0)]`` of the guided rows, (B, T, Da), 0 elsewhere; None where no
            row is guided.
    """
    change = np.float32(soft_strength(sigma)) * guidance.soft * (guidance.target - clean)
    if gradient is not None:
        change += np.float32(guided_strength(sigma)) * gradient
    after = np.maximum(np.minimum(clean + change, clip), -clip)
    noise -= (after - clean) / np.float32(sigma)
    np.copyto(clean, after)
