"""Writing some variants of a bundle beside others that stay as they are, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.bundle.schema import BundleSpec
from training.export.variant import ExportError

MEANING = ("backbone", "architecture", "observations", "action", "diffusion")


def check_same_policy(folder: Path, there: BundleSpec, ours: BundleSpec, path: Path) -> None:
    """Refuse a bundle whose observations, actions or sampler are not those of the checkpoint ``path``.

    Raises:
        ExportError: they are not.
    """
    for name in MEANING:
        if getattr(there, name) != getattr(ours, name):
            raise ExportError(
                f"{folder}: its {name} is not that of {path}: the bundle is of another policy; give another "
                "--out. Nothing was written"
            )


def merged(
    kept: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]], there: Bundle
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """All variants in their order, those made in the place of their namesakes, and the files of those that stay."""
    by_name = {document["name"]: document for document in made}
    documents = [by_name.pop(document["name"], document) for document in kept] + list(by_name.values())
    names = {document["name"] for document in made}
    files = {
        spec.path: there.read(variant.name, role)
        for variant in there.spec.variants
        if variant.name not in names
        for role, spec in variant.files.items()
    }
    return documents, files
