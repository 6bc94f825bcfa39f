"""Read a bundle: nothing of it is used before its size and SHA-256 were checked.

``bundle.yaml`` lists every other file with its hash; ``bundle.yaml.sha256`` (the format of ``sha256sum``) covers
``bundle.yaml`` itself. Reading never writes to the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dcqfa_ros.bundle.document import DocumentError, parse_document
from dcqfa_ros.bundle.errors import BundleError, BundleIssue
from dcqfa_ros.bundle.schema import BundleSpec, FileSpec

BUNDLE_YAML = "bundle.yaml"
BUNDLE_SHA256 = "bundle.yaml.sha256"
_MAX_YAML_BYTES = 16 * 1024 * 1024
_SEAL = re.compile(rb"([0-9a-f]{64})  bundle\.yaml\n")
_RESTORE = "restore the bundle from where it came, or export it again"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose ``bundle.yaml`` was checked. Files are checked as they are read.

    Attributes:
        spec: the contents of ``bundle.yaml``.
        folder: the bundle's folder.
    """

    spec: BundleSpec
    folder: Path

    def file(self, variant: str, role: str) -> Path:
        """Return the path of one file; ``role`` is ``encoder``, ``timestep`` or ``denoiser``.

        The file is not opened: to use its contents, call ``read``, which checks them.

        Raises:
            BundleError: there is no such variant or role.
        """
        return self.folder / self._entry(variant, role)[1].path

    def read(self, variant: str, role: str) -> bytes:
        """Return the contents of one file. It is read once: the bytes returned are the ones that were checked.

        Raises:
            BundleError: there is no such variant or role, or the file is missing, unreadable or altered.
        """
        field, spec = self._entry(variant, role)
        data, issue = read_checked(self.folder, spec, field)
        if issue is not None:
            raise BundleError.from_issues(self.folder, [issue])
        return data

    def _entry(self, variant: str, role: str) -> tuple[str, FileSpec]:
        for index, candidate in enumerate(self.spec.variants):
            if candidate.name != variant:
                continue
            for known, spec in candidate.files.items():
                if known == role:
                    return f"variants[{index}].files.{known}", spec
            known_roles = ", ".join(candidate.files)
            raise BundleError(
                self.folder / BUNDLE_YAML, f"no file {role!r}; there is {known_roles}", f"variants[{index}].files"
            )
        known_names = ", ".join(v.name for v in self.spec.variants)
        raise BundleError(self.folder / BUNDLE_YAML, f"no variant {variant!r}; there is {known_names}", "variants")


def load_bundle(folder: Path, *, verify: bool = True) -> Bundle:
    """Return the bundle in ``folder``.

    Args:
        folder: the bundle's folder (``dcqfa_ros.paths.find_bundle`` finds it by name).
        verify: also read and check every file it lists. Without it each file is still checked when ``Bundle.read``
            reads it, but a damaged one is noticed only then.

    Raises:
        BundleError: missing, unreadable, altered or not of this schema; names file and field.
    """
    spec, issues = read_spec(folder)
    if spec is not None and verify:
        for field, file in listed_files(spec):
            _, issue = read_checked(folder, file, field)
            if issue is not None:
                issues.append(issue)
    if spec is None or issues:
        raise BundleError.from_issues(folder, issues)
    return Bundle(spec, folder)


def listed_files(spec: BundleSpec) -> Iterator[tuple[str, FileSpec]]:
    """Yield (field, file) for every file of every variant, in the order of ``bundle.yaml``."""
    for index, variant in enumerate(spec.variants):
        for role, file in variant.files.items():
            yield f"variants[{index}].files.{role}", file


def read_spec(folder: Path) -> tuple[BundleSpec | None, list[BundleIssue]]:
    """Return the contents of ``bundle.yaml`` and what is wrong with it; contents are None where it cannot be read.

    Issues of fields come before the one about the hash: after an edit by hand they are what has to be mended.
    """
    data, issue = _read_regular(folder, BUNDLE_YAML, _MAX_YAML_BYTES)
    if issue is not None:
        return None, [issue]
    issues: list[BundleIssue] = []
    spec = None
    try:
        spec = parse_document(data, BundleSpec)
    except DocumentError as error:
        issues += [BundleIssue(BUNDLE_YAML, field, message) for field, message in error.issues]
    seal, issue = _read_regular(folder, BUNDLE_SHA256, _MAX_YAML_BYTES)
    if issue is not None:
        return spec, [*issues, issue]
    match = _SEAL.fullmatch(seal)
    if match is None:
        expected = "expected 64 hexadecimal digits, two spaces, 'bundle.yaml' and a line end"
        issues.append(BundleIssue(BUNDLE_SHA256, "sha256", f"{expected}; {_RESTORE}"))
    elif match[1].decode() != (found := hashlib.sha256(data).hexdigest()):
        mend = f"if the edit is meant, run: sha256sum {BUNDLE_YAML} > {BUNDLE_SHA256}"
        message = f"{BUNDLE_SHA256} says {match[1].decode()[:12]}..., the file has {found[:12]}...; {_RESTORE}; {mend}"
        issues.append(BundleIssue(BUNDLE_YAML, "sha256", message))
    return spec, issues


def read_checked(folder: Path, file: FileSpec, field: str) -> tuple[bytes, BundleIssue | None]:
    """Read ``file`` once and check size and SHA-256; the bytes are empty where there is an issue.

    Args:
        folder: the bundle's folder.
        file: what ``bundle.yaml`` says about the file.
        field: where it says so, for the issue.
    """
    data, issue = _read_regular(folder, file.path, file.bytes, field)
    if issue is not None:
        return b"", issue
    if len(data) != file.bytes:
        message = f"has {len(data)} bytes, expected {file.bytes}; {_RESTORE}"
        return b"", BundleIssue(file.path, f"{field}.bytes", message)
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        message = f"SHA-256 is {digest[:12]}..., expected {file.sha256[:12]}...; {_RESTORE}"
        return b"", BundleIssue(file.path, f"{field}.sha256", message)
    return data, None


def _read_regular(folder: Path, name: str, limit: int, field: str | None = None) -> tuple[bytes, BundleIssue | None]:
    """Return the contents of a regular file of at most ``limit`` bytes.

    Opened without blocking, so that a named pipe in the place of a file is refused instead of waited for.
    """
    try:
        with open(os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            info = os.fstat(stream.fileno())
            if not stat.S_ISREG(info.st_mode):
                return b"", BundleIssue(name, field, f"not a regular file; {_RESTORE}")
            if info.st_size > limit:
                size_field = f"{field}.bytes" if field else None
                message = f"has {info.st_size} bytes, expected at most {limit}; {_RESTORE}"
                return b"", BundleIssue(name, size_field, message)
            return stream.read(limit + 1), None
    except FileNotFoundError:
        return b"", BundleIssue(name, field, f"no such file in {folder}; {_RESTORE}")
    except OSError as error:
        return b"", BundleIssue(name, field, f"cannot be read ({error.strerror}); {_RESTORE}")
