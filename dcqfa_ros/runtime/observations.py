"""From a dictionary of raw observations to the encoder's input, refusing what must not reach a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.normalize import Normalizer

Observation = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ObservationKey:
    """One key of the observation dictionary: arrays (B, history, *shape), float32, in the bundle's raw units."""

    name: str
    shape: tuple[int, ...]
    size: int
    units: str
    normalizer: Normalizer


class ObservationLayout:
    """How a bundle's observation keys are checked, normalised and concatenated.

    Attributes:
        keys: the keys in the bundle's order, which is the order of concatenation.
        history: time steps per observation (To).
        dim: width of the concatenated vector (Do).
    """

    def __init__(self, spec: BundleSpec) -> None:
        """Read the layout from a bundle.

        Raises:
            PolicyError: a key's type is not supported by this runtime.
        """
        keys: list[ObservationKey] = []
        histories: set[int] = set()
        for name, observation in spec.observations.items():
            if observation.type != "low_dim" or observation.dtype != "float32":
                raise PolicyError(
                    f"bundle {spec.name}: observation {name!r} is {observation.type}/{observation.dtype}; this runtime "
                    "supports low_dim/float32 observations only"
                )
            normalizer = Normalizer(observation.normalizer, observation.shape)
            keys.append(ObservationKey(name, observation.shape, observation.size, observation.units, normalizer))
            histories.add(observation.history)
        self.keys = tuple(keys)
        self.history = histories.pop()
        self.dim = sum(key.size for key in keys)

    def check(self, observation: Observation) -> int:
        """Check keys, dtypes and shapes, and return the batch size.

        Raises:
            PolicyError: naming the key, what it has and what was expected.
        """
        names = {key.name for key in self.keys}
        if observation.keys() != names:
            missing, unknown = sorted(names - observation.keys()), sorted(observation.keys() - names)
            parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(
                unknown
            )
            raise PolicyError(
                f"observation {' and '.join(parts)}; the policy takes {', '.join(k.name for k in self.keys)}"
            )
        batch = None
        for key in self.keys:
            array = observation[key.name]
            if not isinstance(array, np.ndarray) or array.dtype != np.float32:
                have = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise PolicyError(f"observation {key.name!r}: expected a float32 array, got {have}")
            expected = (self.history, *key.shape)
            if array.ndim != 1 + len(expected) or array.shape[1:] != expected or not len(array):
                raise PolicyError(f"observation {key.name!r}: expected shape {('B', *expected)}, got {array.shape}")
            if batch is not None and len(array) != batch:
                raise PolicyError(f"observation {key.name!r}: batch of {len(array)}, but {batch} in the keys before it")
            batch = len(array)
        assert batch is not None  # the schema asks for at least one key
        return batch

    def encode(self, observation: Observation, out: Float32) -> None:
        """Normalise a checked observation into ``out`` (B, history, dim).

        Raises:
            PolicyError: a value is NaN or infinite; the message names key, batch row, time step and element.
        """
        first = 0
        for key in self.keys:
            array = observation[key.name]
            if not np.isfinite(array).all():
                index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
                row, step, *element = index
                raise PolicyError(
                    f"observation {key.name!r} is {array[tuple(index)]} at element {tuple(element)} of history step "
                    f"{step}, batch row {row}; expected finite {key.units}"
                )
            flat = key.normalizer.normalize(array).reshape(len(array), self.history, key.size)
            out[:, :, first : first + key.size] = flat
            first += key.size
