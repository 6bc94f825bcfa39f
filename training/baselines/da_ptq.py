"""DA-PTQ: compensation of quantized outputs, and 16 bits for the layers that drift most (``algorithms.md`` section 7).

Allocation: the 30 % of layers with the largest ``|dL_drift / dW|`` keep weights and inputs in floating point, the rest
gets the bits asked for, rounded to nearest. The mean of its bits is therefore far above them; the report says it.

Compensation, layer by layer in the order of execution, each on what the compensated layers before it produce: gain and
shift of every channel fold into the scales and the bias of a layer of integer codes. ``M = I + U V^T`` mixes channels,
and a mixture of integer codes is none, so it folds only into weights in floating point: the layers that are kept, and
the final layer, the interface to the actions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm import tqdm

from training.baselines import QuantizedPolicy
from training.baselines.allocation import kept
from training.baselines.allocation_chunks import CalibrationSampler
from training.baselines.bits import FLOAT, BaselineError, Bits
from training.baselines.calibration import Calibration
from training.baselines.da_ptq_compensation import GAINS, RANK, Compensation, Moments, compensation
from training.baselines.da_ptq_drift import (
    DAMPING,
    ROTATION,
    TRANSLATION,
    dimension_weights,
    drift_gradients,
    read_jacobians,
)
from training.baselines.network import PlainLinear, hooked, linear_names, plain_copy, plain_linears
from training.baselines.options import check_count, check_number, check_switch, no_options
from training.baselines.parts import Unquantized
from training.baselines.report import calls_of, executes_as, finish, report
from training.baselines.rtn import quantize_activations
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.trained import TrainedPolicy

SHARE = 0.3  # of the layers, kept in floating point
GAIN = GAINS[1]
MOST_GAIN = 100.0  # a channel that rounding shrank further carries nothing that could be restored
HEAD = "head"
NO_CHAIN = "none: the task has no kinematic chain, every action dimension weighs 1"

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


class DaPtq:
    """See the module."""

    name = "da_ptq"
    trains = False

    def quantize(
        self,
        policy: TrainedPolicy,
        bits: Bits,
        calibration: Calibration,
        *,
        seed: int = 0,  # noqa: ARG002 (of the protocol)
        jacobians: ArrayLike | str | Path | None = None,
        share: float = SHARE,
        compensate: bool = True,
        rank: int = RANK,
        gain: float = GAIN,
        progress: bool = True,
        **options: Any,
    ) -> QuantizedPolicy:
        """See :class:`training.baselines.Baseline`; ``seed`` has no effect, nothing is drawn.

        Args:
            policy: see there.
            bits: of the layers that are not kept.
            calibration: see there.
            seed: see there.
            jacobians: (N, 6, Da) of the end-effector's pose by the action dimensions along the kinematic chain, such as
                :meth:`dcqfa_ros.drivers.kinematics.ArmKinematics.jacobian` gives for joint actions, or an ``.npy`` file
                of them; None for a task without a chain, whose dimensions all weigh 1.
            share: of the layers that keep 16 bits.
            compensate: whether outputs are compensated.
            rank: directions whose covariance is matched where weights are in floating point.
            gain: greatest gain of a channel or direction, and by its inverse the least.
            progress: show a bar.
            **options: none.

        Raises:
            BaselineError: FP8 is asked for, or an option is none of the above.
            AllocationError: Jacobians are out of range.
        """
        no_options(self.name, options)
        if bits.fp8:
            raise BaselineError("da_ptq: keeps some layers and makes integers of the rest; expected bits such as w4a4")
        check_number(self.name, "share", share, 0.0, 1.0)
        check_switch(self.name, "compensate", compensate)
        check_switch(self.name, "progress", progress)
        check_count(self.name, "rank", rank, 0)
        check_number(self.name, "gain", gain, 1.0, MOST_GAIN)
        gains = (1.0 / gain, float(gain))
        started, width, count = time.monotonic(), policy.config.policy.action_dim, len(calibration.observation)
        chain = read_jacobians(jacobians) if isinstance(jacobians, str | Path) else jacobians
        weights = np.ones(width) if chain is None else dimension_weights(chain)
        if weights.shape != (width,):
            raise BaselineError(
                f"da_ptq: jacobians: expected (N, 6, {width}), the policy's action dimensions last, got {len(weights)} "
                "of them; give those of the arm that these actions move"
            )
        with tqdm(total=count, desc="da_ptq drift", unit="chunk", disable=not progress) as bar:
            slopes = drift_gradients(policy, calibration, bits, weights, progress=bar.update)
        names = linear_names(policy.network)
        stays = dict(zip(names, kept([slopes[name] for name in names], share).tolist(), strict=True))
        network = plain_copy(policy.network)
        quantize_activations(network, bits, calibration)
        for name, linear in plain_linears(network).items():
            if stays[name]:
                linear.activation = Unquantized()
            else:
                linear.quantize_weight(bits.weights)
        changed = any(not stays[name] for name in names) and (bits.weights, bits.activations) != (FLOAT, FLOAT)
        found: dict[str, Compensation] = {}
        if compensate and changed:
            found = compensate_layers(policy.network, network, calibration, rank=rank, gains=gains)
        finish(network)
        passes = 1 + (2 if found else 0)
        return QuantizedPolicy(
            network,
            report(
                self.name,
                "DA-PTQ" if compensate else "DA-PTQ allocation",
                bits,
                network,
                calibration,
                time.monotonic() - started,
                calls_of(calibration, passes),
                executes_as=_executes_as(network, sum(stays.values()), len(names)),
                backward_calls=calls_of(calibration),
                action_error=CalibrationSampler(policy, calibration).error(network),
                kept_layers=[name for name in names if stays[name]],
                kept_share=share,
                drift_gradient=slopes,
                kinematic_chain=NO_CHAIN if jacobians is None else "given",
                dimension_weights=weights.tolist(),
                dimension_rule={"translation": TRANSLATION, "rotation": ROTATION, "damping": DAMPING},
                compensated=sorted(found),
                compensation_rank=rank,
                compensation_gains=list(gains),
                directions={name: c.u.shape[1] for name, c in found.items() if c.u.shape[1]},
                clipped_gains=sum(c.clipped for c in found.values()),
            ),
        )


def _executes_as(network: DiffusionPolicyT, floats: int, count: int) -> str:
    if not 0 < floats < count:
        return executes_as(network)
    return f"{floats} of {count} linears as FP16 products (kept for their drift), the others as {executes_as(network)}"


def compensate_layers(
    reference: DiffusionPolicyT,
    network: DiffusionPolicyT,
    calibration: Calibration,
    *,
    rank: int = RANK,
    gains: tuple[float, float] = GAINS,
) -> dict[str, Compensation]:
    """Fold into every layer of ``network``, in place, what gives its outputs the moments that ``reference`` has there.

    One pass over all calls at once: a layer is compensated before those behind it run.

    Args:
        reference: in full precision.
        network: with plain linears, quantized.
        calibration: what both run on.
        rank: as in :func:`training.baselines.da_ptq_compensation.compensation`.
        gains: likewise.

    Returns:
        The compensations by module path.
    """
    layers: dict[str, nn.Module] = {**plain_linears(network), HEAD: network.head}
    free = {name: not isinstance(layer, PlainLinear) or _is_float(layer) for name, layer in layers.items()}
    wanted: dict[str, Moments] = {}

    def observe(name: str) -> Hook:
        def call(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if name not in wanted:
                wanted[name] = Moments(output.shape[-1], full=free[name] and rank > 0)
            wanted[name].observe(output.detach().flatten(0, -2).numpy())

        return call

    found: dict[str, Compensation] = {}

    def correct(name: str) -> Hook:
        def call(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen = Moments(output.shape[-1], full=free[name] and rank > 0)
            seen.observe(output.flatten(0, -2).numpy())
            found[name] = compensation(wanted[name], seen, rank=rank if free[name] else 0, gains=gains)
            _fold(module, found[name])
            result: Tensor = module.forward(arguments[0])
            return result

        return call

    with torch.no_grad():
        with hooked(reference, {name: observe(name) for name in layers}):
            _run_together(reference, calibration)
        with hooked(network, {name: correct(name) for name in layers}):
            _run_together(network, calibration)
    return found


def _is_float(layer: PlainLinear) -> bool:
    return bool((layer.row_bits == FLOAT).all())


@torch.no_grad()
def _fold(layer: nn.Module, found: Compensation) -> None:
    """Make a layer compute its compensated outputs: a mixture of channels needs weights in floating point."""
    if isinstance(layer, PlainLinear) and not _is_float(layer):
        gain = torch.from_numpy(found.gain).to(torch.float32)
        layer.weight_scale *= gain
        layer.bias.copy_(layer.bias * gain + torch.from_numpy(found.shift).to(torch.float32))
        return
    assert isinstance(layer, PlainLinear | nn.Linear)
    bias = np.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().numpy()
    weight, shift = (torch.from_numpy(value).to(torch.float32) for value in found.folded(layer.weight.numpy(), bias))
    if isinstance(layer, PlainLinear):
        layer.set_weight(weight, shift)
        return
    layer.weight.copy_(weight)
    layer.bias.copy_(shift)


def _run_together(network: DiffusionPolicyT, calibration: Calibration) -> None:
    """Run all calls in one pass; their observations are the same, so they are encoded once."""
    calls = calibration.calls
    conditions = network.conditions(calibration.observation).repeat(len(calls), 1, 1)
    timesteps = torch.cat([call.timesteps for call in calls])
    memory = torch.cat([network.time_tokens(timesteps), network.condition_tokens(conditions)], dim=1)
    noisy = torch.cat([call.noisy for call in calls])
    tokens = noisy.shape[1]
    x = network.action_embedding(noisy) + network.action_position[:, :tokens]
    for block in network.decoder_blocks():
        keys, values = block.cross_attn.keys_values(memory)
        x = block(x, keys, values, network.self_mask[:tokens, :tokens], network.cross_mask[:tokens])
    network.head(network.norm(x))
