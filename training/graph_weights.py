"""Parameters of a full-precision policy out of its ONNX graphs.

A bundle holds ONNX graphs and no parameters. Everything that the exporter folded is unfolded here; what it did not
write is found from what it did. The result is a network of the same function, not always of the same parameters:

- the bias of an embedding and the position added after it are known as a sum only: the bias becomes 0;
- the position of the time token is in no graph, only its effect on a table of keys and values. Everything between is
  known, so it is solved for;
- weights that are stored as float16 are those of the policy, rounded. The table is rounded too, after it was computed:
  the position found from it gives the table before rounding to within a few 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from onnx import numpy_helper
from torch import Tensor

from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.lowering import parse_model
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig

TABLE_TOLERANCE = 1e-5  # keys and values of the time token, which are of order 1
# Of a table stored as float16: every value is off by up to 2^-11 of itself, and so is what is found from them all.
HALF_TABLE_TOLERANCE = (2.0**-10, 1e-4)  # relative and absolute
_ITERATIONS = 50
_TIME_STEPS = 32


class WarmStartError(UserError, ValueError):
    """Weights that cannot be started from; the message names file and field, what was expected, what to do."""


class Constants:
    """The constants of one ONNX file, taken by name and shape; those stored as float16 are widened."""

    def __init__(self, data: bytes, path: Path) -> None:
        """Parse ``data``, the content of the file ``path``."""
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in parse_model(data, str(path)).graph.initializer}

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A float32 constant of the given shape (None: any size) as a tensor of its own.

        Raises:
            WarmStartError: it is missing, of another shape or not float32.
        """
        if name not in self._tensors:
            raise WarmStartError(
                f"{self.path}: no constant {name!r}; weights are read from graphs of this version's "
                "'dcqfa export' only: export the policy again, or start from its checkpoint"
            )
        array = numpy_helper.to_array(self._tensors[name])
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
        if not fits or array.dtype != np.float32:
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise WarmStartError(
                f"{self.path}: constant {name!r} is {array.dtype} of shape {tuple(array.shape)}, expected float32 of "
                f"({expected}); export the policy again, or start from its checkpoint"
            )
        return torch.from_numpy(array.copy())

    def linear(self, name: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,) of a linear layer, which ONNX holds as (in, out)."""
        return self.take(f"{name}.weight", inputs, outputs).t().contiguous(), self.take(f"{name}.bias", outputs)


def graph_state(graphs: Mapping[str, bytes], config: DiffusionPolicyTConfig, folder: Path) -> dict[str, Tensor]:
    """Parameters that encoder and denoiser hold; ``memory_position`` (1, To, dim) still lacks the time token's row.

    Args:
        graphs: role -> canonical ONNX bytes of a full-precision policy.
        config: the network they are of.
        folder: where the graphs lie, for errors.

    Raises:
        WarmStartError: a constant is missing or not what this version exports.
        LoweringError: a graph cannot be parsed.
    """
    encoder, denoiser = (Constants(graphs[role], folder / f"{role}.onnx") for role in ("encoder", "denoiser"))
    return _encoder_state(encoder, config) | _denoiser_state(denoiser, config)


def table_shape(config: DiffusionPolicyTConfig) -> tuple[int, ...]:
    """Shape of the time token's keys and values at one time step: every layer's heads, 1, width of a head."""
    return 2 * config.depth * config.heads, 1, config.dim // config.heads


def _encoder_state(constants: Constants, config: DiffusionPolicyTConfig) -> dict[str, Tensor]:
    """Parameters in the encoder; ``memory_position`` (1, To, dim) still lacks the time token's, which comes first."""
    d = config.dim
    state = {
        "observation_embedding.weight": constants.take("observation_embedding.weight", config.observation_dim, d)
        .t()
        .contiguous(),
        "observation_embedding.bias": torch.zeros(d),
        "memory_position": constants.take("memory_position", 1, config.observation_horizon, d),
    }
    for name, inputs, outputs in (("memory_fc1", d, 4 * d), ("memory_fc2", 4 * d, d)):
        state[f"{name}.weight"], state[f"{name}.bias"] = constants.linear(name, inputs, outputs)
    weight, bias = constants.linear("cross_attn.kv", d, 2 * config.depth * d)
    names = [f"blocks.{i}.cross_attn.{part}" for i in range(config.depth) for part in "kv"]
    return state | _parts(names, weight, bias)


