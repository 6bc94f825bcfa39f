"""Files that are replaced in one step: whoever reads one, also after a crash, finds the old bytes or the new, whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once the block has ended well and its bytes are on the disk.

    It is made in the same folder, which must exist, as ``.NAME.`` and eight characters; only a kill leaves it behind.

    Args:
        path: what is replaced; links are replaced themselves.
        mode: permissions of the new file, less those that the umask takes.

    Raises:
        OSError: the disk refuses; ``path`` is untouched.
    """
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = _new(staging, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace the contents of ``path`` by ``data``; as :func:`replacing`."""
    with replacing(path, mode) as file:
        file.write(data)


def _new(path: Path, mode: int) -> int:
    """Descriptor of a file that nobody had before."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
