"""Atomic checkpoints: a kill or a full disk while writing never damages the previous one."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from dcqfa_ros.atomic import replacing
from dcqfa_ros.errors import UserError

FORMAT = 1
CHECKPOINT = "checkpoint.pt"  # the one checkpoint file of a run folder
BASELINE = "baseline"  # entry of checkpoints that hold a quantized policy in place of a trained one


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not belong to this run; the message names the file."""


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` to ``path`` through a temporary file in the same folder, fsync and rename.

    Raises:
        CheckpointError: the disk refuses; the previous file is untouched.
    """
    file: _Writer | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as whole:
            file = _Writer(whole)
            torch.save({"format": FORMAT, **payload}, cast(BinaryIO, file))
    except (OSError, RuntimeError) as error:
        refusal = None if file is None else file.refusal
        cause = error if isinstance(error, OSError) else refusal
        if cause is None:
            raise
        raise _unwritable(path, payload, cause) from cause


class _Writer:
    """A file that keeps what the disk refuses: torch may report that as an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.refusal: OSError | None = None
        self._file = file

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _unwritable(path: Path, payload: dict[str, Any], cause: OSError) -> CheckpointError:
    kept = "the previous file is untouched; " if path.exists() else ""
    advice = f"let {path.parent} be written to"
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = f"free {max(1, math.ceil(_size(payload) / 1e6))} MB"
    return CheckpointError(
        f"{path}: cannot be written ({cause.strerror or cause}); {kept}{advice} and run the same command again"
    )


def _size(value: Any) -> int:
    """Bytes of all tensors in a nested document."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_size(part) for part in value.values())
    return sum(_size(part) for part in value) if isinstance(value, (list, tuple)) else 0


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that kills while writing files of these names left; nobody else may be writing."""
    for name in names:
        for file in folder.glob(f".{name}.????????"):  # as replacing() calls them
            with suppress(OSError):
                file.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    advice = "restore a copy of it, or remove it and train again, or give another folder"
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); let it be read") from error
    except Exception as error:  # torch raises many unrelated types for damaged files
        reason = str(error).partition("\n")[0].rstrip(".") if path.is_dir() or path.stat().st_size else "it is empty"
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); {advice}") from error
    have = payload.get("format") if isinstance(payload, dict) else None
    if have != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {have}, expected {FORMAT}; train again with this version, into another folder"
        )
    return payload
