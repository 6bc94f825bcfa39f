"""Results that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from dcqfa_ros.atomic import replace_file
from dcqfa_ros.errors import UserError


class WriteError(UserError):
    """A file that cannot be written; the message names it and the reason."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the contents of ``path`` in one step; its folder is made.

    Raises:
        WriteError: the disk refuses; the old file is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror}); the previous file is untouched") from error
