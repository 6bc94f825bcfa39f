"""Check a whole bundle and report everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcqfa_ros.bundle.errors import BundleIssue
from dcqfa_ros.bundle.load import BUNDLE_SHA256, BUNDLE_YAML, listed_files, read_checked, read_spec


@dataclass(frozen=True)
class VerifyReport:
    """Result of ``verify_bundle``.

    Attributes:
        ok: no issue was found.
        errors: everything found wrong.
        files: number of distinct files that were read and found right, ``bundle.yaml`` and its hash included.
        bytes: their size together.
        unlisted: files in the folder that ``bundle.yaml`` does not name. They are never read; no error.
    """

    ok: bool
    errors: tuple[BundleIssue, ...]
    files: int
    bytes: int
    unlisted: tuple[str, ...] = ()


def verify_bundle(folder: Path) -> VerifyReport:
    """Check ``bundle.yaml``, its hash and every file it lists; the folder is only read."""
    spec, issues = read_spec(folder)
    right: dict[str, int] = {}
    if not issues:
        right = {name: (folder / name).stat().st_size for name in (BUNDLE_YAML, BUNDLE_SHA256)}
    listed = {BUNDLE_YAML, BUNDLE_SHA256}
    if spec is not None:
        for field, file in listed_files(spec):
            listed.add(file.path)
            data, issue = read_checked(folder, file, field)
            if issue is None:
                right[file.path] = len(data)
            else:
                issues.append(issue)
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    unlisted = tuple(sorted(set(found) - listed)) if spec is not None else ()
    return VerifyReport(not issues, tuple(issues), len(right), sum(right.values()), unlisted)
