"""What the package ships for training, found from any folder."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from dcqfa_ros.bundle.errors import BundleNotFoundError
from dcqfa_ros.paths import find_bundle

DEFAULT_RUN = Path("runs/pusht_keypoints_supernet")
MODELS = Path("models")


def shipped_run() -> Path | None:
    """The folder of the shipped supernet; None where the package was installed without it."""
    from training.checkpoint import CHECKPOINT

    with suppress(BundleNotFoundError):
        folder = find_bundle(DEFAULT_RUN.name)
        if (folder / CHECKPOINT).is_file():
            return folder
    return None


def default_run() -> Path:
    """The supernet that commands take where no run is given: ``DEFAULT_RUN``, or the shipped one where that is missing.

    That the shipped one is taken is said on standard error. Where neither is there it is ``DEFAULT_RUN``.
    """
    from training.checkpoint import CHECKPOINT

    shipped = None if (DEFAULT_RUN / CHECKPOINT).is_file() else shipped_run()
    if shipped is None:
        return DEFAULT_RUN
    print(f"{DEFAULT_RUN}: no such run; taking the shipped supernet {shipped}", file=sys.stderr)
    return shipped


def policy_at_hand(written: str) -> Path:
    """The policy that a configuration names: as written, or for ``models/NAME`` the bundle of that name."""
    path = Path(written)
    if path.parent == MODELS and not path.exists():
        with suppress(BundleNotFoundError):
            return find_bundle(path.name)
    return path
