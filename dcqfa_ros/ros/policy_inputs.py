"""A policy's observations: which topic feeds which key of the bundle, and their way into the synchroniser.

Pictures are received as serialized bytes (``raw=True``) and stay there: the synchroniser holds views of them, and a
chunk copies those it needs into the memory of the engine's worker.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.bundle.schema import DepthObservation, ObservationSpec
from dcqfa_ros.ros.conversions import MessageError, from_time, observation_array
from dcqfa_ros.ros.image_memory import keep_picture_memory
from dcqfa_ros.ros.images import ImageError, decode_image
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.key_samples import PICTURES
from dcqfa_ros.runtime.observations import ObservationLayout
from dcqfa_ros.runtime.synchronizer import ObservationSynchronizer

_DEPTH_UNIT_M = 0.001  # of the interface ``depth``: 16UC1, mm
_TYPES = {  # what an interface may feed
    "color": ("image",),
    "depth": ("depth",),
    "wrench": ("wrench", "low_dim"),
    "wrench_raw": ("wrench", "low_dim"),
    "tool_wrench": ("wrench", "low_dim"),
}
_WAITING = 5  # samples of a key that may wait for this node in real time: what is late must not delay what is new
_ENCODINGS = {"image": "rgb8", "depth": "16UC1"}


class PolicyInputs:
    """Parameters and subscriptions of a policy's observations."""

    def __init__(self, node: ManagedNode, refuse: Callable[[str], None]) -> None:
        """Declare the parameters on ``node``; ``refuse`` is told why an observation cannot be used."""
        self._node, self._refuse = node, refuse
        add = node.add_parameter
        add(
            "sync_tolerance_ms",
            [""],
            "observation key = how far its stamp may lie from the frame's, ms; others: by the key's rate",
            read_only=True,
        )
        add(
            "observation_sources",
            ["keypoints=keypoints", "agent_position=tcp_pose"],
            "observation key = interface key (docs/interfaces.md), for cameras with the camera: rgb=color:front",
            read_only=True,
        )
        self._sources: dict[str, tuple[str, dict[str, str]]] = {}
        self._tolerances: dict[str, int] = {}
        self.observations: ObservationSynchronizer | None = None
        self.pictures: dict[str, int] = {}  # received per key

    def check(self, bundle: Bundle) -> None:
        """Bind every key of ``bundle`` to an interface.

        Raises:
            PolicyError: a key has no source, or one that does not exist or cannot be read.
        """
        ObservationLayout(bundle.spec)  # refuses what no engine could be fed
        pairs = [str(entry).partition("=") for entry in self._node.parameter("observation_sources")]
        given = {key.strip(): source.strip() for key, _, source in pairs}
        self._sources = {}
        for key, spec in bundle.spec.observations.items():
            if key not in given:
                raise PolicyError(
                    f"bundle {bundle.spec.name!r} needs observation {key!r}: "
                    "name its topic in parameter observation_sources"
                )
            try:
                self._sources[key] = _source(spec, given[key])
            except PolicyError as error:
                raise PolicyError(f"parameter observation_sources, key {key!r}: {error}") from error
        self._tolerances = self._given_tolerances(set(bundle.spec.observations))

    def _given_tolerances(self, keys: set[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in filter(None, map(str, self._node.parameter("sync_tolerance_ms"))):
            key, _, text = (part.strip() for part in entry.partition("="))
            try:
                tolerance_ms = float(text)
            except ValueError:
                tolerance_ms = float("nan")
            if key not in keys or not 0.0 <= tolerance_ms <= 60_000.0:
                raise PolicyError(
                    f"parameter sync_tolerance_ms: expected KEY=MS with a key of {', '.join(sorted(keys))} and 0 to "
                    f"60000 ms, got {entry!r}"
                )
            found[key] = round(tolerance_ms * 1e6)
        return found

    def open(self, bundle: Bundle, units_per_metre: float) -> ObservationSynchronizer:
        """Make the synchroniser of ``bundle``'s keys; :meth:`subscribe` fills it."""
        self._units = units_per_metre
        step_ns = round(1e9 / bundle.spec.action.rate_hz)
        specs = bundle.spec.observations
        if any(spec.type in PICTURES for spec in specs.values()):
            keep_picture_memory()
        self.observations = ObservationSynchronizer(specs, self._tolerances, step_ns)
        self.pictures = {key: 0 for key, spec in specs.items() if spec.type in PICTURES}
        return self.observations

    def subscribe(self) -> None:
        """Subscribe to the source of every key."""
        for key, (source, fields) in self._sources.items():
            take = self._on_picture if key in self.pictures else self._on_observation
            heard = functools.partial(take, key)
            raw, newest = key in self.pictures, self._waiting(key)
            self._node.create_guarded_subscription(source, heard, raw=raw, newest=newest, **fields)

    def _waiting(self, key: str) -> int | None:
        """How many samples may wait; None where every one counts: in lockstep, and those of a window."""
        spec = None if self.observations is None else self.observations.specs[key]
        lockstep = self._node.parameter("rate") == "max"
        return None if lockstep or spec is None or spec.type == "wrench" else _WAITING

    def close(self) -> None:
        """Take nothing more in."""
        self.observations = None

    def figures(self) -> dict[str, str]:
        """Pictures received, the reference key, tolerances, and what keeps the newest stamp from becoming a frame."""
        observations = self.observations
        if observations is None:
            return {}
        return {
            "reference": observations.reference,
            **{f"pictures.{key}": str(count) for key, count in self.pictures.items()},
            **{f"tolerance_ms.{key}": f"{ns / 1e6:g}" for key, ns in observations.tolerances_ns.items()},
            "waiting_for": observations.missing(),
        }

    def _on_observation(self, key: str, message: Any) -> None:
        observations, now = self.observations, time.monotonic_ns()
        if observations is None:
            return
        spec = observations.specs[key]
        scale = self._units if spec.units == "px" else 1.0
        shape = spec.shape[1:] if spec.type == "wrench" else spec.shape
        try:
            value = observation_array(message, shape, scale)
            observations.add(key, from_time(message.header.stamp), value, now)
        except (MessageError, PolicyError) as error:
            self._refuse(f"observation {key!r}: {error}" if isinstance(error, MessageError) else str(error))

    def _on_picture(self, key: str, data: bytes) -> None:
        observations, now = self.observations, time.monotonic_ns()
        if observations is None:
            return
        try:
            view = decode_image(data)
            wanted = _ENCODINGS[observations.specs[key].type]
            if view.encoding != wanted:
                raise PolicyError(f"observation {key!r} is encoded as {view.encoding}, expected {wanted}")
            observations.add(key, view.stamp_ns, _native(view.array), now)
            self.pictures[key] += 1
        except (ImageError, PolicyError) as error:
            self._refuse(f"observation {key!r}: {error}" if isinstance(error, ImageError) else str(error))


def _native(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array in this computer's byte order: a publisher of the other one costs a copy."""
    return array if array.dtype.isnative else array.astype(np.dtype(array.dtype.name))


def _source(spec: ObservationSpec, text: str) -> tuple[str, dict[str, str]]:
    """Read ``INTERFACE`` or ``INTERFACE:CAMERA``."""
    name, _, camera = text.partition(":")
    try:
        entry = interface(name)
        entry.resolve(**({"camera": camera} if camera else {}))
    except KeyError as error:
        if str(error.args[0]) == "camera":
            raise PolicyError(f"{name!r} is of one camera: write {name}:front, for example") from error
        raise PolicyError(str(error.args[0])) from error
    if camera and "{camera}" not in entry.name:
        raise PolicyError(f"{name!r} is not of a camera: leave out ':{camera}'")
    allowed = _TYPES.get(name, ("low_dim",))
    if spec.type not in allowed:
        raise PolicyError(f"it is of type {spec.type}, {name!r} feeds {' or '.join(allowed)}")
    if isinstance(spec, DepthObservation) and abs(spec.depth_scale - _DEPTH_UNIT_M) > 1e-9:
        raise PolicyError(f"its depth_scale is {spec.depth_scale:g} m, cameras publish {_DEPTH_UNIT_M:g} m (16UC1, mm)")
    return name, {"camera": camera} if camera else {}
