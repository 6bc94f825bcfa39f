"""Parameter rules: all or nothing, and no exception gets out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rclpy.parameter import Parameter

from dcqfa_ros.ros.parameters import ParameterRules


class Store:
    """The parameters of a node and what has been applied of them."""

    def __init__(self, *names: str) -> None:
        self.stored: dict[str, Any] = dict.fromkeys(names, 0)
        self.applied: dict[str, Any] = dict.fromkeys(names, 0)
        self.errors: list[str] = []
        self.rules = ParameterRules(self.stored.__getitem__, lambda name, error: self.errors.append(name))
        for name in names:
            self.rules.add(name, self.validate, lambda value, name=name: self.apply(name, value))

    def validate(self, value: int) -> str | None:
        if value == 13:
            raise RuntimeError("unlucky")
        return "negative" if value < 0 else None

    def apply(self, name: str, value: int) -> None:
        if value == 99:
            raise RuntimeError("")
        self.applied[name] = value

    def set(self, **values: int) -> Any:
        result = self.rules([Parameter(k, value=v) for k, v in values.items()])
        if result.successful:
            self.stored.update(values)
        return result


@given(st.lists(st.sampled_from([1, 2, -1, 13, 99]), min_size=3, max_size=3))
def test_a_set_of_values_is_applied_whole_or_not_at_all(values: list[int]) -> None:
    store = Store("a", "b", "c")
    result = store.set(**dict(zip("abc", values, strict=True)))
    good = all(v in (1, 2) for v in values)
    assert result.successful is good
    assert list(store.applied.values()) == (values if good else [0, 0, 0])


@pytest.mark.parametrize(("value", "reason"), [(-1, "a: negative"), (13, "a: unlucky"), (99, "a: RuntimeError")])
def test_a_refusal_names_parameter_and_reason(value: int, reason: str) -> None:
    store = Store("a")
    assert store.set(a=value).reason == reason
    assert store.errors == ([] if value == -1 else ["a"])


def test_a_node_may_restore_its_own_parameter_past_the_rules() -> None:
    store = Store("a")
    store.rules.bypass(lambda: store.set(a=-1))
    assert store.stored["a"] == -1
    assert store.applied["a"] == 0
    assert not store.set(a=-1).successful


def test_a_second_rule_for_a_parameter_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="'a' has a rule already"):
        Store("a").rules.add("a", None, None)
