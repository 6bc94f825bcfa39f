"""Weights of a full-precision policy to start from: out of a training run, or back out of a bundle.

How parameters are found in a bundle's graphs: :mod:`training.graph_weights`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from dcqfa_ros.bundle.errors import BundleNotFoundError
from dcqfa_ros.bundle.load import BUNDLE_YAML, Bundle, load_bundle
from dcqfa_ros.bundle.schema import NormalizerSpec
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.stored_half import stored_half_names
from training.checkpoint import CHECKPOINT
from training.graph_weights import Constants, WarmStartError, graph_state, table_shape, with_time_position
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.trained import load_trained

NORMALIZER_TOLERANCE = 1e-6  # relative and absolute: written as decimal text, fitted in float64


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
        sha256: by which the policy is recognised: of a checkpoint's weights, or of the files of a bundle's variant. One
            of the weights read out of those files is solved for, so its last bits depend on the processor.
        prefix: of the policy itself; ``state`` is for the configuration that was asked for, which may add one.
    """

    state: dict[str, Tensor]
    observation_norms: Mapping[str, NormalizerSpec]
    action_norm: NormalizerSpec
    steps: int
    data_sha256: str | None
    path: Path
    sha256: str
    prefix: int = 0

    def check_normalizers(self, observation_norms: Mapping[str, NormalizerSpec], action_norm: NormalizerSpec) -> None:
        """Refuse to continue in other units than the weights were trained in.

        Raises:
            WarmStartError: an observation key or a normaliser differs.
        """
        check_normalizers(self.path, (self.observation_norms, self.action_norm), (observation_norms, action_norm))


Norms = tuple[Mapping[str, NormalizerSpec], NormalizerSpec]  # per observation key, and of the action


def check_normalizers(path: Path, policy: Norms, data: Norms) -> None:
    """Refuse data in other units than those of the policy of ``path``.

    Raises:
        WarmStartError: an observation key or a normaliser differs.
    """
    (observations, action), (given, given_action) = policy, data
    if list(observations) != list(given):
        raise WarmStartError(
            f"{path}: its policy reads the observations {', '.join(observations)}, the configuration "
            f"{', '.join(given)}; they must be the same in the same order"
        )
    pairs = {f"observations.{key}": (norm, given[key]) for key, norm in observations.items()}
    for name, (theirs, ours) in (pairs | {"action": (action, given_action)}).items():
        if not _same_normalizer(theirs, ours):
            raise WarmStartError(
                f"{path}: the normalizer of {name} differs from the one fitted on the demonstrations given; give those "
                "that the policy was trained on, with the same split (data.path, data.validation_ratio, "
                "data.split_seed, data.max_train_episodes), or other weights"
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
        sha256=state_sha256(state),
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
    exported = next((variant for variant in spec.variants if variant.precision == "fp32"), None)
    if exported is None:
        names = ", ".join(f"{variant.name} ({variant.precision})" for variant in spec.variants)
        raise WarmStartError(
            f"{field}: variants: none is of precision fp32, there is {names}; export one, or start from the checkpoint"
        )
    variant = exported.name
    graphs = {role: bundle.read(variant, role) for role in ROLES}
    theirs = config.model_copy(update={"prefix": spec.diffusion.prefix})
    state = graph_state(graphs, theirs, bundle.file(variant, "encoder").parent)
    path = bundle.file(variant, "timestep")
    table = Constants(graphs["timestep"], path).take("table", spec.diffusion.train_timesteps, *table_shape(theirs))
    rounded = "table" in stored_half_names(onnx.load_model_from_string(graphs["timestep"]))
    state = _with_flag(with_time_position(state, table, theirs, path, rounded=rounded), config)
    return PolicyWeights(
        state=state,
        observation_norms={key: source.normalizer for key, source in spec.observations.items()},
        action_norm=spec.action.normalizer,
        steps=spec.training.steps,
        data_sha256=spec.training.data_sha256,
        path=bundle.folder,
        sha256=exported.weights,
        prefix=spec.diffusion.prefix,
    )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of a network's parameters."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
