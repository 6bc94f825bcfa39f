"""Nodes of one process on an executor that turns only while a test waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor

TIMEOUT_S = 30.0  # workers start on a busy machine


class Spinning:
    """An executor and how to wait on it."""

    def __init__(self, context: Context) -> None:
        self.context, self.executor = context, SingleThreadedExecutor(context=context)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Turn until ``condition`` holds; returns whether it did in time."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > end:
                return False
            self.executor.spin_once(timeout_sec=0.005)
        return True
