"""What can be wrong with a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcqfa_ros.errors import UserError

_SHOWN = 3  # issues spelled out in an error's text; `dcqfa bundle verify` lists them all


@dataclass(frozen=True)
class BundleIssue:
    """One thing wrong with a bundle.

    Attributes:
        file: path relative to the bundle's folder, with ``/`` as separator.
        field: field of ``bundle.yaml`` the issue is about, like ``variants[0].files.encoder.sha256``; None where the
            file as a whole is meant.
        message: what was found, what was expected, what to do.
    """

    file: str
    field: str | None
    message: str

    def __str__(self) -> str:
        """Return ``file: field: message``."""
        return ": ".join(part for part in (self.file, self.field, self.message) if part)


class BundleError(UserError, ValueError):
    """A bundle that cannot be used: missing, unreadable, altered or not of this version's schema.

    Attributes:
        file: path of the offending file.
        field: field of ``bundle.yaml``, None where the file as a whole is meant.
        message: what was found, what was expected, what to do.
        issues: everything found wrong, the first one being the one above; files relative to the bundle's folder.
    """

    def __init__(self, file: str | Path, message: str, field: str | None = None) -> None:
        """Describe one problem of ``file``."""
        self.file = str(file)
        self.field = field
        self.message = message
        self.issues: tuple[BundleIssue, ...] = (BundleIssue(self.file, field, message),)
        super().__init__(str(self.issues[0]))

    @classmethod
    def from_issues(cls, folder: Path, issues: Sequence[BundleIssue]) -> BundleError:
        """Return one error for all ``issues`` (at least one) of the bundle in ``folder``."""
        first = issues[0]
        error = cls(folder / first.file, first.message, first.field)
        error.issues = tuple(issues)
        shown = [str(folder / first.file)] + ([first.field] if first.field else []) + [first.message]
        text = "; ".join([": ".join(shown), *(str(issue) for issue in issues[1:_SHOWN])])
        if len(issues) > _SHOWN:
            text += f"; and {len(issues) - _SHOWN} more, listed by: dcqfa bundle verify {folder}"
        error.args = (text,)
        return error


class BundleNotFoundError(BundleError):
    """No bundle of that name; the message lists where it was looked for and which names exist."""
