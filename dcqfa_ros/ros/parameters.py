"""Rules for parameters that change while a node runs: a rule that fails refuses the value and never ends the node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.parameter import Parameter

Validate = Callable[[Any], "str | None"]
Apply = Callable[[Any], None]


@dataclass(frozen=True)
class _Rule:
    validate: Validate | None
    apply: Apply | None


class ParameterRules:
    """The one set-parameters callback of a node, built from rules per parameter.

    rclpy lets an exception out of such a callback end the process; here it becomes a refusal with its text as reason.
    Humble has only ``add_on_set_parameters_callback``, so values are applied from it, before rclpy stores them.
    """

    def __init__(self, current: Callable[[str], Any], report: Callable[[str, Exception], None]) -> None:
        """``current`` gives a parameter's stored value; ``report`` is told of a rule that raised."""
        self._current = current
        self._report = report
        self._rules: dict[str, _Rule] = {}
        self._bypassed = False

    def add(self, name: str, validate: Validate | None, apply: Apply | None) -> None:
        """Add the rule for ``name``; see :meth:`ManagedNode.on_parameter`.

        Raises:
            ValueError: the parameter has a rule already.
        """
        if name in self._rules:
            raise ValueError(f"parameter {name!r} has a rule already")
        self._rules[name] = _Rule(validate, apply)

    def remove(self, name: str) -> None:
        """Remove the rule for ``name``, if there is one."""
        self._rules.pop(name, None)

    def bypass(self, write: Callable[[], object]) -> None:
        """Run ``write`` with the rules off: for a node that restores one of its own parameters."""
        self._bypassed = True
        try:
            write()
        finally:
            self._bypassed = False

    def __call__(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        """Check every value first, then apply them; undo the applied ones when a later one fails."""
        if self._bypassed:
            return SetParametersResult(successful=True)
        for p in parameters:
            refusal = self._refusal(p.name, p.value)
            if refusal is not None:
                return SetParametersResult(successful=False, reason=f"{p.name}: {refusal}")
        applied: list[Parameter] = []
        for p in parameters:
            rule = self._rules.get(p.name)
            if rule is None or rule.apply is None:
                continue
            try:
                rule.apply(p.value)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the node
                self._report(p.name, error)
                self._undo(applied)
                return SetParametersResult(successful=False, reason=f"{p.name}: {_text(error)}")
            applied.append(p)
        return SetParametersResult(successful=True)

    def _refusal(self, name: str, value: Any) -> str | None:
        rule = self._rules.get(name)
        if rule is None or rule.validate is None:
            return None
        try:
            return rule.validate(value)
        except Exception as error:  # noqa: BLE001 - see above
            self._report(name, error)
            return _text(error)

    def _undo(self, applied: Sequence[Parameter]) -> None:
        for p in reversed(applied):
            apply = self._rules[p.name].apply
            try:
                if apply is not None:
                    apply(self._current(p.name))
            except Exception as error:  # noqa: BLE001 - see above
                self._report(p.name, error)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