def _parts(names: list[str], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The linears that lie side by side in a merged one, all with equally many outputs."""
    state = {}
    for name, w, b in zip(names, weight.chunk(len(names)), bias.chunk(len(names)), strict=True):
        state[f"{name}.weight"], state[f"{name}.bias"] = w.clone(), b.clone()
    return state


def _denoiser_state(constants: Constants, config: DiffusionPolicyTConfig) -> dict[str, Tensor]:
    """Parameters in the denoiser. Queries were scaled by 1/sqrt(D): undone exactly where D is a power of four."""
    d, hidden = config.dim, config.ffn_ratio * config.dim
    scale = np.float32(1.0 / math.sqrt(d // config.heads)).item()
    state = {
        "action_embedding.weight": constants.take("action_embedding.weight", config.noisy_dim, d).t().contiguous(),
        "action_embedding.bias": torch.zeros(d),
        "action_position": constants.take("action_position", config.horizon, d)[None],
        "head.weight": constants.take("head.weight", d, config.action_dim).t().contiguous(),
        "head.bias": constants.take("head.bias", config.action_dim),
    }
    norms = ["norm"]
    for i in range(config.depth):
        block = f"blocks.{i}"
        weight, bias = constants.linear(f"{block}.self_attn.qkv", d, 3 * d)
        state |= _parts([f"{block}.self_attn.{part}" for part in "qkv"], weight, bias)
        for name, inputs, outputs in (
            ("self_attn.o", d, d),
            ("cross_attn.q", d, d),
            ("cross_attn.o", d, d),
            ("fc1", d, hidden),
            ("fc2", hidden, d),
        ):
            layer = f"{block}.{name}"
            state[f"{layer}.weight"], state[f"{layer}.bias"] = constants.linear(layer, inputs, outputs)
        for query in (f"{block}.self_attn.q", f"{block}.cross_attn.q"):
            for kind in ("weight", "bias"):
                state[f"{query}.{kind}"] /= scale
        norms += [f"{block}.norm{n}" for n in (1, 2, 3)]
    for norm in norms:
        state |= {f"{norm}.{kind}": constants.take(f"{norm}.{kind}", d) for kind in ("weight", "bias")}
    return state


def with_time_position(
    state: dict[str, Tensor], table: Tensor, config: DiffusionPolicyTConfig, path: Path, *, rounded: bool = False
) -> dict[str, Tensor]:
    """Complete ``memory_position`` so that the network's time token has the keys and values of ``table``.

    ``rounded``: the table was stored as float16; it is then met as nearly as that type allows.

    Raises:
        WarmStartError: there is no such position; the bundle's graphs are not of one network.
    """
    with torch.random.fork_rng(devices=[]):  # making a network draws its weights
        network = DiffusionPolicyT(config)
    try:
        position = solve_time_position(state, table, network.frequencies)
    except torch.linalg.LinAlgError as singular:
        raise WarmStartError(
            f"{path}: its keys and values do not tell what the time token is: the weights of cross attention are of "
            "deficient rank; start from the policy's checkpoint"
        ) from singular
    state = state | {"memory_position": torch.cat([position[None, None], state["memory_position"]], dim=1)}
    network.load_state_dict(state)
    with torch.inference_mode():
        difference = (network.eval().timestep_keys_values(torch.arange(len(table))) - table).abs()
    relative, absolute = HALF_TABLE_TOLERANCE if rounded else (0.0, TABLE_TOLERANCE)
    error = float(difference.max())
    if not bool((difference <= absolute + relative * table.abs()).all()):
        raise WarmStartError(
            f"{path}: its table of the time token's keys and values is not that of the network in the other graphs "
            f"(nearest one differs by {error:.3g}, allowed is {absolute:g}); export the policy again, or start "
            "from its checkpoint"
        )
    return {name: state[name] for name in network.state_dict()}  # in the network's order


def solve_time_position(state: Mapping[str, Tensor], table: Tensor, frequencies: Tensor) -> Tensor:
    """Position p of the time token, from W_kv (W_2 mish(W_1 (e_t + p) + b_1) + b_2) + b_kv = table_t for every t.

    The last linear is inverted by least squares, by its normal equations: the library's solver for the problem itself
    gives other last bits from call to call. That leaves ``dim`` equations for every time step in ``dim`` unknowns. They
    are solved in float64 by Levenberg and Marquardt's method from p = 0, over a part of the time steps,
    which is more than enough.

    Args:
        state: ``memory_fc1``, ``memory_fc2`` and every block's ``cross_attn.k`` and ``cross_attn.v``.
        table: (S, R, 1, D) of the time steps 0 to S - 1.
        frequencies: (dim / 2,) of the time embedding.

    Returns:
        (dim,) float32; the nearest found where no position fits.

    Raises:
        torch.linalg.LinAlgError: the weights of keys and values are not of full column rank.
    """
    depth = sum(name.endswith(".cross_attn.k.weight") for name in state)
    kv = [f"blocks.{i}.cross_attn.{part}" for i in range(depth) for part in "kv"]
    weight, bias = (torch.cat([state[f"{name}.{kind}"] for name in kv]).double() for kind in ("weight", "bias"))
    steps = torch.linspace(0, len(table) - 1, min(len(table), _TIME_STEPS)).round().long()
    rows = table[steps].double().flatten(1) - bias
    tokens = torch.linalg.solve(weight.t() @ weight, weight.t() @ rows.t()).t()  # (s, dim)
    w1, b1, w2, b2 = (state[f"memory_{name}"].double() for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    # As the network computes it, in float32: angles of up to thousands of radians round differently in float64.
    angles = steps.float()[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).double()

    def residual(position: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (embedding + position) @ w1.t() + b1
        return hidden, torch.nn.functional.mish(hidden) @ w2.t() + b2 - tokens

    position, damping = torch.zeros(len(b2), dtype=torch.float64), 1e-3
    hidden, error = residual(position)
    for _ in range(_ITERATIONS):
        normal, slope = torch.zeros(len(b2), len(b2), dtype=torch.float64), torch.zeros_like(position)
        gate = torch.tanh(torch.nn.functional.softplus(hidden))
        derivative = gate + hidden * (1.0 - gate.square()) * torch.sigmoid(hidden)
        for d_t, e_t in zip(derivative, error, strict=True):
            jacobian = (w2 * d_t) @ w1
            normal += jacobian.t() @ jacobian
            slope += jacobian.t() @ e_t
        before = float(error.square().sum())
        while True:
            step = torch.linalg.solve(normal + damping * torch.diag(normal.diagonal() + 1e-12), slope)
            hidden_next, error_next = residual(position - step)
            improved = float(error_next.square().sum()) < before
            damping = damping / 10.0 if improved else damping * 10.0
            if improved or damping > 1e8:
                break
        if not improved:
            break
        position, hidden, error = position - step, hidden_next, error_next
        if float(step.abs().max()) < 1e-10:  # far below the float32 resolution of what is returned
            break
    return position.float()
