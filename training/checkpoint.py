"""Atomic checkpoints: a kill or a full disk while writing never damages the previous one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from dcqfa_ros.errors import UserError

FORMAT = 1
CHECKPOINT = "checkpoint.pt"  # the one checkpoint file of a run folder
BASELINE = "baseline"  # entry of checkpoints that hold a quantized policy in place of a trained one


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not belong to this run; the message names the file."""


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` to ``path`` through a temporary file in the same folder, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch raises many unrelated types for damaged files
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from error
    have = payload.get("format") if isinstance(payload, dict) else None
    if have != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {have}, expected {FORMAT}; train again with this version")
    return payload
