"""The networks of a supernet's training step, and the space that they come from."""

from __future__ import annotations

from dataclasses import dataclass

from training.config import ConfigError, TrainConfig
from training.draws import Phase
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.space import SearchSpace
from training.subnet import Layer, Precision, SpaceError, Subnet
from training.supernet_config import SupernetConfig

HELD_OUT_SUBNETS = ("largest", "fp8", "w8a8", "w4a4", "smallest")


@dataclass(frozen=True, slots=True)
class Member:
    """One network of a step: class for the log, number of samples, weight of its loss, and whether dropout acts."""

    label: str
    subnet: Subnet
    batch: int
    weight: float = 1.0
    dropout: bool = False


def search_space(config: TrainConfig) -> SearchSpace:
    """The search space of a supernet configuration, counted with the tokens that a robot executes.

    Raises:
        ConfigError: there is no ``supernet`` section.
        SpaceError: the section does not fit the policy.
    """
    if config.supernet is None:
        raise ConfigError(f"training configuration {config.name!r}: supernet: the section is missing")
    tokens = config.policy.observation_horizon - 1 + config.executed_actions
    return SearchSpace(diffusion_policy_t_shape(config.policy, tokens), config.supernet.space)


def held_out_names(space: SearchSpace, options: SupernetConfig) -> tuple[str, ...]:
    """Names of the validated subnets that ``space`` has.

    Raises:
        ConfigError: the space lacks a network that steps train.
    """
    if Precision.FP32 not in space.precisions:
        raise ConfigError("supernet.space.precisions: fp32 is missing; every step trains the largest network in it")
    for name, share in options.sandwich.low_shares.items():
        if share > 0.0 and not _has(space, name):
            raise ConfigError(
                f"supernet.sandwich.low_shares: {name} is not in the space; leave it out or extend supernet.space"
            )
    return tuple(name for name in HELD_OUT_SUBNETS if _has(space, name))


def _has(space: SearchSpace, name: str) -> bool:
    try:
        space.parse(name)
    except SpaceError:
        return False
    return True


def smallest_of(space: SearchSpace, phase: Phase) -> Subnet:
    """The smallest network that the phase allows, at the fewest bits."""
    w, a = space.weight_bits[0], space.activation_bits[0]
    smallest, largest = space.smallest(w, a), space.largest(Precision.INT, w, a)
    if not phase.width:
        return largest
    if phase.depth:
        return smallest
    widths = zip(space.head_choices, space.mlp_choices, strict=True)
    return Subnet(tuple(Layer(min(heads), min(mlp), w, a) for heads, mlp in widths), Precision.INT)
