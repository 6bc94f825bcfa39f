"""Files that are replaced in one step: whoever reads one, also after a crash, finds the old bytes or the new, whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once the block has ended well and its bytes are on the disk.

    It is made in the same folder, which must exist, as ``.NAME.`` and eight characters; only a kill leaves it behind.

    Args:
        path: what is replaced; links are replaced themselves.
        mode: permissions of the new file.

    Raises:
        OSError: the disk refuses; ``path`` is untouched.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    staging = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staging.chmod(mode)  # mkstemp makes private files
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace the contents of ``path`` by ``data``; as :func:`replacing`."""
    with replacing(path, mode) as file:
        file.write(data)
