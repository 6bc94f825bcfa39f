"""``dcqfa sampler report`` on runs as training leaves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training import sampler_plot
from training.checkpoint import load_checkpoint
from training.config import load_config, override
from training.lut import load_table, save_table
from training.supernet import SupernetTrainer

SHIPPED = Path(__file__).parents[3] / "models" / "pusht_keypoints_supernet"
QUICK = ("--seeds", 1, "--updates", 2, "--draws", 4, "--losses", 1, "--budgets", 0.5)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sampler(in_process: Callable[[str], Run]) -> Run:
    """``dcqfa sampler`` in this process, in an empty folder."""
    return in_process("sampler")


def document(result: tuple[int, str, str]) -> dict[str, Any]:
    code, output, errors = result
    assert code == 0, errors
    return json.loads(output)


def with_payload(run: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run whose checkpoint was changed."""
    payload = load_checkpoint(run / "checkpoint.pt")
    change(payload)
    folder.mkdir()
    torch.save(payload, folder / "checkpoint.pt")
    return folder


def with_other_table(supernet_files: Any, folder: Path) -> Callable[[dict[str, Any]], None]:
    """Changes a payload to one of a run whose first table was measured anew since."""
    tables = [str(shutil.copy(path, folder / path.name)) for path in supernet_files.tables]
    table = load_table(Path(tables[0]))
    save_table(Path(tables[0]), table.model_copy(update={"workspace_bytes": table.workspace_bytes + 1}))

    def change(payload: dict[str, Any]) -> None:
        payload["config"]["supernet"]["tables"] = tables

    return change


def test_a_run_whose_tables_were_not_touched_is_reported_without_a_mark(
    sampler: Run, supernet_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(supernet_run, tmp_path / "run")
    result = sampler("report", run, *QUICK, "--json")
    facts = document(result)
    assert "other tables" not in result[2]
    assert [(table["device"], table["trained_with"]) for table in facts["tables"]] == [("orin", True), ("slower", True)]
    assert not facts["in_run_other_tables"]
    assert {row["kind"]: row["other_tables"] for row in facts["rows"]} == dict.fromkeys(
        ("learned", "rejection", "uniform", "in_run"), False
    )


def test_a_table_that_was_measured_anew_is_named_and_the_sampler_of_the_run_marked(
    sampler: Run, supernet_files: Any, supernet_run: Path, tmp_path: Path
) -> None:
    run = with_payload(supernet_run, tmp_path / "run", with_other_table(supernet_files, tmp_path))
    result = sampler("report", run, *QUICK, "--json")
    facts = document(result)
    assert [table["trained_with"] for table in facts["tables"]] == [False, True]
    assert facts["in_run_other_tables"]
    assert f"was trained with other tables than {tmp_path / 'orin.json'}; costs are of the tables at hand" in result[2]
    assert {row["kind"] for row in facts["rows"] if row["other_tables"]} == {"in_run"}
    code, output, _ = sampler("report", run, *QUICK)
    assert code == 0 and "in_run (trained with other tables): " in output


def test_a_checkpoint_with_one_hash_of_all_tables_says_that_any_may_be_another(
    sampler: Run, supernet_files: Any, supernet_run: Path, tmp_path: Path
) -> None:
    change = with_other_table(supernet_files, tmp_path)

    def older(payload: dict[str, Any]) -> None:
        change(payload)
        del payload["table_files"]

    result = sampler("report", with_payload(supernet_run, tmp_path / "run", older), *QUICK, "--json")
    assert [table["trained_with"] for table in document(result)["tables"]] == [None, None]
    assert f"{tmp_path / 'orin.json'}, {tmp_path / 'slower.json'} (which of them is not known" in result[2]


def test_without_a_run_the_shipped_supernet_is_reported_and_nothing_written_into_it(
    sampler: Run, published_data: Path, tmp_path: Path
) -> None:
    before = sorted(SHIPPED.iterdir())
    result = sampler("report", *QUICK, "--data", published_data, "--json")
    facts = document(result)
    assert f"taking the shipped supernet {facts['run']}" in result[2]
    assert Path(facts["run"]).samefile(SHIPPED) and facts["step"] == 15_000 and facts["held_out"] is None
    assert len(facts["tables"]) == 3 and facts["plot"] == "sampler_report.png"
    assert (tmp_path / "sampler_report.png").exists() and sorted(SHIPPED.iterdir()) == before


def test_the_report_is_printed_though_the_plot_fails_in_the_end(
    sampler: Run, supernet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_plot, "check_plot", lambda path: None)
    code, output, errors = sampler("report", supernet_run, *QUICK, "--plot", tmp_path / "p.xyz", "--json")
    assert code == 2 and "p.xyz: the plot cannot be written" in errors
    assert json.loads(output)["rows"]


def test_a_plot_that_cannot_be_written_is_refused_before_the_run_is_opened(sampler: Run, tmp_path: Path) -> None:
    code, _, errors = sampler("report", tmp_path / "absent", "--plot", "p.xyz")
    assert (code, errors.count("\n")) == (2, 1) and "p.xyz: the plot cannot be written" in errors


def test_a_checkpoint_that_cannot_be_reported_is_refused_by_file(
    sampler: Run, supernet_run: Path, trained_run: Path, tmp_path: Path
) -> None:
    def strange(payload: dict[str, Any]) -> None:
        payload["config"]["supernet"]["colour"] = "red"

    def batchquant(payload: dict[str, Any]) -> None:
        payload["config"]["supernet"]["activations"] = "batchquant"

    for run, message in (
        (with_payload(supernet_run, tmp_path / "strange", strange), "colour"),
        (with_payload(supernet_run, tmp_path / "batchquant", batchquant), "batchquant), so losses of draws cannot"),
        (trained_run, "holds a single policy, no supernet"),
        (tmp_path / "absent", "no such checkpoint"),
    ):
        code, _, errors = sampler("report", run, *QUICK, "--plot", tmp_path / "p.png")
        assert (code, errors.count("\n")) == (2, 1), errors
        assert str(run / "checkpoint.pt") in errors and message in errors


def test_a_network_after_other_training_is_refused(
    sampler: Run, supernet_files: Any, supernet_run: Path, tmp_path: Path
) -> None:
    config = load_config(supernet_files.config)
    uniform = {"sampler": {"kind": "uniform", "batch": 8, "hidden": 16, "fit_every": 1}}
    for name, fields, steps, message in (
        ("short", {}, 3, "step is another one than that of"),
        ("sandwich", {"sandwich": {"sampled": 1, "sampled_batch": 6}}, 6, "supernet.sandwich is another one"),
        (
            "space",
            {"space": {**config.supernet.space.model_dump(mode="json"), "mlp_ratios": [1.0]}},
            6,
            "supernet.space",
        ),
    ):
        trainer = SupernetTrainer(override(config, supernet=uniform | fields), tmp_path / name, resume=False)
        trainer.step = steps
        trainer.save()
        code, _, errors = sampler("report", supernet_run, *QUICK, "--network", f"uniform={tmp_path / name}")
        assert code == 2 and f"--network uniform={tmp_path / name}: {message}" in errors, errors
