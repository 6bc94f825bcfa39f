"""What quantizing one output channel of one layer does to the executed actions (QVLA; ``algorithms.md`` section 7).

Direct: ``s_{l,c}^b = E ||A~ - A*||^2`` with only channel c of layer l quantized to b bits; A is the executed chunk,
normalised, sampled from fixed noise. Its proxy is ``E ||J_{A,x_lc}|| ||(Q_b(W) - W) X||``: the Jacobian of A with
respect to the channel's outputs over all tokens and denoising steps, times the channel's output error over the same;
one sampled chunk with a few backward passes serves all channels at once, where the direct one takes a chunk for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.baselines.allocation import CHANNEL_BITS
from training.baselines.allocation_chunks import CalibrationSampler
from training.baselines.calibration import Calibration
from training.baselines.network import hooked, linear_names, weight_codes
from training.trained import TrainedPolicy

LOW_BITS = CHANNEL_BITS[1:]  # sensitivity is 0 at the first
PROBES = 4
TOGETHER = 16  # chunks with gradients at a time: 30 MB each for the full key-point network
CASES = 256  # chunks without gradients at a time

Floats = NDArray[np.float64]
Hook = Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]


def weight_errors(linear: nn.Linear) -> Tensor:
    """``Q_b(W) - W`` (len(LOW_BITS), out, in) for every width below the first, rounded to nearest per channel."""
    weight = linear.weight.detach()
    errors = []
    for bits in LOW_BITS:
        codes, scale = weight_codes(weight, torch.full((len(weight),), bits))
        errors.append(codes * scale[:, None] - weight)
    return torch.stack(errors)


def proxy_sensitivity(
    policy: TrainedPolicy,
    calibration: Calibration,
    *,
    squared: bool = False,
    probes: int = PROBES,
    seed: int = 0,
    together: int = TOGETHER,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Floats]:
    """Proxy of the sensitivity of every channel, (out, len(CHANNEL_BITS)) per layer, 0 at the first width.

    ``||J||_F^2`` is estimated without bias by ``||J^T v||^2`` over ``probes`` vectors v of random signs (Hutchinson).

    Args:
        policy: the full-precision policy; it is left as it is.
        calibration: all of its observations are used.
        squared: take both norms squared, as the direct sensitivity is; by the definition they are not.
        probes: random vectors per chunk.
        seed: of the vectors.
        together: chunks at a time.
        progress: called with the number of chunks after each part.
    """
    network, sampler = policy.network, CalibrationSampler(policy, calibration)
    names = linear_names(network)
    errors = {name: weight_errors(network.get_submodule(name)) for name in names}  # type: ignore[arg-type]
    count = len(calibration.observation)
    total = {name: np.zeros((len(LOW_BITS), errors[name].shape[1])) for name in names}
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.arange(count).split(together):
        damage: dict[str, Tensor] = {}
        leaves: list[tuple[str, Tensor]] = []

        def hook(name: str, damage: dict[str, Tensor], leaves: list[tuple[str, Tensor]]) -> Hook:
            def call(_module: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
                with torch.no_grad():
                    x = arguments[0].detach()
                    found = torch.stack([(x @ error.t()).square().sum(1) for error in errors[name]])  # (bits, B, out)
                    damage[name] = damage[name] + found if name in damage else found
                leaf = torch.zeros_like(output, requires_grad=True)
                leaves.append((name, leaf))
                return output + leaf

            return call

        with torch.enable_grad(), hooked(network, {name: hook(name, damage, leaves) for name in names}):
            chunk = sampler(network, rows)
        slope = {name: torch.zeros(len(rows), errors[name].shape[1]) for name in names}
        for probe in range(probes):
            signs = torch.randint(2, chunk.shape, generator=generator).to(chunk.dtype) * 2.0 - 1.0
            wanted = [leaf for _, leaf in leaves]
            gradients = torch.autograd.grad(chunk, wanted, signs, retain_graph=probe + 1 < probes, allow_unused=True)
            for (name, _), gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:  # an output that no executed action depends on
                    slope[name] += gradient.square().sum(1) / probes
        for name in names:
            product = slope[name] * damage[name]  # both squared
            total[name] += (product if squared else product.sqrt()).sum(1).to(torch.float64).numpy()
        if progress is not None:
            progress(len(rows))
    return {name: _with_first_width(value / count) for name, value in total.items()}


@torch.no_grad()
def direct_sensitivity(
    policy: TrainedPolicy,
    calibration: Calibration,
    name: str,
    channels: Sequence[int] | None = None,
    *,
    observations: int | None = None,
    together: int = CASES,
    progress: Callable[[int], object] | None = None,
) -> Floats:
    """Sensitivity of channels of one layer, (len(channels), len(CHANNEL_BITS)), 0 at the first width.

    Many channels are measured in one batch: every part of it has another channel of the layer quantized.

    Args:
        policy: the full-precision policy; it is left as it is.
        calibration: where chunks come from.
        name: module path of the layer.
        channels: output channels; all if None.
        observations: the first so many of the calibration; all if None.
        together: chunks at a time.
        progress: called with the number of channels and widths after each part.
    """
    network, sampler = policy.network, CalibrationSampler(policy, calibration)
    linear = network.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    errors = weight_errors(linear)
    count = len(calibration.observation) if observations is None else observations
    reference = sampler(network, torch.arange(count))
    chosen = torch.arange(linear.out_features) if channels is None else torch.as_tensor(channels)
    cases = torch.cartesian_prod(chosen, torch.arange(len(LOW_BITS)))  # channel, width
    found = []
    for part in cases.split(max(1, together // count)):
        channel, rows_off = part[:, 0], errors[part[:, 1], part[:, 0]]  # (K,), (K, in)

        def hook(
            _module: nn.Linear,
            arguments: tuple[Tensor, ...],
            output: Tensor,
            channel: Tensor = channel,
            rows_off: Tensor = rows_off,
        ) -> Tensor:
            x = arguments[0].unflatten(0, (len(channel), count))
            result = output.clone().unflatten(0, (len(channel), count))
            result[torch.arange(len(channel)), :, :, channel] += torch.einsum("knti,ki->knt", x, rows_off)
            return result.flatten(0, 1)

        with hooked(network, {name: hook}):
            chunk = sampler(network, torch.arange(count).repeat(len(part)))
        off = (chunk.unflatten(0, (len(part), count)) - reference).square()
        found.append(off.sum((2, 3)).mean(1).to(torch.float64))
        if progress is not None:
            progress(len(part))
    return _with_first_width(torch.cat(found).reshape(len(chosen), len(LOW_BITS)).t().numpy())


def _with_first_width(values: Floats) -> Floats:
    """(bits, out) without the first width -> (out, bits) with it."""
    result = np.zeros((values.shape[1], len(CHANNEL_BITS)))
    result[:, 1:] = values.T
    return result
