from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.config import ConfigError, TrainConfig, load_config, override

ROOT = Path(__file__).parents[2]


def test_every_shipped_configuration_loads() -> None:
    files = sorted((ROOT / "config/training").glob("*.yaml"))
    assert files
    for file in files:
        assert load_config(file).name == file.stem


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d["run"].update(batch="many"), "run.batch"),
        (lambda d: d["run"].update(batch=8.5), "run.batch"),
        (lambda d: d["run"].update(batch=0), "run.batch"),
        (lambda d: d["run"].update(precision="fp16"), "run.precision"),
        (lambda d: d["optimizer"].update(learning_rate=float("nan")), "optimizer.learning_rate"),
        (lambda d: d["optimizer"].update(betas=[1.0, 0.95]), "optimizer.betas[0]"),
        (lambda d: d["optimizer"].update(betas=[0.9, 1.5]), "optimizer.betas[1]"),
        (lambda d: d["optimizer"].update(betas=[-0.1, 0.95]), "optimizer.betas[0]"),
        (lambda d: d["run"].update(seed=9999999999999999999999), "run.seed"),
        (lambda d: d["run"].update(seed=2**63), "run.seed"),
        (lambda d: d["data"].update(split_seed=2**63), "data.split_seed"),
        (lambda d: d["policy"].update(heads=3), "policy"),
        (lambda d: d["data"]["observations"]["keypoints"].update(colour="red"), "data.observations.keypoints.colour"),
        (lambda d: d["policy"].update(prefix=16), "policy"),
        (lambda d: d.update(warm_start=5), "warm_start"),
        (lambda d: d["data"].pop("episode_ends"), "data.episode_ends"),
        (lambda d: d["data"].update(observations={}), "data.observations"),
        (lambda d: d["data"]["action"].update(space="telepathy"), "data.action.space"),
        (lambda d: d["data"]["action"].update(columns=[]), "data.action.columns"),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_field(
    write_config: Callable[..., Path], change: Callable[[dict[str, Any]], None], field: str
) -> None:
    path = write_config()
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert f"{field}:" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["diffusion"].update(sampler="consistency"),
            "consistency and diffusion.sampler consistency belong",
        ),
        (lambda d: d.update(consistency={}), "consistency and diffusion.sampler consistency belong together"),
        (
            lambda d: (d.update(consistency={}), d["diffusion"].update(sampler="consistency")),
            "consistency needs warm_start",
        ),
    ],
)
def test_kinds_of_runs_that_do_not_go_together_are_refused(
    write_config: Callable[..., Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = write_config()
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("fields", [{"warm_start": "models/pusht_keypoints"}, {"policy": {"prefix": 8}}])
def test_a_supernet_neither_starts_like_a_single_policy_nor_takes_known_tokens(fields: dict[str, Any]) -> None:
    document = yaml.safe_load((ROOT / "config/training/pusht_keypoints_supernet.yaml").read_text())
    document |= {
        key: document.get(key, {}) | value if isinstance(value, dict) else value for key, value in fields.items()
    }
    with pytest.raises(ValueError, match=r"(warm_start|policy\.prefix) is for a single policy"):
        TrainConfig.model_validate(document, strict=False)


def test_more_made_up_devices_than_memory_holds_are_refused(tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "config/training/pusht_keypoints_supernet.yaml").read_text())
    document["supernet"]["synthetic"] = 1_000_000_000
    (tmp_path / "supernet.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(ConfigError, match=r"supernet\.yaml: supernet\.synthetic: .*100000"):
        load_config(tmp_path / "supernet.yaml")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    section=st.sampled_from(["policy", "data", "diffusion", "optimizer", "ema", "run", None]),
    name=st.from_regex(r"[a-z_]{1,12}_x", fullmatch=True),
)
def test_any_unknown_field_is_refused_by_name(
    write_config: Callable[..., Path], section: str | None, name: str
) -> None:
    path = write_config()
    document = yaml.safe_load(path.read_text())
    (document[section] if section else document)[name] = 1
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(ConfigError, match=name):
        load_config(path)


@pytest.mark.parametrize("text", ["[1, 2", "just text", "", "- a\n- b", "name: 2020-01-01", "\x00"])
def test_what_is_no_configuration_is_refused_by_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(path)


def test_a_missing_or_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(tmp_path / "binary.yaml")


def test_command_line_values_replace_fields_and_are_checked(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config()
    changed = override(config, run={"steps": 9, "threads": None}, data={"path": "elsewhere"})
    assert (changed.run.steps, changed.run.threads, changed.data.path) == (9, config.run.threads, "elsewhere")
    with pytest.raises(ConfigError, match=r"run\.steps"):
        override(config, run={"steps": 0})


def test_a_key_given_twice_is_refused_by_name(write_config: Callable[..., Path]) -> None:
    path = write_config()
    path.write_text(path.read_text() + "license: MIT\nlicense: Apache-2.0\n")
    with pytest.raises(ConfigError, match="license: stands twice"):
        load_config(path)


@pytest.mark.parametrize(("text", "hint"), [("3e-4", "3.0e-4"), ("1e2", "1.0e+2"), ("2.5e3", "2.5e+3")])
def test_a_number_that_yaml_takes_for_text_is_explained(
    write_config: Callable[..., Path], text: str, hint: str
) -> None:
    path = write_config()
    written = path.read_text()
    assert "learning_rate: 0.0003" in written
    path.write_text(written.replace("learning_rate: 0.0003", f"learning_rate: {text}", 1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"write {hint}" in str(caught.value)
    path.write_text(written.replace("learning_rate: 0.0003", f"learning_rate: {hint}", 1))
    assert load_config(path).optimizer.learning_rate == float(text)
