"""Limits, command lease and deadman: pure functions and small state machines, the last stage before the arm."""
