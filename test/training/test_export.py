from __future__ import annotations

import copy
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.verify import verify_bundle
from dcqfa_ros.cli import main
from dcqfa_ros.devices.detect import detect
from dcqfa_ros.devices.select import budget_for, choose
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine, session_options
from dcqfa_ros.runtime.parity import SAMPLES
from training.checkpoint import CheckpointError
from training.data.episodes import read_demonstrations
from training.export import bundle as bundle_module
from training.export import executed as executed_module
from training.export.bundle import ExportError, ExportOptions, export_bundle
from training.export.calibration import quantize_policy, training_observations
from training.export.diffusion_policy_t import export_graphs
from training.export.executed import integer_weights
from training.export.records import RecordError, read_latency, read_quality
from training.export.variant import Tolerance
from training.export.weights import LinearWeights, concatenate
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.quant.linear import LinearBits, QuantizedLinear
from training.torch_engine import TorchEngine
from training.trained import load_trained

CONFIG = DiffusionPolicyTConfig(depth=2, heads=2, dim=32, ffn_ratio=2)
OPTIONS = ExportOptions(calibration=16)
ONNXRUNTIME = ("--runtimes", "onnxruntime")


@pytest.fixture(autouse=True)
def few_parity_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "PARITY_SAMPLES", 8)


@pytest.fixture(scope="module")
def network() -> DiffusionPolicyT:
    torch.manual_seed(0)
    network = DiffusionPolicyT(CONFIG).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network


@pytest.fixture(scope="module")
def quantized(network: DiffusionPolicyT, trained_run: Path) -> DiffusionPolicyT:
    diffusion = load_trained(trained_run).meaning.specification().diffusion
    observations = np.random.default_rng(0).uniform(-1, 1, (16, 2, 20)).astype(np.float32)
    return quantize_policy(network, diffusion, observations, threads=1)


def draw(batch: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    observation = generator.uniform(-1, 1, (batch, 2, 20)).astype(np.float32)
    return generator.standard_normal((batch, tokens, 2)).astype(np.float32), observation


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 9), (1, 16), (3, 9), (5, 16)])
def test_the_exported_network_agrees_for_every_batch_and_number_of_tokens(
    network: DiffusionPolicyT, batch: int, tokens: int
) -> None:
    noisy, observation = draw(batch, tokens)
    ours, theirs = TorchEngine(network), OnnxRuntimeEngine(export_graphs(network, 100))
    times = np.array([0, 37, 99])
    np.testing.assert_allclose(theirs.timestep_kv(times), ours.timestep_kv(times), atol=1e-5)
    np.testing.assert_allclose(theirs.observation_kv(observation), ours.observation_kv(observation), atol=1e-5)
    kv = ours.timestep_kv(times)[1:2].copy(), ours.observation_kv(observation).copy()
    np.testing.assert_allclose(theirs.denoise(noisy, *kv), ours.denoise(noisy, *kv), atol=1e-5)


def test_the_quantized_export_agrees_with_the_quantized_network_within_a_few_steps(
    quantized: DiffusionPolicyT,
) -> None:
    noisy, observation = draw(4, 16)
    ours, theirs = TorchEngine(quantized), OnnxRuntimeEngine(export_graphs(quantized, 100))
    kv = ours.timestep_kv(np.array([50])).copy(), ours.observation_kv(observation).copy()
    np.testing.assert_allclose(theirs.observation_kv(observation), kv[1], atol=0.02)
    reference = ours.denoise(noisy, *kv)
    difference = theirs.denoise(noisy, *kv) - reference
    # Rounding differences of 1e-7 move single activations by a whole quantization step.
    assert np.sqrt(np.square(difference).mean()) < 0.01 * reference.std()


def test_rows_of_a_batch_and_extra_tokens_change_nothing_bit_for_bit(
    network: DiffusionPolicyT, quantized: DiffusionPolicyT
) -> None:
    noisy, observation = draw(4, 16)
    for graphs in (export_graphs(network, 100), export_graphs(quantized, 100)):
        engine = OnnxRuntimeEngine(graphs)
        kv = engine.timestep_kv(np.array([50])).copy(), engine.observation_kv(observation).copy()
        whole = engine.denoise(noisy, *kv).copy()
        for row in range(4):
            alone = engine.denoise(noisy[row : row + 1, :9], kv[0], kv[1][row : row + 1])
            np.testing.assert_array_equal(alone[0], whole[row, :9])


