"""Hashes by which states are told apart."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def digest(document: Any) -> str:
    """SHA-256 of a nested document of dictionaries, sequences, tensors and plain values; order of keys matters."""
    found = hashlib.sha256()
    _add(found, document)
    return found.hexdigest()


def _add(into: hashlib._Hash, value: Any) -> None:
    if isinstance(value, Tensor):
        into.update(f"{value.dtype} {tuple(value.shape)}".encode())
        into.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        into.update(f"{len(value)} of".encode())
        for key, part in value.items():
            into.update(f"{key}:".encode())
            _add(into, part)
    elif isinstance(value, (list, tuple)):
        into.update(f"{len(value)} in".encode())
        for part in value:
            _add(into, part)
    else:
        into.update(f"{value!r};".encode())
