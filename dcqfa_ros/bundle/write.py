"""Write a bundle so that a reader finds the old one or the new one, whole, whatever interrupts the writing."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from dcqfa_ros.bundle.document import dump_document, parse_document
from dcqfa_ros.bundle.errors import BundleError
from dcqfa_ros.bundle.load import BUNDLE_SHA256, BUNDLE_YAML, listed_files
from dcqfa_ros.bundle.schema import BundleSpec, FileSpec

_FILES_FOLDER = "variants"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def file_spec(path: str, data: bytes) -> FileSpec:
    """Return the entry of ``bundle.yaml`` for a file with the contents ``data`` at ``path`` (``variants/...``)."""
    return FileSpec(path=path, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def write_bundle(folder: Path, spec: BundleSpec, files: Mapping[str, bytes]) -> None:
    """Write a bundle to ``folder``, in the place of the one that may be there.

    The new bundle is written beside the old one, flushed to disk and then exchanged with it in one step. Interrupted
    before that step, the old bundle is untouched; a killed process leaves a hidden folder ``.<name>.*`` beside it.
    Where the file system cannot exchange folders the old one is moved aside first: a crash between the two renames
    leaves both whole under hidden names and nothing under ``folder``.

    Args:
        folder: the bundle's folder. It may be missing, empty or hold a bundle; one that holds anything else is refused,
            because everything in it would be replaced.
        spec: contents of ``bundle.yaml``.
        files: contents by path, exactly the files ``spec`` lists.

    Raises:
        BundleError: ``files`` does not fit ``spec``, ``folder`` holds other things, or the disk refuses.
    """
    _check_files(folder, spec, files)
    folder = folder.resolve()
    _check_replaceable(folder)
    document = dump_document(spec)
    if parse_document(document, BundleSpec) != spec:
        raise BundleError(folder / BUNDLE_YAML, "the specification does not survive being written; it was not written")
    contents = {
        **files,
        BUNDLE_YAML: document,
        BUNDLE_SHA256: f"{hashlib.sha256(document).hexdigest()}  {BUNDLE_YAML}\n".encode(),
    }
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
            _write_tree(staging, contents)
            _put_in_place(staging, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # unfinished, or the old bundle after the exchange
    except OSError as error:
        raise BundleError(folder, f"cannot be written ({error.strerror})") from error


def _check_files(folder: Path, spec: BundleSpec, files: Mapping[str, bytes]) -> None:
    """Refuse contents that ``spec`` does not describe exactly."""
    listed: set[str] = set()
    for field, entry in listed_files(spec):
        listed.add(entry.path)
        if PurePosixPath(entry.path).parts[0] != _FILES_FOLDER:
            raise BundleError(folder / entry.path, f"expected a path below {_FILES_FOLDER}/", f"{field}.path")
        if entry.path not in files:
            raise BundleError(folder / entry.path, "no contents were given for this file", f"{field}.path")
        if file_spec(entry.path, files[entry.path]) != entry:
            raise BundleError(folder / entry.path, "the contents do not have the size and SHA-256 listed", field)
    for path in sorted(set(files) - listed):
        raise BundleError(folder / path, f"contents were given, but {BUNDLE_YAML} does not list this file")
    for path in sorted(listed):
        below = [other for other in listed if PurePosixPath(path) in PurePosixPath(other).parents]
        if below:
            raise BundleError(folder / path, f"is a file and the folder of {below[0]} at once")


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds more than a bundle: it is removed after the exchange."""
    try:
        names = {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return
    except OSError as error:
        raise BundleError(folder, f"not a folder that can be read ({error.strerror}); choose another") from error
    others = sorted(names - {BUNDLE_YAML, BUNDLE_SHA256, _FILES_FOLDER})
    if others or (names and BUNDLE_YAML not in names):
        what = f"holds {others[0]!r}" if others else f"has no {BUNDLE_YAML}"
        raise BundleError(folder, f"{what}, so it is more than a bundle and is not replaced; choose another folder")


def _write_tree(root: Path, contents: Mapping[str, bytes]) -> None:
    """Write every file below ``root`` and flush files and folders to disk."""
    folders = {root}
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.update(root / parent for parent in PurePosixPath(name).parents)
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    for entry in folders:
        _sync(entry)


def _put_in_place(staging: Path, folder: Path) -> None:
    """Make ``staging`` appear as ``folder``; afterwards ``staging`` holds the old contents or is gone."""
    if not folder.exists():
        staging.rename(folder)
        return
    try:
        _exchange(staging, folder)
        return
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
    aside = folder.with_name(f"{staging.name}.old")
    folder.rename(aside)
    try:
        staging.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two paths in one step (Linux ``renameat2``, which Python does not wrap).

    Raises:
        OSError: ENOSYS where the C library has no such function, EINVAL where the file system cannot do it.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _sync(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
