"""A policy's observations: which topic feeds which key of the bundle, and their way into the synchroniser."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.ros.conversions import MessageError, from_time, observation_array
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.synchronizer import ObservationSynchronizer


class PolicyInputs:
    """Parameters and subscriptions of a policy's observations."""

    def __init__(self, node: ManagedNode, refuse: Callable[[str], None]) -> None:
        """Declare the parameters on ``node``; ``refuse`` is told why an observation cannot be used."""
        self._node, self._refuse = node, refuse
        add = node.add_parameter
        add("sync_tolerance_ms", 0.0, "stamps of one time step may differ by this, ms", minimum=0.0, read_only=True)
        add(
            "observation_sources",
            ["keypoints=keypoints", "agent_position=tcp_pose"],
            "observation key = interface key (docs/interfaces.md)",
            read_only=True,
        )
        self._sources: dict[str, str] = {}
        self.observations: ObservationSynchronizer | None = None

    def check(self, bundle: Bundle) -> None:
        """Bind every key of ``bundle`` to an interface.

        Raises:
            PolicyError: a key has no source, or one that does not exist or cannot be read.
        """
        pairs = [str(entry).partition("=") for entry in self._node.parameter("observation_sources")]
        given = {key.strip(): source.strip() for key, _, source in pairs}
        for key, spec in bundle.spec.observations.items():
            if key not in given:
                raise PolicyError(
                    f"bundle {bundle.spec.name!r} needs observation {key!r}: "
                    "name its topic in parameter observation_sources"
                )
            if spec.type != "low_dim":
                raise PolicyError(
                    f"observation {key!r} is of type {spec.type}; this version reads low_dim observations"
                )
            try:
                interface(given[key])
            except KeyError as error:
                raise PolicyError(f"parameter observation_sources, key {key!r}: {error.args[0]}") from error
        self._sources = {key: given[key] for key in bundle.spec.observations}

    def open(self, bundle: Bundle, units_per_metre: float) -> ObservationSynchronizer:
        """Make the synchroniser of ``bundle``'s keys; :meth:`subscribe` fills it."""
        tolerance_ns = round(float(self._node.parameter("sync_tolerance_ms")) * 1e6)
        self._units = units_per_metre
        self.observations = ObservationSynchronizer(bundle.spec.observations, tolerance_ns)
        return self.observations

    def subscribe(self) -> None:
        """Subscribe to the source of every key."""
        for key, source in self._sources.items():
            self._node.create_guarded_subscription(source, functools.partial(self._on_observation, key))

    def close(self) -> None:
        """Take nothing more in."""
        self.observations = None

    def _on_observation(self, key: str, message: Any) -> None:
        observations, now = self.observations, time.monotonic_ns()
        if observations is None:
            return
        spec = observations.specs[key]
        scale = self._units if spec.units == "px" else 1.0
        try:
            value = observation_array(message, spec.shape, scale)
            observations.add(key, from_time(message.header.stamp), value, now)
        except (MessageError, PolicyError) as error:
            self._refuse(str(error))
