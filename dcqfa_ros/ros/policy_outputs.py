"""A policy's actions on their way to the arm: the chunk message of each action space, and how long they took."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.bundle.schema import ActionSpace, ActionSpec
from dcqfa_ros.ros.arm_messages import WORLD, gripper_chunk_message, twist_chunk_message
from dcqfa_ros.ros.chunk_template import ChunkTemplate
from dcqfa_ros.ros.conversions import at_monotonic, planar_chunk_message
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.histogram import Histogram
from dcqfa_ros.runtime.synchronizer import Frame

_TWIST = 6
_OPEN_FROM = 0.5  # of a binary gripper's output


class PolicyOutputs:
    """Publishes chunks of one bundle's action space, stamped with the observation they were computed from."""

    def __init__(self, node: ManagedNode) -> None:
        """Bind the node; :meth:`open` creates the publishers."""
        self._node = node
        self._action: ActionSpec | None = None
        self._chunks: Any = None
        self._grippers: Any = None
        self._lock = threading.Lock()
        self._overhead, self._since_stamp = Histogram(), Histogram()
        self._published = 0

    def check(self, bundle: Bundle) -> None:
        """Refuse a bundle whose actions no arm of this version executes.

        Raises:
            PolicyError: names the field, what it is and what was expected.
        """
        action, name = bundle.spec.action, f"bundle {bundle.spec.name!r}: action"
        if action.space is ActionSpace.PLANAR_POSITION:
            return
        if action.space is not ActionSpace.TCP_TWIST_GRIPPER:
            raise PolicyError(f"{name} space {action.space.value} has no arm in this version")
        wanted = _TWIST + (action.gripper != "none")
        if action.dim != wanted:
            raise PolicyError(
                f"{name} names has {action.dim} entries, expected {wanted}: vx, vy, vz, wx, wy, wz"
                + (", gripper" if action.gripper != "none" else "")
            )
        if action.frame != WORLD:
            raise PolicyError(f"{name} frame is {action.frame!r}, the arm takes twists in {WORLD!r}")
        if action.units[:_TWIST] != ("m/s",) * 3 + ("rad/s",) * 3:
            raise PolicyError(f"{name} units are {', '.join(action.units[:_TWIST])}, the arm takes m/s and rad/s")
        if action.mode != "absolute":
            raise PolicyError(f"{name} mode is {action.mode}; a twist is absolute")
        if action.gripper != "none" and (action.minimum[-1], action.maximum[-1]) != (0.0, 1.0):
            raise PolicyError(
                f"{name} {action.names[-1]} ranges from {action.minimum[-1]:g} to {action.maximum[-1]:g}, the gripper "
                "takes 0 (closed) to 1 (open)"
            )

    def open(self, bundle: Bundle, units_per_metre: float, period_ns: int) -> None:
        """Create the publishers of a checked bundle.

        Args:
            bundle: whose actions follow.
            units_per_metre: of a planar bundle's units (px).
            period_ns: one action lasts so long.
        """
        self._action = action = bundle.spec.action
        self._units = units_per_metre
        self._planar = ChunkTemplate(
            lambda stamp_ns, metres: planar_chunk_message(stamp_ns, action.frame, metres, period_ns, 1.0)
        )
        self._twists = ChunkTemplate(lambda stamp_ns, twists: twist_chunk_message(stamp_ns, twists, period_ns))
        self._openings = ChunkTemplate(
            lambda stamp_ns, openings: gripper_chunk_message(stamp_ns, openings[:, 0], period_ns)
        )
        self.begin()
        self._chunks = self._node.create_interface_publisher("chunk")
        self._grippers = None
        if action.space is ActionSpace.TCP_TWIST_GRIPPER and action.gripper != "none":
            self._grippers = self._node.create_interface_publisher("gripper_chunk")

    def begin(self) -> None:
        """Measure overhead anew: an episode begins."""
        with self._lock:
            self._overhead.clear()
            self._since_stamp.clear()

    def publish(self, frame: Frame, actions: NDArray[np.float32], inference_ms: float) -> None:
        """Publish actions (n, Da) in the bundle's units.

        Args:
            frame: the observation they were computed from, the newest of its history.
            actions: row 0 belongs to the observation's time.
            inference_ms: how long the engine took; what else passed since the frame could be complete is the overhead.

        Raises:
            PolicyError: no bundle is open.
        """
        action, stamp_ns = self._action, frame.stamp_ns
        if action is None:
            raise PolicyError("policy outputs are not open")
        if action.space is ActionSpace.PLANAR_POSITION:
            self._chunks.publish(self._planar.serialized(stamp_ns, actions.astype(np.float64) / self._units))
        else:
            if self._grippers is not None:
                openings = actions[:, _TWIST:]
                if action.gripper == "binary":
                    openings = (openings >= _OPEN_FROM).astype(np.float32)
                openings = np.minimum(np.maximum(openings, 0.0), 1.0)  # less code to run than np.clip
                # First, so that the arm has the opening when it begins the action.
                self._grippers.publish(self._openings.serialized(stamp_ns, openings))
            self._chunks.publish(self._twists.serialized(stamp_ns, actions[:, :_TWIST]))
        published_ns = time.monotonic_ns()
        self._published += 1
        besides_ns = at_monotonic(self._node.get_clock(), published_ns) - round(inference_ms * 1e6)
        with self._lock:
            self._overhead.add(besides_ns - frame.awaited_ns)
            self._since_stamp.add(besides_ns - stamp_ns)

    def figures(self) -> dict[str, str]:
        """Chunks published, and what passed until a chunk's publication less inference, this episode, ms.

        ``overhead`` counts from when the observation could be complete (:class:`Frame`), ``since_stamp`` from its
        stamp: of cameras that run freely, one may take its picture a little after the one that gives the stamp.
        """
        with self._lock:
            overhead, since_stamp = self._overhead.figures("overhead"), self._since_stamp.figures("since_stamp")
        return {"published": str(self._published), **overhead, **since_stamp}
