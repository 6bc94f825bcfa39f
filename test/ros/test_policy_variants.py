"""The wish for a variant, what is asked for because of it, and where the parameter goes when it cannot be fulfilled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.ros import policy_variants as module
from dcqfa_ros.ros.conversions import status_message
from dcqfa_ros.ros.policy_variants import VariantControl
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.swaps import Outcome, SwapResult
from dcqfa_ros.runtime.variant_targets import Target, Targets
from test.runtime.conftest import tiny_spec


class Node:
    """What :class:`VariantControl` asks of its node; what is posted runs when :meth:`drain` is called."""

    def __init__(self, **parameters: Any) -> None:
        self.values = parameters
        self.events: list[tuple[int, str]] = []
        self.timers: list[Callable[[], None]] = []
        self.posted: list[Callable[[], None]] = []
        self.rules: dict[str, Any] = {}

    def add_parameter(self, name: str, default: Any, *_: Any, **__: Any) -> None:
        self.values.setdefault(name, default)

    def on_parameter(self, name: str, validate: Any, apply: Any) -> None:
        self.rules[name] = validate, apply

    def parameter(self, name: str) -> Any:
        return self.values[name]

    def event(self, level: int, text: str, **_: Any) -> None:
        self.events.append((level, text))

    def post(self, work: Callable[[], None]) -> None:
        self.posted.append(work)

    def drain(self) -> None:
        while self.posted:
            self.posted.pop(0)()

    def create_guarded_timer(self, _: float, callback: Callable[[], None]) -> Any:
        self.timers.append(callback)
        return type("Timer", (), {"cancel": lambda self: None})()

    def restore_parameter(self, name: str, value: Any) -> None:
        self.values[name] = value

    def set(self, value: str) -> str | None:
        validate, apply = self.rules["variant"]
        refused: str | None = validate(value)
        if refused is None:
            apply(value)
            self.values["variant"] = value
        return refused


class Host:
    """A host whose exchanges end when the test says so."""

    def __init__(self, bundle: Any, _threads: int, on_swap: Any, *_: Any) -> None:
        self.targets, self.on_swap = Targets(bundle), on_swap
        self.active = self.engine = ""
        self.closed = False
        self.requests: list[tuple[int, Target]] = []
        self._numbers = itertools.count(1)

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    @property
    def asked(self) -> list[str]:
        return [target.engine for _, target in self.requests]

    def request(self, variant: str, runtime: str) -> int:
        assert not self.closed
        number = next(self._numbers)
        self.requests.append((number, self.targets.resolve(variant, runtime)))
        return number

    def end(self, outcome: Outcome = Outcome.SWITCHED) -> None:
        """End the oldest exchange."""
        number, target = self.requests.pop(0)
        ok = outcome is Outcome.SWITCHED
        if ok:
            self.active, self.engine = target.label, target.engine
        self.on_swap(
            SwapResult(number, target.label, self.active, ok, "" if ok else "broken", 1.0, target.runtime, self.engine,
                       outcome=outcome)
        )  # fmt: skip

    def reopen(self) -> None:
        self.closed = False

    def abort(self) -> None:
        self.closed, self.active, self.engine = True, "", ""

    def close(self) -> None:
        self.abort()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(module, "VariantHost", Host)
    write_bundle(tmp_path / "tiny", *tiny_spec())
    bundle = load_bundle(tmp_path / "tiny")

    def make(variant: str, suits: Callable[[Target], str | None] = lambda _: None) -> tuple[Node, VariantControl, Host]:
        node = Node(variant=variant)
        control = VariantControl(node, lambda: None, suits)  # type: ignore[arg-type]
        host: Any = control.open(bundle)
        control.load_pinned()
        control.start()
        return node, control, host

    return make


def choice(variant: str, ranking: str) -> Any:
    return status_message(0, "selector", 0, "chosen", {"variant": variant, "ranking": ranking})


def test_a_wish_that_fails_goes_back_to_the_last_one_that_was_fulfilled(make):
    node, _, host = make("fp32")
    host.end()
    node.drain()
    assert node.set("w8a8") is None and host.asked == ["onnxruntime/w8a8"]
    host.end(Outcome.FAILED)
    node.drain()
    assert node.values["variant"] == "fp32" and host.asked == []
    assert node.set("w8a8") is None and host.asked == ["onnxruntime/w8a8"], "it may be tried again"


def test_the_outcome_of_an_older_exchange_of_the_same_variant_changes_nothing(make):
    node, _, host = make("fp32")
    host.end()
    node.drain()
    for variant in ("w8a8", "fp32", "w8a8"):
        assert node.set(variant) is None
    host.end(Outcome.FAILED)
    node.drain()
    assert node.values["variant"] == "w8a8" and host.asked == ["onnxruntime/fp32", "onnxruntime/w8a8"]


def test_a_variant_that_came_to_run_after_its_forerunner_died_counts_as_fulfilled(make):
    node, _, host = make("fp32")
    host.end()
    node.drain()
    node.set("w8a8")
    host.active = host.engine = ""  # died
    host.end()
    node.drain()
    node.set("fp32")
    host.end(Outcome.FAILED)
    node.drain()
    assert node.values["variant"] == "w8a8"


def test_the_last_words_of_a_closed_host_do_not_touch_what_its_successor_loads(make):
    node, control, host = make("fp32")
    bundle = host.targets.bundle
    host.end(Outcome.FAILED)
    control.close()
    successor: Any = control.open(bundle)
    control.load_pinned()
    node.drain()
    successor.end()
    node.drain()
    node.set("w8a8")
    successor.end(Outcome.FAILED)
    node.drain()
    assert node.values["variant"] == "fp32" and successor.asked == []


def test_a_wish_while_the_workers_are_killed_is_taken_and_loaded_at_the_next_start(make):
    node, control, host = make("fp32")
    host.end()
    node.drain()
    control.abort()
    assert node.set("w8a8") is None and host.asked == []
    control.on_choice(choice("fp32", "onnxruntime/fp32"))
    control.start()
    assert host.asked == ["onnxruntime/w8a8"]


def test_without_a_choice_the_default_is_used_or_the_first_that_suits(make):
    node, _, host = make("auto")
    node.timers[-1]()
    assert host.asked == ["onnxruntime/fp32"]
    node, _, host = make("auto", lambda target: "cannot do it" if target.variant == "fp32" else None)
    node.timers[-1]()
    assert host.asked == ["onnxruntime/w8a8"] and "cannot do it" in node.events[-1][1]
    node, _, host = make("auto", lambda _: "cannot do it")
    node.timers[-1]()
    assert host.asked == [] and node.events[-1] == (2, "no variant is loaded: cannot do it; set chunking or variant")


def test_what_does_not_suit_is_refused_at_once_and_skipped_in_the_ranking(make):
    node, control, host = make("auto", lambda target: "cannot do it" if target.runtime == "openvino" else None)
    control.on_choice(choice("w8a8", "onnxruntime/w8a8,openvino/w8a8,onnxruntime/fp32"))
    host.end(Outcome.FAILED)
    node.drain()
    assert host.asked == ["onnxruntime/fp32"]
    assert any(text == "openvino/w8a8 cannot be tried: cannot do it" for _, text in node.events)
    node, _, host = make("fp32", lambda target: "cannot do it" if target.variant == "w8a8" else None)
    assert node.set("w8a8") == "cannot do it" and host.asked == ["onnxruntime/fp32"]


def test_a_request_that_another_purpose_displaced_is_made_again(make):
    node, _, host = make("fp32")
    host.end()
    node.drain()
    node.set("w8a8")
    host.end(Outcome.SUPERSEDED)
    node.drain()
    assert host.asked == ["onnxruntime/w8a8"]


def test_a_pinned_variant_that_does_not_suit_is_refused_when_the_node_is_set_up(make):
    with pytest.raises(PolicyError, match="cannot do it"):
        make("fp32", lambda _: "cannot do it")
