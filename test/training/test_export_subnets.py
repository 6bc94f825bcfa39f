"""Subnets of a supernet as variants of a bundle: what is written, that it computes the same, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import Bits, LatencyRecord
from dcqfa_ros.bundle.verify import verify_bundle
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from test.training.conftest import write_teacher
from training.draws import stratified_subnet
from training.export import subnets as subnets_module
from training.export.block_parity import block_errors
from training.export.blocks import blocks_of
from training.export.bundle import ExportOptions, export_bundle
from training.export.diffusion_policy_t import Rest, export_graphs
from training.export.fronts import chosen_of
from training.export.records import Result
from training.export.subnets import SubnetOptions, export_subnets
from training.export.variant import ExportError
from training.space_counts import paper_bytes, parameters
from training.subnet import Precision
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.torch_engine import TorchEngine
from training.trained import load_trained
from training.warm_start import state_sha256

UNEVEN = "int.1h32w4a8.4h64w8a4"  # two blocks that differ in everything
ONE_BLOCK = "int.0.2h32w8a8"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def few_parity_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subnets_module, "PARITY_SAMPLES", 8)


@pytest.fixture(scope="module")
def supernet(supernet_run: Path) -> TrainedSupernet:
    return load_supernet(supernet_run)


@pytest.fixture
def bundle(supernet_files: Any, tmp_path: Path) -> Path:
    """The bundle of the policy that the supernet was trained from."""
    export_bundle(supernet_files.teacher, tmp_path / "bundle", ExportOptions(variants=("fp32",), calibration=8))
    return tmp_path / "bundle"


@pytest.fixture
def export(in_process: Callable[[str], Run]) -> Run:
    """``dcqfa export`` in this process."""
    return in_process("export")


def draw(batch: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    noisy = generator.standard_normal((batch, tokens, 2)).astype(np.float32)
    return noisy, generator.uniform(-1, 1, (batch, 2, 20)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("largest", 2e-5), ("fp16", 1e-3), ("w8a8", 2e-5), ("w4a4", 2e-5), ("smallest", 2e-5), (UNEVEN, 2e-5)],
)
def test_a_subnet_computes_what_it_computes_in_training(supernet: TrainedSupernet, name: str, tolerance: float) -> None:
    _, network = supernet.subnet(name)
    ours, theirs = TorchEngine(network), OnnxRuntimeEngine(export_graphs(network, 100))
    noisy, observation = draw(2, 5)
    steps = np.array([3, 50])
    kv, seen = ours.timestep_kv(steps).copy(), ours.observation_kv(observation).copy()
    np.testing.assert_allclose(theirs.timestep_kv(steps), kv, atol=1e-6)
    np.testing.assert_allclose(theirs.observation_kv(observation), seen, atol=tolerance)
    expected = ours.denoise(noisy, kv[:1], seen)
    np.testing.assert_allclose(theirs.denoise(noisy, kv[:1], seen), expected, atol=tolerance)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 16))
def test_every_block_of_a_random_subnet_agrees_with_training(supernet: TrainedSupernet, seed: int, tokens: int) -> None:
    subnet = stratified_subnet(supernet.space, torch.Generator().manual_seed(seed), whole_network=False)
    network = supernet.network.extract(subnet)
    noisy, observation = draw(3, tokens, seed)
    errors = block_errors(network, blocks_of(network), noisy, np.array([48]), observation)
    assert len(errors) == subnet.depth
    assert max(errors) < (1e-3 if subnet.precision in (Precision.FP32, Precision.FP16) else 0.02)


def test_fp8_codes_are_those_of_training(supernet: TrainedSupernet) -> None:
    _, network = supernet.subnet("fp8")
    noisy, observation = draw(2, 5)
    assert max(block_errors(network, blocks_of(network), noisy, np.array([48]), observation)) < 1e-3


def test_a_wrong_weight_shows_in_its_own_block_alone(supernet: TrainedSupernet) -> None:
    blocks = blocks_of(supernet.subnet("w8a8")[1])
    _, network = supernet.subnet("w8a8")
    with torch.no_grad():
        network.elastic_blocks()[1].fc2.bias += 1.0
    noisy, observation = draw(2, 5)
    first, second = block_errors(network, blocks, noisy, np.array([48]), observation)
    assert first < 1e-3 < 0.05 < second


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("w4a4", TensorProto.INT4),
        ("w8a8", TensorProto.INT8),
        ("fp16", TensorProto.FLOAT16),
        ("largest", TensorProto.FLOAT),
    ],
)
def test_weights_are_stored_in_their_bits(supernet: TrainedSupernet, name: str, stored: int) -> None:
    _, network = supernet.subnet(name)
    graph = onnx.load_from_string(export_graphs(network, 100)["denoiser"]).graph
    found = {t.data_type for t in graph.initializer if t.name.startswith("blocks.") and t.name.endswith("fc1.weight")}
    assert found == {stored}


def test_a_quarter_of_the_bits_takes_a_quarter_of_the_bytes(supernet: TrainedSupernet) -> None:
    def size(name: str) -> int:
        graph = onnx.load_from_string(export_graphs(supernet.subnet(name)[1], 100, Rest.INT8)["denoiser"]).graph
        return sum(len(t.raw_data) for t in graph.initializer if t.name.endswith("fc1.weight"))

    assert size("largest") == 4 * size("w8a8") == 8 * size("w4a4")


@pytest.mark.parametrize(("rest", "bound"), [(Rest.FLOAT16, 2e-3), (Rest.INT8, 0.05)])
def test_storing_the_rest_in_fewer_bits_changes_keys_and_values_little(
    supernet: TrainedSupernet, rest: Rest, bound: float
) -> None:
    _, network = supernet.subnet("largest")
    graphs = export_graphs(network, 100), export_graphs(network, 100, rest)
    whole, small = (OnnxRuntimeEngine(files) for files in graphs)
    _, observation = draw(1, 1)
    for one, other in (
        (whole.observation_kv(observation), small.observation_kv(observation)),
        (whole.timestep_kv(np.arange(100)), small.timestep_kv(np.arange(100))),
    ):
        assert 0 < np.abs(one - other).max() < bound * np.abs(one).max()
    assert all(len(graphs[1][role]) < len(graphs[0][role]) for role in ("encoder", "timestep"))


def test_a_part_of_the_supernet_is_not_exported_in_place(supernet: TrainedSupernet) -> None:
    network = supernet.network
    before = network.active
    network.activate(supernet.space.parse("smallest"))
    try:
        with pytest.raises(ValueError, match="extract the subnet"):
            export_graphs(network, 100)
    finally:
        network.activate(before)


def test_subnets_stand_beside_the_policy_in_its_bundle(
    supernet: TrainedSupernet, supernet_run: Path, bundle: Path
) -> None:
    before = load_bundle(bundle)
    names = {"w8a8": "w8a8", "w4a4": "w4a4", "uneven": UNEVEN, "one": ONE_BLOCK, "half": "fp16"}
    spec = export_subnets(supernet_run, bundle, SubnetOptions(subnets=names))
    assert verify_bundle(bundle).ok
    loaded = load_bundle(bundle)
    assert loaded.spec == spec and spec.default_variant == "fp32" and spec.training == before.spec.training
    assert [v.name for v in spec.variants] == ["fp32", *names]
    assert spec.variant("fp32") == before.spec.variant("fp32")
    assert loaded.read("fp32", "denoiser") == before.read("fp32", "denoiser")
    assert [spec.variant(name).precision for name in names] == ["w8a8", "w4a4", "mixed", "w8a8", "fp16"]
    uneven = spec.variant("uneven")
    chosen = supernet.space.parse(UNEVEN)
    assert supernet.space.parse(str(uneven.subnet)) == chosen
    assert [(b.index, b.heads, b.ffn_dim) for b in uneven.blocks or ()] == [(0, 1, 32), (1, 4, 64)]
    assert [(b.index, b.heads) for b in spec.variant("one").blocks or ()] == [(1, 2)]
    assert uneven.size.parameters == parameters(supernet.space.shape, chosen)
    assert uneven.size.paper_bytes == paper_bytes(supernet.space.shape, chosen)
    assert uneven.training is not None and uneven.training.steps == 6
    assert uneven.parity.block_rms is not None
    engine = OnnxRuntimeEngine({role: loaded.read("uneven", role) for role in ("encoder", "timestep", "denoiser")})
    assert engine.dims["R"] == 2 * (1 + 4)


def test_bits_are_recorded_as_searched_as_written_and_as_executed(supernet_run: Path, tmp_path: Path) -> None:
    names = {"uneven": UNEVEN, "fp8": "fp8"}
    spec = export_subnets(supernet_run, tmp_path / "b", SubnetOptions(subnets=names))
    rows = {row.layer: row for row in spec.variant("uneven").layers}
    w4a8, w8a4, w8a8 = (Bits(weight=w, activation=a, kind="int") for w, a in ((4, 8), (8, 4), (8, 8)))
    for index, bits in enumerate((w4a8, w8a4)):
        row = rows[f"blocks.{index}.fc1"]
        assert (row.searched, row.exported, row.executed["onnxruntime"]) == (bits, bits, w8a8)
        assert row.executed["tensorrt"] == row.executed["torch_cuda"] == w8a8
    real = Bits(weight=32, activation=32, kind="float")
    memory = rows["memory_fc1"]
    assert (memory.searched, memory.executed["onnxruntime"]) == (real, real)
    assert memory.exported == Bits(weight=8, activation=32, kind="int")
    fp8 = {row.layer: row for row in spec.variant("fp8").layers}["blocks.0.self_attn.q"]
    assert fp8.exported == Bits(weight=8, activation=8, kind="float")
    assert fp8.executed["onnxruntime"] == real
    assert fp8.executed["tensorrt_rtx"] == fp8.executed["torch_cuda"] == fp8.exported
    half = Bits(weight=16, activation=16, kind="float")
    assert rows["head"].executed["tensorrt"] == rows["head"].executed["torch_cuda"] == half  # reduced variants


def test_a_variant_that_comes_out_the_same_keeps_its_records(supernet_run: Path, bundle: Path) -> None:
    spec = export_subnets(supernet_run, bundle, SubnetOptions(subnets={"w8a8": "w8a8", "w4a4": "w4a4"}))
    record = LatencyRecord(
        device="here", runtime="onnxruntime 1", kind="measured", threads=1, steps=4, p50_ms=1.0, command="bench"
    )
    from dcqfa_ros.bundle.write import write_bundle

    loaded = load_bundle(bundle)
    files = {f.path: loaded.read(v.name, role) for v in spec.variants for role, f in v.files.items()}
    variants = tuple(v.model_copy(update={"latency": (record,)}) for v in spec.variants)
    write_bundle(bundle, spec.model_copy(update={"variants": variants}), files)
    again = export_subnets(supernet_run, bundle, SubnetOptions(subnets={"w8a8": "w8a8", "w4a4": "smallest"}))
    assert again.variant("fp32").latency == again.variant("w8a8").latency == (record,)
    assert again.variant("w4a4").latency == ()  # of other weights now


def test_the_same_subnet_gives_the_same_bytes(supernet: TrainedSupernet) -> None:
    graphs = [export_graphs(supernet.subnet(UNEVEN)[1], 100, Rest.INT8) for _ in range(2)]
    assert graphs[0] == graphs[1]


def test_a_bundle_of_another_policy_is_refused_and_stays(supernet_run: Path, trained_run: Path, tmp_path: Path) -> None:
    export_bundle(trained_run, tmp_path / "other", ExportOptions(variants=("fp32",), calibration=8))
    before = (tmp_path / "other/bundle.yaml").read_bytes()
    with pytest.raises(ExportError, match=r"architecture is not that of .* of another policy"):
        export_subnets(supernet_run, tmp_path / "other", SubnetOptions(subnets={"w8a8": "w8a8"}))
    assert (tmp_path / "other/bundle.yaml").read_bytes() == before


def test_an_export_whose_blocks_disagree_is_not_written(
    supernet_run: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle / "bundle.yaml").read_bytes()
    monkeypatch.setattr(subnets_module, "block_errors", lambda *_: [0.0, 0.5])
    with pytest.raises(ExportError, match=r"variant w8a8: block .* differs .* by 0.5"):
        export_subnets(supernet_run, bundle, SubnetOptions(subnets={"w8a8": "w8a8"}))
    assert (bundle / "bundle.yaml").read_bytes() == before


def test_a_bundle_of_other_weights_is_refused_though_all_else_is_the_same(
    supernet_files: Any, supernet_run: Path, tmp_path: Path
) -> None:
    write_teacher(tmp_path / "teacher", load_trained(supernet_files.teacher).config, seed=1)
    export_bundle(tmp_path / "teacher", tmp_path / "other", ExportOptions(variants=("fp32",), calibration=8))
    with pytest.raises(ExportError, match=r"is not the one that .* was trained from"):
        export_subnets(supernet_run, tmp_path / "other", SubnetOptions(subnets={"w8a8": "w8a8"}))


def test_results_are_recorded_without_an_export_and_those_of_another_device_stay(
    supernet_run: Path, bundle: Path
) -> None:
    spec = export_subnets(supernet_run, bundle, SubnetOptions(subnets={"w8a8": "w8a8"}))
    record = LatencyRecord(
        device="here", runtime="onnxruntime 1", kind="measured", threads=1, steps=4, p50_ms=1.0,
        command="dcqfa bench engine --bundle tried --steps 4",
    )  # fmt: skip
    weights = spec.variant("w8a8").weights
    for device, p50 in (("here", 1.0), ("there", 2.0), ("here", 3.0)):
        new = record.model_copy(update={"device": device, "p50_ms": p50})
        options = SubnetOptions(subnets={}, latency={"w8a8": (Result(new, weights, Path("bench.json"), "tried"),)})
        spec = export_subnets(supernet_run, bundle, options)
    found = spec.variant("w8a8").latency
    assert [(r.device, r.p50_ms) for r in found] == [("here", 3.0), ("there", 2.0)]
    assert {r.command for r in found} == {f"dcqfa bench engine --bundle {spec.name} --steps 4"}
    assert load_bundle(bundle).read("w8a8", "denoiser")


@pytest.mark.parametrize(("variant", "weights", "text"), [("w8a8", "0", "other weights"), ("none", "0", "no row of")])
def test_results_that_are_of_nothing_here_are_refused(
    supernet_run: Path, bundle: Path, variant: str, weights: str, text: str
) -> None:
    record = LatencyRecord(
        device="here", runtime="onnxruntime 1", kind="measured", threads=1, steps=4, p50_ms=1.0, command="bench"
    )
    latency = {variant: (Result(record, weights, Path("bench.json"), "tried"),)}
    with pytest.raises(ExportError, match=text):
        export_subnets(supernet_run, bundle, SubnetOptions(subnets={"w8a8": "w8a8"}, latency=latency))
    with pytest.raises(ExportError, match="no bundle to record results in"):
        export_subnets(supernet_run, bundle / "none", SubnetOptions(subnets={}, latency=latency))


def test_a_wrong_table_of_time_steps_is_not_written(
    supernet_run: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: Any, timesteps: int, rest: Rest) -> dict[str, bytes]:
        graphs = export_graphs(network, timesteps, rest)
        return graphs | {"timestep": export_graphs(load_supernet(supernet_run).subnet("w8a4")[1], 100)["timestep"]}

    monkeypatch.setattr(subnets_module, "export_graphs", wrong)
    with pytest.raises(ExportError, match="variant w8a8: the table of time steps on ONNX Runtime differs"):
        export_subnets(supernet_run, bundle, SubnetOptions(subnets={"w8a8": "w8a8"}))


def front(path: Path, supernet: TrainedSupernet, **changes: Any) -> Path:
    document = {
        "schema_version": 1,
        "run": "runs/x",
        "network_sha256": state_sha256(supernet.network.state_dict()),
        "device": "cpu",
        "fingerprint": "made up",
        "modelled": True,
        "steps": 4,
        "latency_budget_ms": 3.0,
        "memory_budget_bytes": None,
        "subnets": [
            {"name": UNEVEN, "latency_ms": 1.0, "chosen": True},
            {"name": ONE_BLOCK, "latency_ms": 0.5, "chosen": False},
        ],
    }
    path.write_text(json.dumps(document | changes))
    return path


def test_the_chosen_network_of_a_search_is_exported_by_its_front(
    export: Run, supernet: TrainedSupernet, supernet_run: Path, bundle: Path, tmp_path: Path
) -> None:
    file = front(tmp_path / "front.json", supernet)
    arguments = (supernet_run, "--out", bundle, "--subnet", "w8a8", "--subnet", f"tiny={ONE_BLOCK}", "--front", file)
    code, output, errors = export(*arguments, "--default", "searched", "--json")
    assert code == 0, errors
    printed = json.loads(output)
    assert printed["default_variant"] == "searched"
    assert [(row["variant"], row["subnet"]) for row in printed["variants"]] == [
        ("fp32", None),
        ("w8a8", supernet.space.name(supernet.space.parse("w8a8"))),
        ("tiny", supernet.space.name(supernet.space.parse(ONE_BLOCK))),
        ("searched", supernet.space.name(supernet.space.parse(UNEVEN))),
    ]
    spec = load_bundle(bundle).spec
    assert spec.variant("searched").searched_for == "cpu (modelled), made up, at most 3 ms, 4 steps"
    assert spec.variant("tiny").searched_for is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"network_sha256": "0" * 64}, "other weights"),
        ({"subnets": []}, "0 networks are chosen"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_a_front_that_does_not_fit_is_refused(
    supernet: TrainedSupernet, supernet_run: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ExportError, match=text):
        chosen_of(front(tmp_path / "front.json", supernet, **changes), supernet_run)
    with pytest.raises(ExportError, match="cannot be read"):
        chosen_of(tmp_path / "none.json", supernet_run)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--subnet", "fp32"), "full-precision policy"),
        (("--subnet", "a=w8a8", "--subnet", "a=w4a4"), "named twice"),
        (("--subnet", "d9-h1-m1-w4a4"), "d9"),
        (("--subnet", "1x=w8a8"), "1x"),
        (("--variants", "w8a8"), "holds a supernet"),
        ((), "no subnet is named"),
        (("--default", "nobody"), "nobody"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    export: Run, supernet_run: Path, bundle: Path, options: tuple[str, ...], text: str
) -> None:
    before = (bundle / "bundle.yaml").read_bytes()
    code, _, errors = export(supernet_run, "--out", bundle, *options)
    assert code != 0 and text in errors and "Traceback" not in errors
    assert (bundle / "bundle.yaml").read_bytes() == before


def test_a_single_policy_has_no_subnets(export: Run, supernet_files: Any, tmp_path: Path) -> None:
    code, _, errors = export(supernet_files.teacher, "--out", tmp_path / "b", "--subnet", "w8a8")
    assert code != 0 and "holds a single policy" in errors


def test_a_damaged_bundle_is_not_built_upon(export: Run, supernet_run: Path, bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / "variants/fp32/denoiser.onnx").write_bytes(b"x")
    code, _, errors = export(supernet_run, "--out", broken, "--subnet", "w8a8")
    assert code != 0 and "denoiser.onnx" in errors
