"""Errors of the runtime. All are shown to users as one line, without a traceback."""

from __future__ import annotations

from dcqfa_ros.errors import UserError


class PolicyError(UserError):
    """A policy cannot give actions: bad observation, bad request, or output that must not be executed."""


class NoVariantError(PolicyError):
    """No variant is loaded, for the time being or for good: there is nothing to compute with."""


class EngineError(PolicyError):
    """An engine cannot load or run its files; the message names the file and what was expected."""


class LoweringError(EngineError):
    """A canonical ONNX graph holds something that the lowering cannot carry over without changing its result."""


class WorkerDiedError(PolicyError):
    """The engine worker process ended or stopped answering; the message names the exit code or signal.

    Attributes:
        returncode: exit status as in ``subprocess.Popen.returncode`` (negative: the signal's number).
    """

    def __init__(self, message: str, returncode: int | None) -> None:
        """Hold the message for the user and the exit status."""
        super().__init__(message)
        self.returncode = returncode


def first_line(error: BaseException) -> str:
    """First line of what an exception says, its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
