from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.amortised import AmortisedError, amortised, break_even, load_amortised

ROOT = Path(__file__).parents[2]
costs = st.floats(0.0, 1e4)


@given(once=costs, each=costs, other=costs)
def test_break_even_is_the_fewest_devices_that_cost_no_more(once: float, each: float, other: float) -> None:
    devices = break_even(once, each, other)
    if devices is None:
        assert other <= each
        return
    exact = Fraction(once), Fraction(each), Fraction(other)
    assert exact[0] + devices * exact[1] <= devices * exact[2]
    assert devices == 1 or exact[0] + (devices - 1) * exact[1] > (devices - 1) * exact[2]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        break_even(bad, 0.0, 1.0)


def test_the_shipped_costs_name_their_sources_and_break_even() -> None:
    document = amortised(load_amortised(ROOT / "config/compare/amortised.yaml"))
    assert all(run["source"] for runs in document["sources"].values() for run in runs)
    hours = document["hours"]
    assert hours["break_even"] == break_even(
        hours["supernet"], hours["search_per_device"], hours["fixed_bit_per_device"]
    )
    first = hours["rows"][0]
    assert first["supernet"] == pytest.approx(hours["supernet"] + hours["search_per_device"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("machine: m\n", "supernet"), ("machine: [", "not YAML|document"), ("nothing: 1\n", "nothing")],
)
def test_a_file_of_another_form_is_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(AmortisedError, match=message):
        load_amortised(path)
    with pytest.raises(AmortisedError, match="cannot be read"):
        load_amortised(tmp_path / "absent.yaml")
