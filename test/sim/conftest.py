"""Where the tests of the simulated cell find the published demonstrations, and what they say when there are none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

DATA_VARIABLE = "DCQFA_PUSHT_DATA"
DEFAULT_DATA = Path("../shared/data/pusht/pusht_human_demos_lowdim.npz")  # relative to the repository's root


@pytest.fixture(scope="session")
def demonstrations() -> dict[str, NDArray[np.generic]]:
    """Arrays of the published demonstrations; a test that needs them is reported as not exercised without them."""
    chosen = os.environ.get(DATA_VARIABLE)
    path = Path(chosen) if chosen else Path(__file__).resolve().parents[2] / DEFAULT_DATA
    if not path.is_file():
        if chosen:
            pytest.fail(f"{DATA_VARIABLE}={chosen}: no such file")
        pytest.skip(
            f"not exercised: no published Push-T demonstrations (set {DATA_VARIABLE} to the low-dimensional .npz)"
        )
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}
