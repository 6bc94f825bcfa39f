"""One process at a time in a folder of results."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcqfa_ros.errors import UserError


@contextmanager
def only_user(folder: Path, what: str, error: type[UserError]) -> Iterator[None]:
    """Keep other processes out of a folder, which is made where it is missing.

    Args:
        folder: what is locked, by a file ``.lock`` in it.
        what: what uses it, for the message: ``comparison``.
        error: raised where another process is in it, or where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as cause:
        raise error(f"{folder}: cannot be written ({cause.strerror}); give another --out") from cause
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"{folder}: another {what} is using it; wait for its end, or give another --out") from None
        yield
