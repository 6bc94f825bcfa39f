from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dcqfa_ros.bundle.errors import BundleError
from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import NormalizerKind, NormalizerSpec
from dcqfa_ros.bundle.stored import stored_as_half
from dcqfa_ros.bundle.write import file_spec, write_bundle
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from training import graph_weights
from training.checkpoint import CheckpointError
from training.config import load_config
from training.export.bundle import ExportOptions, export_bundle
from training.export.diffusion_policy_t import export_graphs
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.torch_engine import TorchEngine
from training.trained import load_trained
from training.warm_start import PolicyWeights, WarmStartError, load_policy_weights, read_policy_weights

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "models/pusht_keypoints"
ROLES = ("encoder", "timestep", "denoiser")


def network_of(config: DiffusionPolicyTConfig, weights: PolicyWeights) -> DiffusionPolicyT:
    network = DiffusionPolicyT(config).eval().requires_grad_(False)
    network.load_state_dict(weights.state)
    return network


def largest_difference(network: DiffusionPolicyT, graphs: dict[str, bytes], config: DiffusionPolicyTConfig) -> float:
    """Largest difference of any output of any part between PyTorch and ONNX Runtime on the same inputs."""
    ours, theirs = TorchEngine(network), OnnxRuntimeEngine(graphs)
    generator = np.random.default_rng(0)
    observation = generator.uniform(-1, 1, (8, config.observation_horizon, config.observation_dim)).astype(np.float32)
    noisy = generator.standard_normal((8, config.horizon, config.action_dim)).astype(np.float32)
    every = np.arange(100)
    differences = [
        ours.timestep_kv(every) - theirs.timestep_kv(every),
        ours.observation_kv(observation) - theirs.observation_kv(observation),
    ]
    for step in (0, 37, 99):
        pair = [
            engine.denoise(
                noisy, engine.timestep_kv(np.array([step])).copy(), engine.observation_kv(observation).copy()
            )
            for engine in (ours, theirs)
        ]
        differences.append(pair[0] - pair[1])
    return max(float(np.abs(difference).max()) for difference in differences)


@pytest.fixture(scope="module")
def config(trained_run: Path) -> DiffusionPolicyTConfig:
    return load_trained(trained_run).config.policy


