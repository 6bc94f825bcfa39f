"""Only what was used last is kept."""

from __future__ import annotations

from dcqfa_ros.runtime.recent import Recent


def test_what_was_not_used_for_longest_goes() -> None:
    recent: Recent[int, str] = Recent(2)
    assert recent.put(1, "one") is None
    assert recent.put(2, "two") is None
    assert recent.get(1) == "one"  # used now, so it stays
    assert recent.put(3, "three") == "two"
    assert recent.get(2) is None
    assert list(recent) == ["one", "three"]


def test_replacing_a_value_lets_no_other_go() -> None:
    recent: Recent[str, int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.put("a", 3) is None
    assert (recent.get("a"), recent.get("b"), len(recent)) == (3, 2, 2)
    recent.clear()
    assert (recent.get("a"), len(recent)) == (None, 0)