def test_every_quantized_product_runs_on_integer_kernels(quantized: DiffusionPolicyT) -> None:
    for role, data in export_graphs(quantized, 100).items():
        graph = onnx.load_from_string(data).graph
        weights = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2}
        assert len(weights) == {"encoder": 1, "timestep": 0, "denoiser": 6 * CONFIG.depth}[role]
        assert weights <= integer_weights(data, role)


def test_the_quantized_graph_is_canonical(quantized: DiffusionPolicyT) -> None:
    model = onnx.load_from_string(export_graphs(quantized, 100)["denoiser"])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert model.ir_version <= 10
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    count = Counter(node.op_type for node in model.graph.node)
    assert count["QuantizeLinear"] == 6 * CONFIG.depth  # inputs only: no output is quantized
    assert count["DequantizeLinear"] == 12 * CONFIG.depth
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
            assert constants[node.input[1]].ndim == (1 if node.input[0] in constants else 0)


def test_the_same_network_gives_the_same_bytes(network: DiffusionPolicyT) -> None:
    assert export_graphs(network, 100) == export_graphs(network, 100)


def test_merged_linears_must_share_their_input_quantizer() -> None:
    layers = [QuantizedLinear(torch.nn.Linear(8, 4), torch.tensor(s), LinearBits()) for s in (0.1, 0.2)]
    with pytest.raises(ValueError, match="share one input quantizer"):
        concatenate([LinearWeights.of(layer) for layer in layers])


def test_a_checkpoint_becomes_a_bundle_that_verifies(trained_run: Path, tmp_path: Path) -> None:
    spec = export_bundle(trained_run, tmp_path / "policy", OPTIONS)
    assert verify_bundle(tmp_path / "policy").ok
    assert load_bundle(tmp_path / "policy").spec == spec
    assert [variant.name for variant in spec.variants] == ["fp32", "w8a8"]
    assert list(spec.observations) == ["keypoints", "agent_position"]
    assert (spec.action.horizon, spec.action.first_executed, spec.action.executed) == (16, 1, 8)
    full, small = spec.variants
    actions = spec.action.executed * spec.action.dim
    assert all(len(variant.parity.fixed_chunks or ()) == SAMPLES * actions for variant in spec.variants)
    assert full.parity.max_abs <= 1e-4
    assert full.size.paper_bytes == 4 * full.size.parameters
    assert small.size.disk_bytes < full.size.disk_bytes
    bits = {layer.layer: layer for layer in small.layers}
    assert bits["blocks.1.self_attn.k"].executed["onnxruntime"].activation == 8
    assert bits["blocks.0.cross_attn.v"].executed["onnxruntime"].kind == "int"
    assert bits["head"].executed["onnxruntime"].kind == "float"
    assert len(bits) == 2 * 10 + 5


def test_a_bundle_names_no_folder_of_the_machine_it_was_made_on(trained_run: Path, tmp_path: Path) -> None:
    export_bundle(trained_run, tmp_path / "policy", ExportOptions(variants=("fp32",)))
    assert str(trained_run.parent) not in (tmp_path / "policy/bundle.yaml").read_text()


def test_an_export_that_misses_its_parity_is_not_written(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: DiffusionPolicyT, timesteps: int) -> dict[str, bytes]:
        network.head.bias.data += 0.1
        return export_graphs(network, timesteps)

    monkeypatch.setattr(bundle_module, "export_graphs", wrong)
    with pytest.raises(ExportError, match="variant fp32"):
        export_bundle(trained_run, tmp_path / "policy", OPTIONS)
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    "options", [{"variants": ("int3",)}, {"variants": ()}, {"variants": ("fp32", "fp32")}, {"calibration": 0}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="--"):
        ExportOptions(**options)