@pytest.fixture(scope="module")
def exported(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny run, whose weights are moved far from their start: training was short."""
    folder = tmp_path_factory.mktemp("warm_start")
    payload = torch.load(trained_run / "checkpoint.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for tensor in payload["ema"].values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    torch.save(payload, folder / "checkpoint.pt")
    export_bundle(folder, folder / "bundle", ExportOptions(variants=("fp32",)))
    return folder / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def rewrite(folder: Path, role: str, change: Callable[[onnx.GraphProto], None]) -> None:
    """Change an ONNX file of the bundle with ``change(graph)`` and seal the bundle again."""
    bundle = load_bundle(folder)
    variant = bundle.spec.variants[0]
    contents = {file.path: bundle.read(variant.name, name) for name, file in variant.files.items()}
    path = variant.files[role].path
    model = onnx.load_from_string(contents[path])
    change(model.graph)
    contents[path] = model.SerializeToString()
    files = dict(variant.files) | {role: file_spec(path, contents[path])}
    spec = bundle.spec.model_copy(update={"variants": (variant.model_copy(update={"files": files}),)})
    write_bundle(folder, spec, contents)


def constant(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def test_a_run_folder_and_its_checkpoint_give_the_averaged_weights(
    trained_run: Path, config: DiffusionPolicyTConfig
) -> None:
    expected = load_trained(trained_run).network.state_dict()
    for path in (trained_run, trained_run / "checkpoint.pt"):
        state = load_policy_weights(path, config)
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_bundle_gives_a_network_of_the_same_function(exported: Path, config: DiffusionPolicyTConfig) -> None:
    bundle = load_bundle(exported)
    weights = read_policy_weights(exported, config)
    graphs = {role: bundle.read("fp32", role) for role in ROLES}
    assert largest_difference(network_of(config, weights), graphs, config) < 1e-5


def test_a_bundle_gives_back_the_parameters_but_for_the_split_of_two_sums(
    exported: Path, config: DiffusionPolicyTConfig
) -> None:
    original = load_trained(exported.parent).network.state_dict()
    state = load_policy_weights(exported, config)
    assert list(state) == list(original)
    sums = {"action": state["action_position"], "observation": state["memory_position"][:, 1:]}
    for name, tensor in original.items():
        if name in ("action_position", "memory_position") or name.endswith("_embedding.bias"):
            continue
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=0.0, msg=name)
    torch.testing.assert_close(
        sums["action"], original["action_position"] + original["action_embedding.bias"], rtol=1e-6, atol=0.0
    )
    torch.testing.assert_close(
        sums["observation"],
        original["memory_position"][:, 1:] + original["observation_embedding.bias"],
        rtol=1e-6,
        atol=0.0,
    )
    torch.testing.assert_close(state["memory_position"][:, :1], original["memory_position"][:, :1], rtol=0, atol=1e-5)
    assert not state["action_embedding.bias"].any()


def test_exporting_again_gives_the_same_graphs(exported: Path, config: DiffusionPolicyTConfig) -> None:
    bundle = load_bundle(exported)
    again = export_graphs(network_of(config, read_policy_weights(exported, config)), 100)
    assert again["encoder"] == bundle.read("fp32", "encoder")  # heads of 16 channels: the fold is exact
    assert again["denoiser"] == bundle.read("fp32", "denoiser")


def test_the_shipped_bundle_is_reproduced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = DiffusionPolicyTConfig()
    weights = read_policy_weights(Path("pusht_keypoints"), config)  # by name
    assert weights.steps == 16_000
    bundle = load_bundle(SHIPPED)
    graphs = {role: bundle.read("fp32", role) for role in ROLES}
    # A table of the time token stored as float16 is off by up to half a step, which is 1e-3 at 2 to 4.
    allowed = 2e-3 if stored_as_half(bundle.spec.variant("fp32")) else 1e-5
    assert largest_difference(network_of(config, weights), graphs, config) < allowed


def test_a_score_scale_that_is_no_power_of_two_is_undone_to_rounding(exported: Path) -> None:
    torch.manual_seed(0)
    one_head = DiffusionPolicyTConfig(depth=1, heads=1, dim=32, ffn_ratio=1)
    network = DiffusionPolicyT(one_head).eval().requires_grad_(False)
    graphs = export_graphs(network, 100)
    folder = exported.parent / "one_head"
    write_graphs(exported, folder, graphs, {"depth": 1, "heads": 1, "ffn_dim": 32})
    weights = read_policy_weights(folder, one_head)
    torch.testing.assert_close(
        weights.state["blocks.0.self_attn.q.weight"], network.state_dict()["blocks.0.self_attn.q.weight"]
    )
    assert largest_difference(network_of(one_head, weights), graphs, one_head) < 1e-5


def write_graphs(source: Path, folder: Path, graphs: dict[str, bytes], architecture: dict[str, int]) -> None:
    """Write the bundle ``source`` with other graphs and sizes to ``folder``."""
    spec = load_bundle(source).spec
    variant = spec.variants[0]
    files = {role: file_spec(file.path, graphs[role]) for role, file in variant.files.items()}
    changed = spec.model_copy(
        update={
            "architecture": spec.architecture.model_copy(update=architecture),
            "variants": (variant.model_copy(update={"files": files}),),
        }
    )
    write_bundle(folder, changed, {file.path: graphs[role] for role, file in variant.files.items()})


def test_reading_draws_nothing_and_shares_nothing(
    exported: Path, trained_run: Path, config: DiffusionPolicyTConfig
) -> None:
    for path in (exported, trained_run):
        before = torch.random.get_rng_state()
        first = load_policy_weights(path, config)
        assert torch.equal(torch.random.get_rng_state(), before)
        again = load_policy_weights(path, config)
        kept = copy.deepcopy(again)
        for tensor in first.values():
            assert tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.requires_grad
            tensor.add_(1.0)
        assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
        storages = {tensor.untyped_storage().data_ptr() for tensor in again.values()}
        assert len(storages) == len(again)


def test_other_dropout_is_permitted_and_another_size_refused_by_field(
    exported: Path, trained_run: Path, config: DiffusionPolicyTConfig
) -> None:
    for path in (exported, trained_run):
        load_policy_weights(path, config.model_copy(update={"attention_dropout": 0.3}))
        with pytest.raises(WarmStartError, match=r"depth 2 \(this run: 3\)"):
            load_policy_weights(path, config.model_copy(update={"depth": 3}))
        with pytest.raises(WarmStartError, match=r"heads 2 \(this run: 4\)"):
            load_policy_weights(path, config.model_copy(update={"heads": 4}))
        with pytest.raises(WarmStartError, match="ffn_"):
            load_policy_weights(path, config.model_copy(update={"ffn_ratio": 4}))


def test_units_that_differ_from_the_weights_are_refused_by_key(
    exported: Path, trained_run: Path, config: DiffusionPolicyTConfig
) -> None:
    for path in (exported, trained_run):
        weights = read_policy_weights(path, config)
        observations, action = dict(weights.observation_norms), weights.action_norm
        weights.check_normalizers(observations, action)
        with pytest.raises(WarmStartError, match=r"agent_position, keypoints"):
            weights.check_normalizers(dict(reversed(observations.items())), action)
        moved = action.model_copy(update={"offset": tuple(value + 0.01 for value in action.offset)})
        with pytest.raises(WarmStartError, match="normalizer of action"):
            weights.check_normalizers(observations, moved)
        identity = NormalizerSpec(kind=NormalizerKind.IDENTITY)
        with pytest.raises(WarmStartError, match=r"normalizer of observations\.keypoints"):
            weights.check_normalizers(observations | {"keypoints": identity}, action)


def test_the_run_and_its_bundle_have_the_same_units(exported: Path, config: DiffusionPolicyTConfig) -> None:
    ours = read_policy_weights(exported.parent, config)
    theirs = read_policy_weights(exported, config)
    theirs.check_normalizers(ours.observation_norms, ours.action_norm)
    assert (ours.steps, ours.data_sha256) == (theirs.steps, theirs.data_sha256)


def test_an_identity_normalizer_equals_the_one_written_out(exported: Path, config: DiffusionPolicyTConfig) -> None:
    identity = NormalizerSpec(kind=NormalizerKind.IDENTITY)
    written = NormalizerSpec(kind=NormalizerKind.MEAN_STD, scale=(1.0, 1.0), offset=(0.0, 0.0))
    weights = PolicyWeights({}, {"x": identity}, written, 1, None, exported, "")
    weights.check_normalizers({"x": written}, identity)


def test_what_is_no_policy_is_refused_by_path(tmp_path: Path, config: DiffusionPolicyTConfig) -> None:
    with pytest.raises(WarmStartError, match=r"neither checkpoint\.pt nor bundle\.yaml"):
        load_policy_weights(tmp_path, config)
    with pytest.raises(WarmStartError, match=r"nowhere: no such run folder or checkpoint, and no bundle"):
        load_policy_weights(tmp_path / "nowhere", config)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        load_policy_weights(tmp_path, config)


def test_an_altered_bundle_is_refused(bundle: Path, config: DiffusionPolicyTConfig) -> None:
    file = bundle / "variants/fp32/denoiser.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"denoiser\.onnx"):
        load_policy_weights(bundle, config)


def test_a_bundle_without_full_precision_is_refused(bundle: Path, config: DiffusionPolicyTConfig) -> None:
    spec = load_bundle(bundle).spec
    variant = spec.variants[0]
    contents = {file.path: (bundle / file.path).read_bytes() for file in variant.files.values()}
    other = variant.model_copy(update={"precision": "w8a8"})
    write_bundle(bundle, spec.model_copy(update={"variants": (other,)}), contents)
    with pytest.raises(WarmStartError, match=r"none is of precision fp32, there is fp32 \(w8a8\)"):
        load_policy_weights(bundle, config)


def test_graphs_of_another_exporter_are_refused_by_constant(bundle: Path, config: DiffusionPolicyTConfig) -> None:
    def rename(graph: onnx.GraphProto) -> None:
        constant(graph, "blocks.1.fc1.weight").name = "weight_7"

    rewrite(bundle, "denoiser", rename)
    with pytest.raises(WarmStartError, match=r"denoiser\.onnx: no constant 'blocks\.1\.fc1\.weight'"):
        load_policy_weights(bundle, config)


def test_a_constant_of_another_shape_is_refused(bundle: Path, config: DiffusionPolicyTConfig) -> None:
    def shorten(graph: onnx.GraphProto) -> None:
        tensor = constant(graph, "blocks.1.fc1.bias")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:-1].copy(), tensor.name))

    rewrite(bundle, "denoiser", shorten)
    with pytest.raises(WarmStartError, match=r"'blocks\.1\.fc1\.bias' is float32 of shape \(63,\), expected .*\(64\)"):
        load_policy_weights(bundle, config)


def test_a_table_that_no_time_position_explains_is_refused(bundle: Path, config: DiffusionPolicyTConfig) -> None:
    def disturb(graph: onnx.GraphProto) -> None:
        tensor = constant(graph, "table")
        table = numpy_helper.to_array(tensor).copy()
        table[50:] += 0.01
        tensor.CopyFrom(numpy_helper.from_array(table, "table"))

    rewrite(bundle, "timestep", disturb)
    with pytest.raises(WarmStartError, match=r"timestep\.onnx: its table .* differs by 0\.0"):
        load_policy_weights(bundle, config)


def test_the_time_position_is_found_from_few_time_steps(trained_run: Path) -> None:
    network = load_trained(trained_run).network
    state = network.state_dict()
    table = network.timestep_keys_values(torch.arange(2))
    found = graph_weights.solve_time_position(state, table, network.frequencies)
    torch.testing.assert_close(found, state["memory_position"][0, 0], rtol=0, atol=1e-4)


def test_the_policy_of_a_bundle_is_the_same_bit_for_bit_whenever_it_is_read() -> None:
    """The library's least squares gave other last bits in one call of three, with its workspace elsewhere in memory."""
    folder = Path(__file__).parents[2] / "models" / "pusht_keypoints"
    config = load_config(Path(__file__).parents[2] / "config" / "training" / "pusht_keypoints.yaml").policy
    found, elsewhere = [], []
    for size in range(8):
        elsewhere.append(torch.zeros(1000 + 37 * size))
        found.append(read_policy_weights(folder, config).state["memory_position"])
    assert all(torch.equal(position, found[0]) for position in found)


def test_weights_from_which_no_time_token_follows_are_refused(trained_run: Path) -> None:
    network = load_trained(trained_run).network
    state = dict(network.state_dict())
    table = network.timestep_keys_values(torch.arange(4))
    for name in [name for name in state if ".cross_attn.k.w" in name or ".cross_attn.v.w" in name]:
        state[name] = torch.cat([torch.zeros_like(state[name][:, :1]), state[name][:, 1:]], dim=1)
    state["memory_position"] = state["memory_position"][:, 1:]
    with pytest.raises(WarmStartError, match=r"timestep\.onnx: .* deficient rank"):
        graph_weights.with_time_position(state, table, network.config, Path("timestep.onnx"))
