"""Full-precision policies stored as float16: what is written is the rounded policy, and what cannot be is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dcqfa_ros.bench.sizes import sizes
from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.stored import loaded_bytes, stored_as_half
from dcqfa_ros.bundle.verify import verify_bundle
from dcqfa_ros.bundle.write import file_spec, write_bundle
from dcqfa_ros.devices.detect import detect
from dcqfa_ros.devices.select import budget_for, choose
from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from training import commands_export
from training.commands import ArgumentError
from training.export import bundle as bundle_module
from training.export.bundle import HALF_DESCRIPTION, ExportError, ExportOptions, export_bundle
from training.export.half import LEAST_ELEMENTS, SUFFIX, StoreError, round_weights, rounded_to_half, store_in_half
from training.export.records import read_quality
from training.trained import load_trained
from training.warm_start import WarmStartError, read_policy_weights

HALF = ExportOptions(variants=("fp32",), store="float16")


@pytest.fixture(autouse=True)
def few_parity_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "PARITY_SAMPLES", 8)


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with weights moved far from their start: training was short."""
    folder = tmp_path_factory.mktemp("half")
    payload = torch.load(trained_run / "checkpoint.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for tensor in payload["ema"].values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    torch.save(payload, folder / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """A bundle in full precision and W8A8 with a score of each."""
    folder = run / "whole"
    spec = export_bundle(run, folder, ExportOptions(calibration=16))
    scores = []
    for variant in spec.variants:
        result = {"policy": spec.name, "variant": variant.name, "metric": "score", "mean": 0.9, "ci95": 0.05}
        result |= {"first_seed": 100, "seeds": [100, 101], "denoising_steps": 16, "weights": variant.weights}
        (run / f"{variant.name}.json").write_text(json.dumps(result))
        scores.append(f"{variant.name}={run / variant.name}.json")
    export_bundle(run, folder, ExportOptions(calibration=16, quality=read_quality(scores)))
    return folder


@pytest.fixture(scope="module")
def half(run: Path, whole: Path) -> Path:
    """That bundle with the full-precision variant stored as float16."""
    folder = Path(shutil.copytree(whole, run / "half"))
    export_bundle(run, folder, ExportOptions(variants=("fp32",), store="float16", keep=True))
    return folder


def test_only_the_full_precision_variant_is_written_anew(whole: Path, half: Path) -> None:
    before, after = load_bundle(whole).spec, load_bundle(half).spec
    assert verify_bundle(half).ok
    assert [variant.name for variant in after.variants] == ["fp32", "w8a8"]
    assert after.variants[1] == before.variants[1]
    assert len(after.variants[1].quality) == 1
    for role in ROLES:
        assert load_bundle(half).read("w8a8", role) == load_bundle(whole).read("w8a8", role)
    full = after.variants[0]
    assert before.variants[0].quality
    assert full.quality == full.latency == ()  # of other weights
    assert after.model_copy(update={"variants": (), "created_by": {}}) == before.model_copy(
        update={"variants": (), "created_by": {}}
    )


def test_the_record_says_that_weights_are_only_stored_as_float16(whole: Path, half: Path) -> None:
    before, after = (load_bundle(folder).spec.variants[0] for folder in (whole, half))
    assert after.description == HALF_DESCRIPTION
    assert after.precision == "fp32"
    assert after.parity.max_abs <= 1e-5  # the policy is the rounded one
    assert after.size.disk_bytes < 0.75 * before.size.disk_bytes
    layers = {layer.layer: layer for layer in after.layers}
    assert (layers["blocks.0.fc1"].exported.weight, layers["blocks.0.fc1"].exported.activation) == (16, 32)
    assert layers["blocks.0.self_attn.q"].exported.weight == 16  # a part of a merged weight
    assert layers["head"].exported.weight == 32  # too small to be worth it
    for layer in after.layers:
        assert layer.searched.weight == 32
        assert {(bits.weight, bits.activation) for bits in layer.executed.values()} == {(32, 32)}


def test_a_loaded_variant_counts_as_one_of_float32(whole: Path, half: Path) -> None:
    before, after = (load_bundle(folder).spec for folder in (whole, half))
    assert [stored_as_half(variant) for variant in after.variants] == [True, False]
    assert loaded_bytes(after.variants[0]) == 2 * after.variants[0].size.disk_bytes
    assert loaded_bytes(before.variants[0]) == before.variants[0].size.disk_bytes
    (row,) = sizes(after, ["fp32"])
    assert row.fp16_over_disk == 1.0
    device = detect()
    rankings = []
    for spec in (before, after):
        choice = choose(spec, device, budget_for(spec, device, latency_ms=10_000, memory_mb=10_000))
        rankings.append({(c.variant, c.runtime): c.relative_time for c in choice.ranking})
    assert rankings[0] == rankings[1]


def test_every_large_constant_is_stored_so_and_no_other(half: Path) -> None:
    bundle, count = load_bundle(half), 0
    for role in ROLES:
        for tensor in onnx.load_model_from_string(bundle.read("fp32", role)).graph.initializer:
            large = np.prod(tensor.dims) >= LEAST_ELEMENTS
            assert (tensor.data_type == onnx.TensorProto.FLOAT16) == tensor.name.endswith(SUFFIX) == large
            count += large
    assert count > 10


def test_the_quantized_variant_is_of_the_rounded_policy(run: Path, half: Path, tmp_path: Path) -> None:
    spec = export_bundle(run, tmp_path / "policy", ExportOptions(calibration=16, store="float16"))
    assert [variant.description == HALF_DESCRIPTION for variant in spec.variants] == [True, False]
    assert spec.variants[0].files == load_bundle(half).spec.variants[0].files
    assert not stored_as_half(spec.variants[1])


def test_a_warm_start_gets_the_rounded_weights(run: Path, half: Path) -> None:
    network = load_trained(run).network
    rounded = round_weights(network, 100).state_dict()
    state = read_policy_weights(half, network.config).state
    for name, tensor in rounded.items():
        if name != "memory_position":
            assert torch.equal(state[name], tensor), name
        if name.endswith(".weight"):
            assert torch.allclose(tensor, network.state_dict()[name], rtol=2.0**-11, atol=1e-6)
    assert torch.equal(state["memory_position"][:, 1:], rounded["memory_position"][:, 1:])
    # The time token's position is found from a table that is rounded too.
    assert float((state["memory_position"] - rounded["memory_position"]).abs().max()) < 0.02
    warm = type(network)(network.config).eval()
    warm.load_state_dict(state)
    bundle = load_bundle(half)
    engine = OnnxRuntimeEngine({role: bundle.read("fp32", role) for role in ROLES})
    every = torch.arange(100)
    with torch.inference_mode():
        found = warm.timestep_keys_values(every).numpy()
    np.testing.assert_allclose(engine.timestep_kv(every.numpy()), found, rtol=2.0**-10, atol=1e-4)


def test_a_warm_start_refuses_another_networks_rounded_table(half: Path, tmp_path: Path, run: Path) -> None:
    bundle = load_bundle(half)
    full = bundle.spec.variants[0]
    contents = {file.path: bundle.read(v.name, role) for v in bundle.spec.variants for role, file in v.files.items()}
    path = full.files["timestep"].path
    model = onnx.load_model_from_string(contents[path])
    table = next(t for t in model.graph.initializer if t.name == "table" + SUFFIX)
    array = numpy_helper.to_array(table).copy()
    array[:, 0] += np.float16(0.01)
    table.CopyFrom(numpy_helper.from_array(array, table.name))
    contents[path] = model.SerializeToString()
    files = dict(full.files) | {"timestep": file_spec(path, contents[path])}
    variants = (full.model_copy(update={"files": files}), *bundle.spec.variants[1:])
    write_bundle(tmp_path / "bundle", bundle.spec.model_copy(update={"variants": variants}), contents)
    with pytest.raises(WarmStartError, match=r"timestep\.onnx: its table"):
        read_policy_weights(tmp_path / "bundle", load_trained(run).config.policy)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([1.0, 65536.0], "holds 65536, beyond float16's largest number 65504"),
        ([-65520.0, 1.0], "beyond float16's largest"),
        ([1.0, np.inf], "not finite"),
        ([1.0, np.nan], "not finite"),
        ([1e-6, -2e-6], "would lose .* of its size"),
        ([2e-8, 1e-8], "would lose 1 of its size"),  # all of it would become 0
    ],
)
def test_weights_that_float16_cannot_hold_are_refused_by_name(values: list[float], why: str) -> None:
    with pytest.raises(StoreError, match=rf"^blocks\.0\.fc1: .*{why}.*--store float32"):
        rounded_to_half(np.array(values, np.float32), "blocks.0.fc1")


def test_small_values_beside_larger_ones_and_zeros_are_no_reason() -> None:
    values = np.array([0.05, 1e-7, 0.0, -3e-8, 65504.0], np.float32)
    assert np.abs(rounded_to_half(values, "w").astype(np.float32) - values).max() < 2e-5
    assert not rounded_to_half(np.zeros(4, np.float32), "w").any()


def test_nothing_is_written_where_a_weight_does_not_fit(run: Path, tmp_path: Path) -> None:
    payload = torch.load(run / "checkpoint.pt", weights_only=True)
    payload["ema"]["blocks.1.fc1.weight"][3, 5] = 7e4
    torch.save(payload, tmp_path / "checkpoint.pt")
    with pytest.raises(StoreError, match=r"denoiser\.onnx: blocks\.1\.fc1\.weight: holds 70000"):
        export_bundle(tmp_path, tmp_path / "policy", HALF)
    assert not (tmp_path / "policy").exists()


def test_a_graph_is_stored_the_same_way_every_time(whole: Path) -> None:
    data = load_bundle(whole).read("fp32", "denoiser")
    once = store_in_half(data, "denoiser.onnx")
    assert once == store_in_half(data, "denoiser.onnx")
    assert once == store_in_half(once, "denoiser.onnx")  # nothing is left to store


def test_variants_of_another_policy_are_not_kept(run: Path, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "bundle"))
    before = (folder / "bundle.yaml").read_bytes()
    payload = torch.load(run / "checkpoint.pt", weights_only=True)
    keep = ExportOptions(variants=("fp32",), store="float16", keep=True)
    torch.save(payload | {"step": payload["step"] + 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(ExportError, match="its training record is not that of"):
        export_bundle(tmp_path / "checkpoint.pt", folder, keep)
    payload["config"]["executed_actions"] = 4
    torch.save(payload, tmp_path / "checkpoint.pt")
    with pytest.raises(ExportError, match="its action is not that of"):
        export_bundle(tmp_path / "checkpoint.pt", folder, keep)
    assert (folder / "bundle.yaml").read_bytes() == before


@pytest.mark.parametrize("given", [{"store": "float16"}, {"keep": True}])
def test_subnets_refuse_the_options_of_a_policy(given: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"variants": None, "calibration": None, "store": None, "keep": False}
    args = argparse.Namespace(checkpoint=Path("run"), **(plain | given))
    with pytest.raises(ArgumentError, match=f"--{next(iter(given))}: run holds a supernet"):
        commands_export._subnets(args)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ExportError, match=r"--store bfloat16: expected one of float32, float16"):
        ExportOptions(store="bfloat16")


def exported(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands_export.export(parser.add_subparsers())
    args = parser.parse_args(["export", *arguments])
    return int(args.func(args))


def test_a_bundles_policy_is_stored_anew_without_its_run(
    run: Path, whole: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(trained_run.parent / "tiny.yaml")
    folder = Path(shutil.copytree(whole, tmp_path / "policy"))
    options = ("--config", config, "--variants", "fp32", "--store", "float16", "--keep", "--json")
    assert exported(str(folder), "--out", str(folder), *options) == 0  # in its own place
    capsys.readouterr()
    assert verify_bundle(folder).ok
    before, after = load_bundle(whole).spec, load_bundle(folder).spec
    assert after.variants[1] == before.variants[1]
    assert after.training == before.training
    assert after.variants[0].size.disk_bytes < 0.6 * before.variants[0].size.disk_bytes
    shape = load_trained(run).config.policy
    one, other = (read_policy_weights(path, shape).state for path in (whole, folder))
    for name, tensor in one.items():
        if name != "memory_position":  # solved for from the rounded table
            assert (other[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize(
    ("of_bundle", "given", "why"),
    [(True, False, "is a bundle; give the training YAML"), (False, True, "holds its own training configuration")],
)
def test_a_training_configuration_is_for_bundles_only(
    run: Path, whole: Path, trained_run: Path, tmp_path: Path, of_bundle: bool, given: bool, why: str
) -> None:
    config = ["--config", str(trained_run.parent / "tiny.yaml")] if given else []
    with pytest.raises(ArgumentError, match=rf"--config: .*{why}"):
        exported(str(whole if of_bundle else run), "--out", str(tmp_path / "x"), *config)
    assert not (tmp_path / "x").exists()
