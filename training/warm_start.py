"""Weights of a full-precision policy to start from: out of a training run, or back out of a bundle.

A bundle holds ONNX graphs and no parameters. Everything that the exporter folded is unfolded here; what it did not
write is found from what it did. The result is a network of the same function, not always of the same parameters:

- the bias of an embedding and the position added after it are known as a sum only: the bias becomes 0;
- the position of the time token is in no graph, only its effect on a table of keys and values. Everything between is
  known, so it is solved for;
- weights that are stored as float16 are those of the policy, rounded. The table is rounded too, after it was computed:
  the position found from it gives the table before rounding to within a few 1e-5.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from dcqfa_ros.bundle.errors import BundleNotFoundError
from dcqfa_ros.bundle.load import BUNDLE_YAML, Bundle, load_bundle
from dcqfa_ros.bundle.schema import NormalizerSpec
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.lowering import parse_model
from dcqfa_ros.runtime.stored_half import stored_half_names
from training.checkpoint import CHECKPOINT
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.trained import load_trained

TABLE_TOLERANCE = 1e-5  # keys and values of the time token, which are of order 1
# Of a table stored as float16: every value is off by up to 2^-11 of itself, and so is what is found from them all.
HALF_TABLE_TOLERANCE = (2.0**-10, 1e-4)  # relative and absolute
NORMALIZER_TOLERANCE = 1e-6  # relative and absolute: written as decimal text, fitted in float64
_ITERATIONS = 50
_TIME_STEPS = 32


class WarmStartError(UserError, ValueError):
    """Weights that cannot be started from; the message names file and field, what was expected, what to do."""


@dataclass(frozen=True, slots=True)
class PolicyWeights:
    """The parameters of a full-precision policy and the units that its inputs and outputs are in.

    Attributes:
        state: every parameter of :class:`DiffusionPolicyT` by name, float32 on the CPU; shares no memory with anything.
        observation_norms: per observation key, in the order the network reads them.
        action_norm: of its actions.
        steps: optimizer steps behind the weights.
        data_sha256: of the demonstrations they come from; None where that is not known.
        path: the checkpoint file or the bundle's folder.
        prefix: of the policy itself; ``state`` is for the configuration that was asked for, which may add one.
    """

    state: dict[str, Tensor]
    observation_norms: Mapping[str, NormalizerSpec]
    action_norm: NormalizerSpec
    steps: int
    data_sha256: str | None
    path: Path
    prefix: int = 0

    def check_normalizers(self, observation_norms: Mapping[str, NormalizerSpec], action_norm: NormalizerSpec) -> None:
        """Refuse to continue in other units than the weights were trained in.

        Raises:
            WarmStartError: an observation key or a normaliser differs.
        """
        if list(self.observation_norms) != list(observation_norms):
            raise WarmStartError(
                f"{self.path}: its policy reads the observations {', '.join(self.observation_norms)}, this run "
                f"{', '.join(observation_norms)}; they must be the same in the same order"
            )
        pairs = {f"observations.{key}": (norm, observation_norms[key]) for key, norm in self.observation_norms.items()}
        for name, (theirs, ours) in (pairs | {"action": (self.action_norm, action_norm)}).items():
            if not _same_normalizer(theirs, ours):
                raise WarmStartError(
                    f"{self.path}: the normalizer of {name} differs from the one fitted on this run's data; train on "
                    "the same demonstrations with the same split (data.path, data.validation_ratio, data.split_seed, "
                    "data.max_train_episodes) or start from other weights"
                )


def load_policy_weights(path: Path, config: DiffusionPolicyTConfig) -> dict[str, Tensor]:
    """State dict for ``DiffusionPolicyT(config)``; see :func:`read_policy_weights`."""
    return read_policy_weights(path, config).state


def policy_beside(path: Path, written: str) -> Path:
    """The full-precision policy that the checkpoint ``path`` of a supernet names, or its namesake beside its folder."""
    beside = path.resolve().parent.parent / Path(written).name
    return Path(written) if Path(written).exists() or not beside.exists() else beside


def read_policy_weights(path: Path, config: DiffusionPolicyTConfig) -> PolicyWeights:
    """Read the weights of a full-precision policy.

    Args:
        path: a run folder or checkpoint file (its averaged weights are taken), or the folder or name of a bundle.
        config: the network that they are for; ``attention_dropout`` may differ. With a ``prefix`` the policy's own may
            be another, or none: the weights of the flag are then zero, so that at flag 0 it is the same policy.

    Raises:
        CheckpointError: the checkpoint is damaged or holds no complete policy.
        BundleError: the bundle is damaged or altered.
        WarmStartError: there is no such file, folder or bundle; the folder is neither a run nor a bundle; the policy is
            of another size; the bundle's full-precision graphs are missing or not what this version exports.
    """
    if (path / CHECKPOINT).is_file() or path.is_file():
        return _from_checkpoint(path, config)
    if path.is_dir() and not (path / BUNDLE_YAML).is_file():
        raise WarmStartError(
            f"{path}: holds neither {CHECKPOINT} nor {BUNDLE_YAML}; give a run folder, a checkpoint or a bundle"
        )
    try:
        folder = find_bundle(str(path))
    except BundleNotFoundError as error:
        raise WarmStartError(f"{path}: no such run folder or checkpoint, and no bundle ({error.message})") from error
    return _from_bundle(load_bundle(folder, verify=False), config)  # each file is checked when it is read


def _from_checkpoint(path: Path, config: DiffusionPolicyTConfig) -> PolicyWeights:
    with torch.random.fork_rng(devices=[]):  # making a network draws its weights
        trained = load_trained(path)
    have, want = (c.model_dump(exclude={"attention_dropout"}) for c in (trained.config.policy, config))
    _check_sizes(trained.path, have, want)
    meaning = trained.meaning
    state = {name: tensor.detach().clone() for name, tensor in trained.network.state_dict().items()}
    return PolicyWeights(
        state=_with_flag(state, config),
        prefix=trained.config.policy.prefix,
        observation_norms=dict(meaning.observation_norms),
        action_norm=meaning.action_norm,
        steps=meaning.step,
        data_sha256=meaning.data_sha256,
        path=trained.path,
    )


def _check_sizes(path: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    have = dict(have)
    if want["prefix"]:
        have["prefix"] = want["prefix"]  # a flag's weights can be added, and it says nothing of the most it flags
    different = [f"{name} {have[name]} (this run: {want[name]})" for name in have if have[name] != want[name]]
    if different:
        raise WarmStartError(
            f"{path}: holds a policy of another size: {', '.join(different)}; change the section policy of the "
            "configuration or start from other weights"
        )


def _same_normalizer(one: NormalizerSpec, other: NormalizerSpec) -> bool:
    """Whether two normalisers map values alike; how they were fitted does not matter."""
    for first, second, neutral in ((one.scale, other.scale, 1.0), (one.offset, other.offset, 0.0)):
        size = max(len(first), len(second))
        a, b = (np.asarray(values or (neutral,) * size) for values in (first, second))  # empty: the identity
        if a.shape != b.shape or not np.allclose(a, b, rtol=NORMALIZER_TOLERANCE, atol=NORMALIZER_TOLERANCE):
            return False
    return True


def _with_flag(state: dict[str, Tensor], config: DiffusionPolicyTConfig) -> dict[str, Tensor]:
    """``state`` with a column of zeros for the flag of known tokens where ``config`` has one and it has not."""
    weight = state["action_embedding.weight"]
    missing = config.noisy_dim - weight.shape[1]
    return state | {"action_embedding.weight": torch.nn.functional.pad(weight, (0, missing))} if missing else state


class _Constants:
    """The constants of one ONNX file, taken by name and shape; those stored as float16 are widened."""

    def __init__(self, data: bytes, path: Path) -> None:
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


def _from_bundle(bundle: Bundle, config: DiffusionPolicyTConfig) -> PolicyWeights:
    spec, field = bundle.spec, bundle.folder / BUNDLE_YAML
    histories = {source.history for source in spec.observations.values()}
    if len(histories) != 1:
        raise WarmStartError(f"{field}: observations: history differs between keys ({sorted(histories)})")
    architecture = spec.architecture
    have = {
        "observation_dim": sum(source.size for source in spec.observations.values()),
        "action_dim": len(spec.action.names),
        "horizon": architecture.horizon,
        "observation_horizon": histories.pop(),
        "depth": architecture.depth,
        "heads": architecture.heads,
        "dim": architecture.dim,
        "ffn_dim": architecture.ffn_dim,
        "prefix": spec.diffusion.prefix,
        "image": None,  # bundles hold no image encoder yet
    }
    want = config.model_dump(exclude={"attention_dropout", "ffn_ratio"}) | {"ffn_dim": config.ffn_ratio * config.dim}
    _check_sizes(field, have, want)
    variant = next((variant.name for variant in spec.variants if variant.precision == "fp32"), None)
    if variant is None:
        names = ", ".join(f"{variant.name} ({variant.precision})" for variant in spec.variants)
        raise WarmStartError(
            f"{field}: variants: none is of precision fp32, there is {names}; export one, or start from the checkpoint"
        )
    graphs = {role: bundle.read(variant, role) for role in ROLES}
    theirs = config.model_copy(update={"prefix": spec.diffusion.prefix})
    state = graph_state(graphs, theirs, bundle.file(variant, "encoder").parent)
    path = bundle.file(variant, "timestep")
    table = _Constants(graphs["timestep"], path).take("table", spec.diffusion.train_timesteps, *_table_shape(theirs))
    rounded = "table" in stored_half_names(onnx.load_model_from_string(graphs["timestep"]))
    state = _with_flag(_with_time_position(state, table, theirs, path, rounded=rounded), config)
    return PolicyWeights(
        state=state,
        observation_norms={key: source.normalizer for key, source in spec.observations.items()},
        action_norm=spec.action.normalizer,
        steps=spec.training.steps,
        data_sha256=spec.training.data_sha256,
        path=bundle.folder,
        prefix=spec.diffusion.prefix,
    )


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
    encoder, denoiser = (_Constants(graphs[role], folder / f"{role}.onnx") for role in ("encoder", "denoiser"))
    return _encoder_state(encoder, config) | _denoiser_state(denoiser, config)


def _table_shape(config: DiffusionPolicyTConfig) -> tuple[int, ...]:
    return 2 * config.depth * config.heads, 1, config.dim // config.heads


def _encoder_state(constants: _Constants, config: DiffusionPolicyTConfig) -> dict[str, Tensor]:
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


def _denoiser_state(constants: _Constants, config: DiffusionPolicyTConfig) -> dict[str, Tensor]:
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


def _with_time_position(
    state: dict[str, Tensor], table: Tensor, config: DiffusionPolicyTConfig, path: Path, *, rounded: bool = False
) -> dict[str, Tensor]:
    """Complete ``memory_position`` so that the network's time token has the keys and values of ``table``.

    ``rounded``: the table was stored as float16; it is then met as nearly as that type allows.

    Raises:
        WarmStartError: there is no such position; the bundle's graphs are not of one network.
    """
    with torch.random.fork_rng(devices=[]):  # making a network draws its weights
        network = DiffusionPolicyT(config)
    position = solve_time_position(state, table, network.frequencies)
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

    The last linear is inverted by least squares, which leaves ``dim`` equations for every time step in ``dim``
    unknowns. They are solved in float64 by Levenberg and Marquardt's method from p = 0, over a part of the time steps,
    which is more than enough.

    Args:
        state: ``memory_fc1``, ``memory_fc2`` and every block's ``cross_attn.k`` and ``cross_attn.v``.
        table: (S, R, 1, D) of the time steps 0 to S - 1.
        frequencies: (dim / 2,) of the time embedding.

    Returns:
        (dim,) float32; the nearest found where no position fits.
    """
    depth = sum(name.endswith(".cross_attn.k.weight") for name in state)
    kv = [f"blocks.{i}.cross_attn.{part}" for i in range(depth) for part in "kv"]
    weight, bias = (torch.cat([state[f"{name}.{kind}"] for name in kv]).double() for kind in ("weight", "bias"))
    steps = torch.linspace(0, len(table) - 1, min(len(table), _TIME_STEPS)).round().long()
    tokens = torch.linalg.lstsq(weight, (table[steps].double().flatten(1) - bias).t()).solution.t()  # (s, dim)
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


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of a network's parameters."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
