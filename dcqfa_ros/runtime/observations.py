"""From a dictionary of raw observations to the encoder's input, refusing what must not reach a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import (
    BundleSpec,
    DepthObservation,
    ImageObservation,
    LowDimObservation,
    NormalizerKind,
    ObservationSpec,
    WrenchObservation,
)
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.normalize import Normalizer
from dcqfa_ros.runtime.pictures import PictureForm, PictureHistory

Observation = Mapping[str, NDArray[Any]]
"""Key -> array (B, history, *shape), oldest time step first; pictures at the network's size."""

RawObservation = Mapping[str, "NDArray[Any] | PictureHistory"]
"""The same at batch 1, or with pictures as they came."""


@dataclass(frozen=True, slots=True)
class ObservationKey:
    """One key of the observation dictionary: arrays (B, history, *shape) in the bundle's raw units.

    Attributes:
        name: in the bundle.
        shape: of one time step as the network takes it; pictures are resized and cropped to it.
        size: number of scalars of it.
        dtype: float32; uint8 for images, uint16 for depth.
        units: for messages; of the normaliser's input.
        normalizer: to the policy's range.
        picture: how a camera's picture becomes ``shape``; None where the key is none.
        scale: raw to ``units``: metres per unit of depth, 1 elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    dtype: np.dtype[Any]
    units: str
    normalizer: Normalizer
    picture: PictureForm | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, bundle: str, name: str, spec: ObservationSpec) -> ObservationKey:
        """Read a key.

        Raises:
            PolicyError: this runtime cannot feed such an observation.
        """
        if isinstance(spec, LowDimObservation | WrenchObservation) and spec.dtype == "float32":
            if isinstance(spec, WrenchObservation) and (len(spec.shape) != 2 or spec.shape[1] != 6):
                raise PolicyError(f"observation {name!r}: wrench expects shape (samples, 6), got {spec.shape}")
            return cls(name, spec.shape, spec.size, np.dtype(np.float32), spec.units,
                       Normalizer(spec.normalizer, spec.shape))  # fmt: skip
        if isinstance(spec, ImageObservation | DepthObservation):
            return cls._of_picture(name, spec)
        raise PolicyError(
            f"bundle {bundle}: observation {name!r} is {spec.type}/{spec.dtype}; this runtime supports "
            "low_dim/float32, wrench/float32, image/uint8 and depth/uint16 observations only"
        )

    @classmethod
    def _of_picture(cls, name: str, spec: ImageObservation | DepthObservation) -> ObservationKey:
        form = PictureForm(name, spec)
        size = int(np.prod(form.shape))
        is_depth = isinstance(spec, DepthObservation)
        if is_depth and spec.normalizer.kind is not NormalizerKind.IDENTITY:
            raise PolicyError(f"observation {name!r}: depth reaches the network in metres; its normalizer is identity")
        if len(spec.normalizer.scale) not in (0, 3):
            raise PolicyError(f"observation {name!r}: expected a normalizer with one entry per channel, 3")
        scale = spec.depth_scale if isinstance(spec, DepthObservation) else 1.0
        units = "m" if is_depth else spec.units
        return cls(name, form.shape, size, form.dtype, units, Normalizer(spec.normalizer, form.shape), form, scale)

    def flat(self, array: NDArray[Any]) -> Float32:
        """Normalise (B, history, *shape) to (B, history, size); pictures channels before rows before columns."""
        values = array * self.scale if self.scale != 1.0 else array
        normal = self.normalizer.normalize(values)
        if self.picture is not None and normal.ndim == 5:
            normal = np.moveaxis(normal, -1, -3)
        return normal.reshape(*array.shape[:2], self.size)


class ObservationLayout:
    """How a bundle's observation keys are checked, normalised and concatenated.

    Attributes:
        keys: the keys in the order of concatenation: those of the bundle, pictures after all others, as in training.
        history: time steps per observation (To).
        dim: width of the concatenated vector (Do).
    """

    def __init__(self, spec: BundleSpec) -> None:
        """Read the layout from a bundle.

        Raises:
            PolicyError: a key's type is not supported by this runtime, or keys have different histories.
        """
        keys = [ObservationKey.of(spec.name, name, observation) for name, observation in spec.observations.items()]
        histories = {name: observation.history for name, observation in spec.observations.items()}
        if len(set(histories.values())) > 1:
            told = ", ".join(f"{name} {history}" for name, history in histories.items())
            raise PolicyError(f"bundle {spec.name}: observations must share one history, got {told}")
        self.keys = tuple(sorted(keys, key=lambda key: key.picture is not None))
        self.history = next(iter(histories.values()))
        self.dim = sum(key.size for key in keys)

    def check(self, observation: RawObservation) -> int:
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
            size = self._batch_of(key, observation[key.name])
            if batch is not None and size != batch:
                raise PolicyError(f"observation {key.name!r}: batch of {size}, but {batch} in the keys before it")
            batch = size
        assert batch is not None  # the schema asks for at least one key
        return batch

    def _batch_of(self, key: ObservationKey, array: object) -> int:
        if isinstance(array, PictureHistory) and key.picture is not None:
            shapes = {(picture.shape, picture.dtype) for picture in array.frames}
            if len(array.frames) != self.history or shapes != {(key.picture.source, key.dtype)}:
                raise PolicyError(
                    f"observation {key.name!r}: expected {self.history} pictures of {key.dtype} "
                    f"{key.picture.source}, got {len(array.frames)} of {sorted(map(str, shapes))}"
                )
            return 1
        if not isinstance(array, np.ndarray) or array.dtype != key.dtype:
            have = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise PolicyError(f"observation {key.name!r}: expected a {key.dtype} array, got {have}")
        expected = (self.history, *key.shape)
        if array.ndim != 1 + len(expected) or array.shape[1:] != expected or not len(array):
            raise PolicyError(f"observation {key.name!r}: expected shape {('B', *expected)}, got {array.shape}")
        return len(array)

    def put(self, observation: RawObservation, memory: Observation) -> None:
        """Write a checked observation of batch 1 into ``memory``, key -> (1, history, *shape).

        It is the only copy of a picture: from the bytes it came in, resized and cropped, to where it is read.
        """
        for key in self.keys:
            value, out = observation[key.name], memory[key.name]
            if isinstance(value, PictureHistory):
                assert key.picture is not None
                for step, picture in enumerate(value.frames):
                    key.picture.write(picture, out[0, step])
            else:
                np.copyto(out, value)

    def encode(self, observation: Observation, out: Float32) -> None:
        """Normalise a checked observation of arrays into ``out`` (B, history, dim).

        Raises:
            PolicyError: a value is NaN or infinite; the message names key, batch row, time step and element.
        """
        first = 0
        for key in self.keys:
            array = observation[key.name]
            if key.picture is None and not np.isfinite(array).all():
                index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
                row, step, *element = index
                raise PolicyError(
                    f"observation {key.name!r} is {array[tuple(index)]} at element {tuple(element)} of history step "
                    f"{step}, batch row {row}; expected finite {key.units}"
                )
            out[:, :, first : first + key.size] = key.flat(array)
            first += key.size
