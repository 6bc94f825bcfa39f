"""Bring-up of an Inovo arm: from switched off to drives enabled, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dcqfa_ros.drivers import inovo_messages as m
from dcqfa_ros.drivers.arm_protocol import ArmReadiness
from dcqfa_ros.drivers.inovo_state import InovoState
from dcqfa_ros.drivers.protocols import DriverError
from dcqfa_ros.drivers.rosbridge import LinkError, RosbridgeClient, ServiceError


def bring_up(
    client: RosbridgeClient, state: InovoState, gripper: str, *, power_timeout_s: float, enable_timeout_s: float
) -> None:
    """Reset what may be reset, switch power and drives on and activate the gripper; what is on already is left alone.

    Raises:
        DriverError: a step was refused or timed out; it names the step and what to do.
    """

    def known(topic: str) -> dict[str, Any]:
        values = state.values(topic)
        if not values:
            raise DriverError(f"{client.name}: the connection was lost while waiting for {topic}")
        return values

    def step(service: str, reached: Callable[[], object], timeout_s: float, otherwise: str) -> None:
        try:
            check_success(client.name, service, client.call_service(service, timeout_s=max(timeout_s, 2.0)))
            wait_for(client, reached, timeout_s, lambda: f"not reached within {timeout_s:g} s: {state.readiness()[1]}")
        except DriverError as error:
            raise DriverError(f"{client.name}: bring-up: {service}: {error}; {otherwise}") from None

    def is_active(topic: str) -> Callable[[], bool]:
        return lambda: bool(known(topic)["active"])

    if known(m.PSU_STATUS)["fault_code"]:
        step(
            m.RESET_FAULT, lambda: not known(m.PSU_STATUS)["fault_code"], 2.0,
            "the fault remains: see the controller's user interface",
        )  # fmt: skip
    for topic, service, device in (
        (m.SAFE_STOP_STATE, m.SAFE_STOP_RESET, "safe stop"),
        (m.ESTOP_STATE, m.ESTOP_RESET, "emergency stop"),
    ):
        circuit = known(topic)
        if circuit["active"]:
            continue
        if not circuit["circuit_complete"]:
            raise DriverError(
                f"{client.name}: bring-up: the {device} circuit is open ({topic}: circuit_complete is false): "
                "release the button or close the circuit, then try again"
            )
        step(service, is_active(topic), 2.0, f"release the {device}, then try again")
    if known(m.PSU_STATUS)["state"] != m.BUS_ON:
        step(
            m.PSU_ENABLE, lambda: known(m.PSU_STATUS)["state"] == m.BUS_ON, power_timeout_s,
            f"{m.PSU_STATUS} never said {m.BUS_ON}: see the controller's user interface",
        )  # fmt: skip
    if state.readiness()[0] is not ArmReadiness.READY:
        step(
            m.ROBOT_ENABLE, lambda: state.readiness()[0] is ArmReadiness.READY, enable_timeout_s,
            "the drives did not come on",
        )  # fmt: skip
    if gripper and not state.gripper.get("activated"):
        step(
            m.gripper_topic(gripper, "activate"), lambda: state.gripper.get("activated"), enable_timeout_s,
            f"gripper {gripper!r} did not activate",
        )  # fmt: skip


def check_success(name: str, step: str, values: m.Message) -> None:
    """Refuse the response of a service that says it did not succeed.

    Raises:
        ServiceError: it says so; with its reason.
    """
    if values.get("success") is False:
        raise ServiceError(f"{name}: {step} was refused: {values.get('message') or 'no reason given'}")


def wait_for(
    client: RosbridgeClient, reached: Callable[[], object], timeout_s: float, otherwise: Callable[[], str]
) -> None:
    """Wait until ``reached`` is true.

    Raises:
        DriverError: it is not within ``timeout_s`` seconds, with the words of ``otherwise``.
        LinkError: the connection was lost.
    """
    deadline = time.monotonic() + timeout_s
    while not reached():
        if not client.is_connected:
            raise LinkError(f"{client.name}: the connection was lost: {client.loss_reason}")
        if time.monotonic() > deadline:
            raise DriverError(f"{client.name}: {otherwise()}")
        time.sleep(0.01)
