"""Where models and configuration lie, whichever way the package was installed.

Works without ROS: the ament index is read by hand from ``AMENT_PREFIX_PATH``. Looked up in this order: the ament
share, the share of the Python environment (``pip install``), the source tree (``pip install -e``, no install at all).
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dcqfa_ros.bundle.errors import BundleNotFoundError
from dcqfa_ros.bundle.load import BUNDLE_YAML
from dcqfa_ros.errors import ConfigNotFoundError, UserError

PACKAGE = "dcqfa_ros"
MODELS_VARIABLE = "DCQFA_MODELS"


def source_root() -> Path | None:
    """Return the root of the source tree this module runs from, None where it runs from an installed copy."""
    root = Path(__file__).parents[1]
    return root if (root / "package.xml").is_file() and (root / "setup.py").is_file() else None


def share_directory() -> Path:
    """Return the folder that holds ``config``, ``launch`` and ``models``.

    Raises:
        UserError: the package is installed without its data files.
    """
    shares = list(_shares())
    if not shares:
        raise UserError(
            f"{PACKAGE} is installed without its data files (config, launch, models): "
            "install it with pip or colcon, or run it from its source tree"
        )
    return shares[0]


def find_bundle(name_or_path: str) -> Path:
    """Return the folder of a bundle.

    A path (anything with a separator, or a folder that holds a ``bundle.yaml``) wins over a name. Names are looked for
    in the folders of ``DCQFA_MODELS`` (separated like ``PATH``), then in ``models`` of every share.

    Raises:
        BundleNotFoundError: there is none; lists where it was looked for and which names exist.
    """
    path = Path(name_or_path).expanduser()
    is_path = os.sep in name_or_path or name_or_path in ("", ".", "..")
    if name_or_path and path.is_dir() and (is_path or (path / BUNDLE_YAML).is_file()):
        return path
    folders = list(_model_folders())
    if not is_path:
        for folder in folders:
            if (folder / name_or_path).is_dir():
                return folder / name_or_path
    names = sorted({entry.parent.name for folder in folders for entry in folder.glob(f"[!.]*/{BUNDLE_YAML}")})
    known = f"bundles there are: {', '.join(names)}" if names else "no bundle was found anywhere"
    looked = ", ".join(dict.fromkeys([str(path), *(str(folder) for folder in folders)]))
    raise BundleNotFoundError(
        name_or_path, f"no such bundle; looked at {looked}; {known}; give a name, a folder, or set {MODELS_VARIABLE}"
    )


def find_config(name: str) -> Path:
    """Return a configuration file: an existing path, or a name in ``config`` (``.yaml`` may be left out).

    Raises:
        ConfigNotFoundError: there is none; lists where it was looked for and which names exist.
    """
    path = Path(name).expanduser()
    if name and path.is_file():
        return path
    folders = list(dict.fromkeys(share / "config" for share in _shares()))
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    names = sorted({str(f.relative_to(folder)) for folder in folders for f in folder.rglob("*") if f.is_file()})
    looked = ", ".join(str(entry) for entry in [path, *folders])
    raise ConfigNotFoundError(
        f"{name}: no such configuration; looked at {looked}; there is {', '.join(names) or 'none'}"
    )


def cache_directory() -> Path:
    """Return the user's cache folder of this package (engines, profiles). It may not exist yet."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / PACKAGE


def _model_folders() -> Iterator[Path]:
    """Yield the folders in which bundles are looked for by name, most specific first."""
    for entry in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep):
        if entry:
            yield Path(entry).expanduser()
    for share in _shares():
        yield share / "models"


def _shares() -> Iterator[Path]:
    """Yield every folder with this package's data files, most specific first."""
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        marker = Path(prefix, "share", "ament_index", "resource_index", "packages", PACKAGE)
        if prefix and marker.is_file():
            yield Path(prefix, "share", PACKAGE)
    prefixes = [sysconfig.get_path("data"), sys.prefix]
    if "posix_user" in sysconfig.get_scheme_names():
        prefixes.append(sysconfig.get_path("data", "posix_user"))  # pip install --user
    for prefix in dict.fromkeys(prefixes):
        share = Path(prefix, "share", PACKAGE)
        if (share / "package.xml").is_file():
            yield share
    root = source_root()
    if root is not None:
        yield root