def test_calibration_observations_are_repeatable_and_from_training_episodes(trained_run: Path) -> None:
    trained = load_trained(trained_run)
    demonstrations = read_demonstrations(trained.config.data)
    first, second = (training_observations(trained.meaning, demonstrations, 20, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (20, 2, 20)
    assert np.abs(first).max() <= 1.0 + 1e-5  # the normaliser was fitted on these very episodes


def evaluation(**changes: Any) -> dict[str, Any]:
    return {
        "policy": "tiny",
        "variant": "fp32",
        "metric": "score",
        "mean": 0.9,
        "ci95": 0.05,
        "first_seed": 100,
        "seeds": [100, 101],
        "denoising_steps": 16,
        "weights": "a" * 64,
    } | changes


def test_results_of_the_exported_weights_are_recorded_and_the_selector_uses_them(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = detect()
    first = export_bundle(trained_run, tmp_path / "policy", OPTIONS)
    weights = first.variant("fp32").weights
    (tmp_path / "eval.json").write_text(json.dumps(evaluation(weights=weights)))
    capsys.readouterr()
    assert main(["bench", "engine", "--bundle", str(tmp_path / "policy"), "--rounds", "2", "--json", *ONNXRUNTIME]) == 0
    (tmp_path / "bench.json").write_text(capsys.readouterr().out)
    quality, latency = read_quality([f"fp32={tmp_path / 'eval.json'}"]), read_latency([tmp_path / "bench.json"])
    spec = export_bundle(
        trained_run, tmp_path / "policy", ExportOptions(calibration=16, quality=quality, latency=latency)
    )
    (record,) = spec.variants[0].quality
    assert (record.mean, record.seeds, record.first_seed) == (0.9, 2, 100)
    assert record.command == f"dcqfa eval {spec.name} --variant fp32 --seeds 2 --first-seed 100 --steps 16"
    for variant in spec.variants:
        (measured,) = variant.latency
        assert (measured.device, measured.steps, measured.threads) == (device.fingerprint, 4, 1)
        assert measured.runtime.startswith("onnxruntime ")
    choice = choose(spec, device, budget_for(spec, device, latency_ms=10_000, memory_mb=10_000))
    accepted = [candidate for candidate in choice.ranking if candidate.accepted]
    assert choice.basis == "measured"
    assert {candidate.basis for candidate in accepted if candidate.runtime == "onnxruntime"} == {"measured"}


@pytest.mark.parametrize("option", ["quality", "latency"])
def test_results_of_other_weights_are_refused_by_file(trained_run: Path, tmp_path: Path, option: str) -> None:
    file = tmp_path / "result.json"
    row = {"engine": "onnxruntime", "variant": "fp32", "weights": "b" * 64, "threads": 1, "steps": 4}
    measured: dict[str, Any] = {"bundle": "tiny", "fingerprint": "computer", "versions": {"onnxruntime": "1.31.1"}}
    measured["rows"] = [row | {"p50_ms": 20.0, "p99_ms": 25.0}]
    if option == "quality":
        file.write_text(json.dumps(evaluation()))
        results: Any = read_quality([f"fp32={file}"])
    else:
        file.write_text(json.dumps(measured))
        results = read_latency([file])
    with pytest.raises(ExportError, match=rf"--{option} .*result\.json: was obtained with other weights"):
        export_bundle(trained_run, tmp_path / "policy", ExportOptions(variants=("fp32",), **{option: results}))
    assert not (tmp_path / "policy").exists()


def test_an_evaluation_of_a_checkpoint_is_no_quality_of_a_variant(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(evaluation(weights=None)))
    with pytest.raises(RecordError, match="export first and evaluate the bundle"):
        read_quality([f"fp32={tmp_path / 'eval.json'}"])


def test_another_process_exports_the_same_bytes(dcqfa: list[str], trained_run: Path, tmp_path: Path) -> None:
    spec = export_bundle(trained_run, tmp_path / "here", OPTIONS)
    command = [*dcqfa, "export", str(trained_run), "--out", str(tmp_path / "there"), "--calibration", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    other = load_bundle(tmp_path / "there").spec
    assert [variant.files for variant in spec.variants] == [variant.files for variant in other.variants]


def test_the_record_says_how_weights_and_scales_came_about(trained_run: Path, tmp_path: Path) -> None:
    spec = export_bundle(trained_run, tmp_path / "policy", OPTIONS)
    training, (full, small) = spec.training, spec.variants
    assert training.data_sha256 == read_demonstrations(load_trained(trained_run).config.data).sha256()
    assert (training.planned_steps, [entry.step for entry in training.history]) == (6, [0])
    assert training.history[0].torch == torch.__version__
    assert training.command == "dcqfa train --config pusht_keypoints --data demonstrations.npz --steps 6"
    assert full.calibration is None
    assert small.calibration is not None
    assert (small.calibration.samples, small.calibration.data_sha256) == (16, training.data_sha256)
    assert small.parity.export_rms < small.parity.rms
    assert full.parity.export_rms == full.parity.rms
    assert {"python", "torch", "onnxruntime"} <= set(spec.created_by)
    architecture = spec.architecture
    assert (architecture.depth, architecture.heads, architecture.dim, architecture.ffn_dim) == (2, 2, 32, 64)


def test_the_record_names_the_configuration_file_that_was_given(trained_run: Path, tmp_path: Path) -> None:
    payload = torch.load(trained_run / "checkpoint.pt", weights_only=True)
    payload["config"]["data"]["max_train_episodes"] = 2
    torch.save(payload | {"config_file": "mine.yaml"}, tmp_path / "checkpoint.pt")
    training = load_trained(tmp_path).meaning.specification().training
    assert training.command.startswith("dcqfa train --config mine.yaml --data")
    assert training.split.endswith("at most 2 training episodes")


def test_a_checkpoint_of_an_older_version_is_exported(trained_run: Path, tmp_path: Path) -> None:
    payload = torch.load(trained_run / "checkpoint.pt", weights_only=True)
    for key in ("data_sha256", "history", "config_file"):
        del payload[key]
    payload["config"]["data"]["format"] = "npz"
    del payload["config"]["data"]["observations"]["keypoints"]["names"]
    torch.save(payload, tmp_path / "checkpoint.pt")
    spec = export_bundle(tmp_path / "checkpoint.pt", tmp_path / "policy", ExportOptions(variants=("fp32",)))
    assert (spec.training.data_sha256, spec.training.history) == (None, ())


def test_a_quantized_export_that_differs_from_its_network_is_not_written(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: DiffusionPolicyT, timesteps: int) -> dict[str, bytes]:
        if not isinstance(network.decoder_blocks()[0].fc1, QuantizedLinear):
            return export_graphs(network, timesteps)
        changed = copy.deepcopy(network)
        changed.head.bias.data += 0.01  # small beside the cost of quantization
        return export_graphs(changed, timesteps)

    monkeypatch.setattr(bundle_module, "export_graphs", wrong)
    monkeypatch.setitem(bundle_module.TOLERANCE, "w8a8", Tolerance(1.0, 0.005))
    with pytest.raises(ExportError, match=r"w8a8: .* the network with the same quantizers"):
        export_bundle(trained_run, tmp_path / "policy", OPTIONS)


def test_weights_that_the_runtime_makes_unsigned_are_recognised(
    quantized: DiffusionPolicyT, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = onnx.load

    def as_without_vnni(path: str) -> onnx.ModelProto:
        model = load(path)
        for node in model.graph.node:
            if node.op_type in executed_module.INTEGER_PRODUCTS:
                renamed = [f"{name}_s8_2_u8" if name.endswith(".weight") else name for name in node.input]
                del node.input[:]
                node.input.extend(renamed)
        return model

    data = export_graphs(quantized, 100)["denoiser"]
    expected = integer_weights(data, "denoiser")
    assert "blocks.0.fc1.weight" in expected
    monkeypatch.setattr(executed_module.onnx, "load", as_without_vnni)
    assert integer_weights(data, "denoiser") == expected


def test_the_report_on_a_graph_runs_it_as_the_engine_does(
    quantized: DiffusionPolicyT, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def record(threads: int = 1) -> Any:
        asked.append(session_options(threads))
        return asked[-1]

    monkeypatch.setattr(executed_module, "session_options", record)
    integer_weights(export_graphs(quantized, 100)["encoder"], "encoder")
    (options,) = asked
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "[]",
        json.dumps(evaluation(variant="w8a8")),
        json.dumps(evaluation(seeds=[100, 102])),
        json.dumps(evaluation(ci95=None)),
        json.dumps({"variant": "fp32"}),
    ],
)
def test_what_is_no_evaluation_of_that_variant_is_refused_by_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(RecordError, match=r"eval\.json"):
        read_quality([f"fp32={tmp_path / 'eval.json'}"])
    with pytest.raises(RecordError, match=r"eval\.json"):
        read_latency([tmp_path / "eval.json"])
    with pytest.raises(RecordError, match="VARIANT=FILE"):
        read_quality(["fp32"])


def test_a_checkpoint_that_lacks_a_field_is_refused_by_name(trained_run: Path, tmp_path: Path) -> None:
    payload = torch.load(trained_run / "checkpoint.pt", weights_only=True)
    del payload["action_norm"]
    torch.save(payload, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="action_norm"):
        load_trained(tmp_path)


def test_the_export_command_reports_sizes_and_parity(dcqfa: list[str], trained_run: Path, tmp_path: Path) -> None:
    command = [*dcqfa, "export", str(trained_run), "--out", str(tmp_path / "policy"), "--calibration", "16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["variants"]
    assert [row["variant"] for row in rows] == ["fp32", "w8a8"]
    assert rows[0]["parity_max_abs"] <= 1e-4
