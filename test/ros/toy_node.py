"""A node to test the base class with: its parameters make it fail in every way a real one could."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from dcqfa_ros.ros.diagnostics import Status
from dcqfa_ros.ros.node import ManagedNode, Refused, run_node


class ToyNode(ManagedNode):
    """Reports every hook it runs in its status; parameters choose where it fails."""

    NODE_NAME = "toy_node"

    def declare(self) -> None:
        """Declare where to fail."""
        self.add_parameter("fail_in", "", "hook that raises", choices=("", "setup", "start", "stop", "teardown"))
        self.add_parameter("setup_s", 0.0, "seconds setup takes", minimum=0.0)
        self.add_parameter("number", 1, "any number", minimum=0, maximum=10)
        self.add_parameter("word", "a", "raises when set to 'raise', refuses 'no'")
        self.on_parameter("word", self._check_word, self._take_word)
        self.history: list[str] = []

    def _check_word(self, word: str) -> str | None:
        if word == "raise":
            raise RuntimeError("validator broke")
        return "the word is no" if word == "no" else None

    def _take_word(self, word: str) -> None:
        if word == "late":
            raise RuntimeError("apply broke")
        self.history.append(f"word {word}")

    def _hook(self, name: str) -> None:
        self.history.append(name)
        if self.parameter("fail_in") == name:
            raise RuntimeError(f"{name} broke")

    def setup(self) -> None:
        """Serve the trial_start service and listen to the arm's key points."""
        self.create_guarded_service("trial_start", self._serve)
        self.create_guarded_subscription("active_variant", self._obey)
        time.sleep(self.parameter("setup_s"))
        self._hook("setup")

    def start(self) -> None:
        """Begin."""
        self._hook("start")

    def stop(self, reason: str) -> None:
        """Note the reason."""
        self._hook("stop")
        self.history.append(reason)

    def teardown(self) -> None:
        """End."""
        self._hook("teardown")

    def status(self) -> Sequence[Status]:
        """Report the history."""
        return [Status(0, "history", "ok", {"history": ",".join(self.history)})]

    def _serve(self, request: Any, response: Any) -> Any:
        if not self.is_active:
            raise Refused("not active")
        response.success, response.message = True, "done"
        return response

    def _obey(self, message: Any) -> None:
        if message.data == "thread":
            threading.Thread(target=self.fault, args=("a thread gave up",)).start()
        elif message.data == "finish":
            self.finish("told to finish", exit_code=5)
        else:
            raise RuntimeError(f"callback broke on {message.data}")


if __name__ == "__main__":
    sys.exit(run_node(ToyNode))
