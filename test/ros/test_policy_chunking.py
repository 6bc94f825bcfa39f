"""Parameter ``chunking`` and what the running worker has loaded for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dcqfa_ros.ros.policy_chunking import PolicyChunking
from dcqfa_ros.runtime.chunking import Method
from test.runtime.conftest import tiny_spec


class Node:
    """The part of a node that the parameters use."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"runtime": "auto", "variant": "fp32"}
        self.rules: dict[str, tuple[Any, Any]] = {}
        self.events: list[str] = []
        self.posted: list[Callable[[], None]] = []

    def add_parameter(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        self.values[name] = value

    def on_parameter(self, name: str, validate: Any, apply: Any = None) -> None:
        self.rules[name] = validate, apply

    def parameter(self, name: str) -> Any:
        return self.values[name]

    def restore_parameter(self, name: str, value: Any) -> None:
        self.values[name] = value

    def event(self, level: int, text: str, **_: Any) -> None:
        self.events.append(text)

    def post(self, work: Callable[[], None]) -> None:
        self.posted.append(work)

    def set(self, name: str, value: Any) -> str | None:
        validate, apply = self.rules[name]
        reason = validate(value)
        if reason is None:
            if apply is not None:
                apply(value)
            self.values[name] = value
        while self.posted:
            self.posted.pop(0)()
        return reason


class Host:
    """A running variant whose worker was loaded for one method."""

    def __init__(self) -> None:
        self.bundle = SimpleNamespace(spec=tiny_spec()[0])
        self.target = SimpleNamespace(bundle=self.bundle, variant="fp32", label="fp32", runtime="onnxruntime")
        self.loaded = Method.SYNCHRONOUS
        self.busy = self.changing = self.closed = False
        self.requests: list[tuple[str, str]] = []

    def warm_for(self, method: Method) -> bool:
        return method is not Method.GUIDED or self.loaded is method

    def request(self, variant: str, runtime: str) -> None:
        self.requests.append((variant, runtime))
        self.busy = True


Parts = tuple[Node, Host, PolicyChunking]


@pytest.fixture
def parts() -> Parts:
    node, host = Node(), Host()
    chunking = PolicyChunking(node, lambda: host)  # type: ignore[arg-type, return-value]
    chunking.open(host.bundle)  # type: ignore[arg-type]
    return node, host, chunking


def test_guided_chunks_begin_when_the_derivative_is_loaded_and_not_before(parts: Parts) -> None:
    node, host, chunking = parts
    assert node.set("chunking", "soft") is None and not host.requests
    assert chunking.now().method is Method.SOFT
    assert node.set("chunking", "guided") is None
    assert host.requests == [("fp32", "onnxruntime")]
    chunking.settle()
    assert chunking.now().method is Method.SOFT and node.values["chunking"] == "guided"
    host.busy, host.loaded = False, Method.GUIDED
    assert chunking.now().method is Method.GUIDED
    chunking.settle()
    assert node.values["chunking"] == "guided" and not node.events


def test_the_parameter_goes_back_where_the_derivative_cannot_be_loaded(parts: Parts) -> None:
    node, host, chunking = parts
    node.set("chunking", "ensemble")
    chunking.now()
    node.set("chunking", "guided")
    assert chunking.now().method is Method.ENSEMBLE
    host.busy = False
    chunking.settle()
    assert node.values["chunking"] == "ensemble" and chunking.now().method is Method.ENSEMBLE
    assert len(node.events) == 1 and "chunking guided was not taken" in node.events[0]
    chunking.settle()
    assert len(node.events) == 1


def test_another_method_may_be_set_while_the_same_variant_is_loaded_anew_but_not_while_another_one_is(
    parts: Parts,
) -> None:
    node, host, chunking = parts
    node.set("chunking", "guided")
    assert node.set("chunking", "soft") is None and chunking.now().method is Method.SOFT
    host.changing = True
    assert "exchange of variants is under way" in str(node.set("chunking", "guided"))


@pytest.mark.parametrize("state", ["changing", "closed"])
def test_loading_anew_displaces_no_exchange_and_asks_nothing_of_killed_workers(parts: Parts, state: str) -> None:
    node, host, _ = parts
    validate, apply = node.rules["chunking"]
    assert validate("guided") is None
    apply("guided")
    node.values["chunking"] = "guided"
    setattr(host, state, True)  # between the parameter and what follows from it
    node.posted.pop(0)()
    assert host.requests == []
