"""What a long command says besides its outcome."""

from __future__ import annotations

import sys

from tqdm import tqdm


def warn(text: str) -> None:
    """Say something on standard error, beside a progress bar that may be there."""
    tqdm.write(f"dcqfa: warning: {text}", file=sys.stderr)
