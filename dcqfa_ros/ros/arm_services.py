"""Services of the node of a six-axis arm: ``~/arm``, ``~/disarm``, ``~/stop``, ``~/reset_stop``, and the stop topic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from std_srvs.srv import Trigger

from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.ros.node import ManagedNode, Refused
from dcqfa_ros.runtime.arm_executor import ArmRefusedError
from dcqfa_ros.runtime.arm_stream import ArmStream
from dcqfa_ros.safety.stops import Stop, StopCode


class ArmServices:
    """What an operator asks of an arm. It moves only after ``~/arm``, and not before a latched stop was reset."""

    def __init__(
        self,
        node: ManagedNode,
        stream: Callable[[], ArmStream],
        hindrance: Callable[[ArmStream], str],
        changed: Callable[[], None],
    ) -> None:
        """Bind the parts; :meth:`open` creates the services.

        Args:
            node: the node.
            stream: returns the control of the arm; raises ``DriverError`` while the node is not configured.
            hindrance: why the arm must not be armed now, apart from what its control knows; empty where nothing is.
            changed: publishes the arm's state.
        """
        self._node, self._stream, self._hindrance, self._changed = node, stream, hindrance, changed
        self._pressed = False  # the last message on operator_stop

    def open(self) -> None:
        """Serve and listen from now on, in ``setup()``."""
        for key, callback in (
            ("arm", self._arm),
            ("disarm", self._disarm),
            ("reset_stop", self._reset_stop),
            ("stop_service", self._stop),
        ):
            self._node.create_guarded_service(key, callback)
        self._node.create_guarded_subscription("operator_stop", self._on_operator_stop)

    def _on_operator_stop(self, message: Any) -> None:
        self._pressed = bool(message.data)
        if self._pressed:
            with contextlib.suppress(DriverError):  # not configured: there is nothing to stop
                self._stream().operator_stop("operator_stop: true")

    def _active_stream(self) -> ArmStream:
        stream = self._stream()
        if not self._node.is_active:
            raise Refused("arm_node is not active")
        return stream

    def _arm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        stream = self._active_stream()
        hindrance = self._hindrance(stream)
        if hindrance:
            raise Refused(hindrance)
        stream.ticker.count_anew()
        _refusing(stream.arm)
        self._changed()
        response.success, response.message = True, f"armed, episode {stream.episode}"
        return response

    def _disarm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        done = self._stream().disarm(Stop(StopCode.OPERATOR, "disarmed by ~/disarm"))
        response.success, response.message = True, "disarmed" if done else "was not armed"
        return response

    def _stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._stream().operator_stop("stopped by ~/stop")
        response.success, response.message = True, "stopped; call ~/reset_stop before arming again"
        return response

    def _reset_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        stream = self._active_stream()
        if self._pressed:
            raise Refused("the last message on operator_stop is true: release it first")
        stop = _refusing(stream.reset_stop)
        self._changed()
        response.success = True
        response.message = (
            "nothing was latched" if stop is None else f"{stop.code.value} was reset; the arm is disarmed"
        )
        return response


def _refusing(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (ArmRefusedError, DriverError) as error:
        raise Refused(str(error)) from error
