"""Errors whose text is meant for the user: the command line shows them in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a wrong name, file, field or value.

    Subclasses state the file, field or device, what was expected and what to do. Combine it with the built-in class
    that fits (``class ShapeError(UserError, ValueError)``), so that library callers can catch either.
    """


class ConfigNotFoundError(UserError, ValueError):
    """No configuration file of that name; the message lists where it was looked for and which names exist."""
