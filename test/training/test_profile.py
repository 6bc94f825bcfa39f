"""Measured tables: what is timed is what the robot runs, times become entries, an interrupted measurement continues."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from dcqfa_ros.devices.detect import detect
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from training import profile as profile_module
from training import profile_networks
from training.commands_profile import profile
from training.cost import block_bytes, cost
from training.export.diffusion_policy_t import Rest, export_graphs
from training.lut import CacheEffect, DeviceFacts, LookUpTable, load_table
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.profile import ProfileError, measure
from training.profile_check import fitted, random_subnet, validation
from training.profile_fit import MemoryFit, Timed, Weighed, fit_memory, fit_networks
from training.profile_graphs import FLOAT, FP8, HALF, INTEGER, INTEGER_A4, BlockSize, DiffusionPolicyTGraphs
from training.profile_runtime import Form, profiled_runtime
from training.profile_table import (
    CONTEXTS,
    DIFFUSION,
    SHALLOW,
    Facts,
    GroupTimes,
    Layout,
    ProfileSettings,
    SettingsError,
    table_of,
)
from training.profile_timing import BURST, SETTLE, TimedNetwork, time_in_turn, variant_of
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.space_counts import real_bytes
from training.subnet import Layer, Precision

POLICY = DiffusionPolicyTConfig(depth=4, heads=2, dim=32, ffn_ratio=2, horizon=6)
SECTION = {"min_depth": {"decoder": 2}, "head_ratios": [0.5, 1.0], "mlp_ratios": [0.5, 1.0], "precisions": ["fp32"]}
SPACE = SearchSpace(diffusion_policy_t_shape(POLICY, 5), SpaceConfig.model_validate_json(json.dumps(SECTION)))
FORMS = {Precision.INT: Form(INTEGER, 8), Precision.FP32: Form(FLOAT, 32)}
MEMORY = {precision: MemoryFit(1000, 0, 1.0) for precision in FORMS}
FACTS = Facts(DeviceFacts(name="x", fingerprint="x", memory_bytes=1), "onnxruntime", {}, FORMS, MEMORY, 0.1)
QUICK = ProfileSettings(name="here", runs=BURST, warm_ups=0, subnets=2)


def operators(data: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(data).graph.node)


@pytest.fixture(scope="module")
def table() -> LookUpTable:
    return measure(SPACE, DiffusionPolicyTGraphs(POLICY, 5), QUICK)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as if measured: two bytes for every byte of the denoiser's file, and one million."""

    def growth(runtime: str, threads: int, small: Any, variant: Any, on_gpu: bool) -> int:
        return 2 * len(variant[0]["denoiser"]) + 1_000_000

    monkeypatch.setattr(profile_networks, "engine_growth", growth)


# -- what is timed ----------------------------------------------------------------------------------------------------


def test_the_timed_graphs_have_the_operators_of_the_exported_ones() -> None:
    graphs, network = DiffusionPolicyTGraphs(POLICY, 5), DiffusionPolicyT(POLICY).eval()
    exported = export_graphs(network, 100)
    files, _ = variant_of(graphs, [BlockSize(2, 64, FLOAT)] * 4, 100)
    for role in ROLES:
        assert operators(exported[role]) == operators(files[role])


@pytest.mark.parametrize("executed", [INTEGER, INTEGER_A4, FLOAT, HALF, FP8])
def test_blocks_of_different_sizes_run_in_one_network(executed: str) -> None:
    graphs = DiffusionPolicyTGraphs(POLICY, 5)
    files, feeds = variant_of(graphs, [BlockSize(1, 64, executed), BlockSize(2, 32, executed)], 100)
    network = TimedNetwork(OnnxRuntimeEngine(files), feeds, DIFFUSION)
    assert network.encode().shape == (1, 6, 2, 16)
    chunk = network.chunk()
    assert chunk.shape == (1, 5, POLICY.action_dim)
    assert np.isfinite(chunk).all()


def test_the_timed_graphs_hold_what_their_arithmetic_says() -> None:
    graphs = DiffusionPolicyTGraphs(POLICY, 5)
    kinds = {}
    for executed in (INTEGER, INTEGER_A4, FLOAT, HALF, FP8):
        data, _ = graphs.step([BlockSize(2, 32, executed)])
        weights = [t for t in onnx.load_from_string(data).graph.initializer if t.name.startswith("blocks.0.")]
        kinds[executed] = {t.data_type for t in weights if t.name.endswith(".weight") and len(t.dims) == 2}
        assert operators(data)["QuantizeLinear"] == (6 if executed in (INTEGER, INTEGER_A4, FP8) else 0)
        assert operators(data)["Clip"] == (6 if executed == INTEGER_A4 else 0)
    assert kinds == {
        INTEGER: {TensorProto.INT8},
        INTEGER_A4: {TensorProto.INT8},
        FLOAT: {TensorProto.FLOAT},
        HALF: {TensorProto.FLOAT16},
        FP8: {TensorProto.FLOAT8E4M3FN},
    }
    with pytest.raises(ValueError, match="executed: expected one of int8"):
        graphs.step([BlockSize(2, 32, "ternary")])


@pytest.mark.parametrize("executed", [INTEGER, INTEGER_A4, FLOAT, HALF, FP8])
def test_no_two_blocks_hold_equal_weights(executed: str) -> None:
    """A runtime keeps equal packed weights once; equal blocks would take less time than different ones."""
    graphs = DiffusionPolicyTGraphs(POLICY, 5)
    files, _ = variant_of(graphs, [BlockSize(2, 64, executed)] * 4, 100)
    for role in ("encoder", "denoiser"):
        tensors = [t for t in onnx.load_from_string(files[role]).graph.initializer if len(t.dims) == 2]
        weights = [t.raw_data for t in tensors if t.name.startswith("blocks.") and t.name.endswith(".weight")]
        assert len(set(weights)) == len(weights)
        apart = 4 if executed in (INTEGER, INTEGER_A4, FP8) else 0  # each block rounds the memory tokens in its own way
        assert len(weights) == (apart if role == "encoder" else 4 * 6)


@pytest.mark.parametrize(("name", "executed"), [("w8a8", INTEGER), ("w4a4", INTEGER_A4)])
def test_the_timed_graphs_of_integers_have_the_operators_of_exported_subnets(name: str, executed: str) -> None:
    with torch.random.fork_rng(devices=[]):
        network = ElasticDiffusionPolicyT(POLICY).eval()
    for index, quantizer in enumerate(network.input_quantizers().values()):  # as after training: none alike
        quantizer.log_step.data += 0.01 * index
    extracted = network.extract(SPACE.parse(name)).eval()
    exported = export_graphs(extracted, 100, Rest.INT8)
    files, _ = variant_of(DiffusionPolicyTGraphs(POLICY, 5), [BlockSize(2, 64, executed)] * 4, 100)
    for role in ROLES:
        assert operators(exported[role]) == operators(files[role])
        assert stored(exported[role]) == stored(files[role])


def stored(data: bytes) -> Counter[str]:
    """Types of the weights, those of 4 bits as of 8, which is how they are executed."""
    tensors = [t for t in onnx.load_from_string(data).graph.initializer if t.name.endswith((".weight", "table"))]
    kinds = [t.data_type for t in tensors if len(t.dims) == 2]
    return Counter(TensorProto.INT8 if kind == TensorProto.INT4 else kind for kind in kinds)


def test_times_are_corrected_for_the_drift_that_the_reference_shows() -> None:
    now, calls = [0.0], [0]

    def work(milliseconds: float) -> Callable[[], object]:
        def run() -> None:
            calls[0] += 1
            slowness = 1.0 if calls[0] < 60 else 1.5  # the clock of the processor falls
            now[0] += 1e-3 * milliseconds * slowness

        return run

    timings = time_in_turn([work(2.0), work(3.0)], rounds=10, warm_ups=2, clock=lambda: now[0])
    assert timings[1].median_ms / timings[0].median_ms == pytest.approx(1.5)
    assert timings[1].spread_ms < 0.01 * timings[1].median_ms
    assert calls[0] == 2 * (2 + 10 * (BURST + SETTLE))


# -- from times to a table --------------------------------------------------------------------------------------------


def made_up_times(drift: float) -> dict[str, GroupTimes]:
    """Group times of blocks that take 16 heads + mlp microseconds a step, and heads microseconds per chunk."""
    steps, times = QUICK.diffusion.steps, {}
    for executed, factor in ((INTEGER, 1.0), ("float32", 4.0)):

        def chunk(*heads: int) -> float:
            return 0.05 + 1e-3 * sum(heads)

        def step(*sizes: tuple[int, int], factor: float = factor) -> float:
            return steps * (0.01 + factor * 1e-3 * sum(16 * h + m for h, m in sizes))

        context = [(2, 64)] * 2
        groups = {f"chunk {executed}": [chunk(2, 2), *(chunk(2, 2, h, h) for h in (1, 2))]}
        for number, h in enumerate((1, 2)):
            row = [step(*context), *(step(*context, (h, m), (h, m)) for m in (32, 64))]
            groups[f"step {executed} {h}"] = [value * drift**number for value in row]
        for depth in SHALLOW:
            row = [step(*context), *(step(*[(h, m)] * depth) for h in (1, 2) for m in (32, 64))]
            groups[f"shallow {executed} {depth}"] = row
        for key, row in groups.items():
            times[key] = GroupTimes(median_ms=tuple(row), spread_ms=tuple(0.0 for _ in row))
    times[CONTEXTS] = contexts_of(times)
    return times


def contexts_of(times: dict[str, GroupTimes]) -> GroupTimes:
    """The group of context networks, on a computer that does not drift."""
    contexts = tuple(times[f"step {executed} 1"].median_ms[0] for executed in (INTEGER, "float32"))
    return GroupTimes(median_ms=contexts, spread_ms=(0.0, 0.0))


@pytest.mark.parametrize("drift", [1.0, 1.1])
def test_differences_of_networks_give_blocks_and_what_is_left_the_fixed_parts(drift: float) -> None:
    table = table_of(SPACE, QUICK, made_up_times(drift), FACTS)
    table.check(SPACE)
    common = (1 + drift) / 2  # the median of two groups
    for entry in table.blocks:
        factor = 1.0 if entry.executed == INTEGER else 4.0
        assert entry.step_ms == pytest.approx(common * factor * 1e-3 * (16 * entry.heads + entry.mlp), rel=1e-4)
        assert entry.kv_ms == pytest.approx(1e-3 * entry.heads, rel=1e-3)
    for row in table.fixed:
        assert row.step_fixed_ms == pytest.approx(common * 0.01, rel=1e-3)
        assert row.encoder_ms == pytest.approx(0.05, rel=1e-3)


def test_a_computer_that_was_slower_for_one_form_does_not_make_that_form_look_slower() -> None:
    even, slower = made_up_times(1.0), made_up_times(1.0)
    for key, group in slower.items():
        if key.startswith(("step float32", "shallow float32")):
            slower[key] = group.model_copy(update={"median_ms": tuple(2.0 * ms for ms in group.median_ms)})
    assert table_of(SPACE, QUICK, slower, FACTS) == table_of(SPACE, QUICK, even, FACTS)


def test_a_reference_that_takes_less_than_its_blocks_beside_others_is_still_known() -> None:
    """Blocks cost more beside others than alone, so that nothing is left for the fixed part: it cannot be negative."""
    times = made_up_times(1.0)
    for key, group in times.items():
        if key.startswith("step float32"):
            context, *others = group.median_ms
            times[key] = group.model_copy(update={"median_ms": (context, *(3.0 * ms for ms in others))})
    table = table_of(SPACE, QUICK, times, FACTS)
    layout = Layout.of(SPACE, FORMS)
    bench = profile_networks.Workbench(
        SPACE, DiffusionPolicyTGraphs(POLICY, 5), QUICK, replace(profiled_runtime("onnxruntime", detect()), forms=FORMS)
    )
    kept = layout.context_ms(times, "float32") / 16
    assert fitted(table, bench, Precision.FP32, times, []).fixed_parts(
        SPACE.shape, Precision.FP32
    ).context_step_ms == pytest.approx(kept, abs=1e-6)
    rows = tuple(row.model_copy(update={"context_step_ms": kept}) for row in table.fixed)
    told = table.model_copy(update={"fixed": rows})
    chunk = layout.context_chunk_ms(times, "float32")
    assert bench.reference_ms(told, Precision.FP32) == pytest.approx(chunk, rel=1e-3)
    assert bench.reference_ms(table, Precision.FP32) > 2.0 * chunk  # of a table that does not tell
    expected = times[CONTEXTS].median_ms[1] + times["chunk float32"].median_ms[0]
    assert table.fixed_parts(SPACE.shape, Precision.FP32).step_fixed_ms == 0.0
    assert layout.context_chunk_ms(times, "float32") == pytest.approx(expected)


@pytest.mark.parametrize("saves", [False, True])
def test_all_networks_together_tell_blocks_and_what_a_cache_saves(saves: bool) -> None:
    """Times are made up of a fixed part, parts of blocks, and what networks below a limit save."""
    bench = profile_networks.Workbench(
        SPACE, DiffusionPolicyTGraphs(POLICY, 5), QUICK, replace(profiled_runtime("onnxruntime", detect()), forms=FORMS)
    )
    true = table_of(SPACE, QUICK, made_up_times(1.0), FACTS)
    sizes = [real_bytes(SPACE.shape, SPACE.largest(Precision.FP32)) * share for share in (0.1, 0.6)]
    slowest = max(entry.step_ms for entry in true.blocks if entry.executed == FLOAT)
    per_mb = 0.3 * slowest / (real_bytes(SPACE.shape, SPACE.largest(Precision.FP32)) / 4e6)
    effect = CacheEffect(low_bytes=int(sizes[0]), high_bytes=int(sizes[1]), ms_per_mb=per_mb if saves else 0.0)
    rows = tuple(r.model_copy(update={"cache": effect if r.precision is Precision.FP32 else None}) for r in true.fixed)
    true = true.model_copy(update={"fixed": rows})

    def step_ms(blocks: list[BlockSize]) -> float:
        fixed = true.fixed_parts(SPACE.shape, Precision.FP32)
        size = sum(
            block_bytes(SPACE.shape, 0, Layer(block.heads, block.mlp, 32, 32), Precision.FP32) for block in blocks
        )
        entries = {(e.heads, e.mlp): e.step_ms for e in true.blocks if e.executed == FLOAT}
        return fixed.step_fixed_ms + sum(entries[block.heads, block.mlp] for block in blocks) - effect.saved_ms(size)

    times = made_up_times(1.0)
    for key, networks in bench.layout.networks(SPACE, FLOAT):
        row = [16 * step_ms(blocks) for blocks in (bench.layout.context(FLOAT), *networks)]
        times[key] = GroupTimes(median_ms=tuple(row), spread_ms=(0.0,) * len(row))
    times[CONTEXTS] = contexts_of(times)
    generator = torch.Generator().manual_seed(0)
    subnets = [random_subnet(SPACE, Precision.FP32, generator) for _ in range(20)]
    measured = [(s, cost(true, SPACE.shape, s, 16).latency_ms) for s in subnets]
    rough = table_of(SPACE, QUICK, times, FACTS)
    table = fitted(rough, bench, Precision.FP32, times, measured[::2])
    assert (table.fixed_parts(SPACE.shape, Precision.FP32).cache is not None) is saves
    assert table.fixed_parts(SPACE.shape, Precision.INT) == rough.fixed_parts(SPACE.shape, Precision.INT)
    after = validation(table, SPACE.shape, Precision.FP32, measured[1::2], 16)
    assert after.max_absolute < 0.02
    if saves:
        assert validation(rough, SPACE.shape, Precision.FP32, measured[1::2], 16).max_absolute > 0.05
    reference = bench.reference(Precision.FP32)
    assert cost(table, SPACE.shape, reference, 16).latency_ms == pytest.approx(
        cost(true, SPACE.shape, reference, 16).latency_ms, rel=1e-3
    )


def test_a_network_that_was_held_up_does_not_bend_the_others() -> None:
    sizes = [BlockSize(h, m, FLOAT) for h in (1, 2, 3, 4) for m in (256, 512, 768, 1024)]

    def step_ms(blocks: tuple[BlockSize, ...]) -> float:
        return 0.02 + sum(0.03 + 0.01 * size.heads + 4e-5 * size.mlp for size in blocks)

    generator = np.random.default_rng(0)
    networks = [tuple(generator.choice(np.array(sizes, object), 1 + i % 8)) for i in range(60)]
    timed = [Timed(blocks, step_ms(blocks) * (1.6 if i % 10 == 0 else 1.0)) for i, blocks in enumerate(networks)]
    fit = fit_networks(timed, sizes, lambda size: 1000 * (64 * size.heads + size.mlp))
    errors = [
        fit.step_ms(blocks, lambda size: 1000 * (64 * size.heads + size.mlp)) / step_ms(blocks) - 1.0
        for blocks in networks
    ]
    assert max(map(abs, errors)) < 0.03


@given(
    workspace=st.integers(0, 10**7),
    block=st.integers(0, 10**6),
    copies=st.floats(0.5, 4.0),
    networks=st.lists(st.tuples(st.integers(10**5, 10**8), st.integers(2, 8)), min_size=4, max_size=8, unique=True),
)
def test_memory_is_explained_by_a_workspace_blocks_and_copies(
    workspace: int, block: int, copies: float, networks: list[tuple[int, int]]
) -> None:
    weighed = [Weighed(50_000, n, d, int(50_000 + workspace + d * block + copies * n)) for n, d in networks]
    fit = fit_memory(weighed)
    assert min(fit.workspace_bytes, fit.block_workspace_bytes, fit.weight_copies) >= 0
    for w in weighed:
        told = w.outside + fit.workspace_bytes + w.depth * fit.block_workspace_bytes + fit.weight_copies * w.blocks
        assert told == pytest.approx(w.total, rel=1e-3)


def test_random_subnets_are_of_the_asked_precision_and_of_all_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    for precision in SPACE.precisions:
        drawn = [random_subnet(SPACE, precision, generator) for _ in range(40)]
        for subnet in drawn:
            SPACE.check(subnet)
        assert {s.precision for s in drawn} == {precision}
        assert {s.depth for s in drawn} == {2, 3, 4}


# -- the measurement as a whole ---------------------------------------------------------------------------------------


def test_a_measured_table_covers_the_space_and_says_how_it_was_made(table: LookUpTable) -> None:
    table.check(SPACE)
    assert not table.modelled
    integers = {(form.w, form.a): form.executed for form in table.forms if form.precision is Precision.INT}
    assert integers == {(4, 4): INTEGER_A4, (8, 4): INTEGER_A4, (4, 8): INTEGER, (8, 8): INTEGER}
    assert table.method.runs == BURST
    assert [(report.precision, report.subnets) for report in table.validation] == [
        (Precision.INT, 1),
        (Precision.FP32, 1),
    ]
    low, high = (cost(table, SPACE.shape, subnet, 16) for subnet in (SPACE.smallest(), SPACE.largest(Precision.INT)))
    assert low.memory_bytes < high.memory_bytes
    assert table.runtime == "onnxruntime"
    assert table.versions["onnxruntime"] == onnxruntime.__version__
    notes = " ".join(table.method.notes)
    for word in (
        "clocks: ",
        "load average before",
        "the reference varied by",
        "clipping 4-bit",
    ):
        assert word in notes


def test_memory_is_told_by_what_some_networks_take(no_processes: None) -> None:
    table = measure(SPACE, DiffusionPolicyTGraphs(POLICY, 5), replace(QUICK, subnets=0))
    assert 800_000 < table.workspace_bytes < 1_100_000
    runtime, graphs = profiled_runtime("onnxruntime", detect()), DiffusionPolicyTGraphs(POLICY, 5)
    bench = profile_networks.Workbench(SPACE, graphs, QUICK, runtime)
    for subnet in (SPACE.smallest(), SPACE.largest(Precision.INT)):
        predicted = cost(table, SPACE.shape, subnet, 16).memory_bytes
        assert predicted == pytest.approx(bench.memory(subnet), rel=0.05)


def test_an_interrupted_measurement_continues_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_processes: None
) -> None:
    progress, timed = tmp_path / "progress.json", []

    def time(networks: Any, *args: Any) -> Any:
        if len(timed) == 4:
            raise KeyboardInterrupt
        timed.append(networks)
        return time_in_turn(networks, *args)

    graphs = DiffusionPolicyTGraphs(POLICY, 5)
    monkeypatch.setattr(profile_module, "time_in_turn", time)
    with pytest.raises(KeyboardInterrupt):
        measure(SPACE, graphs, QUICK, progress)
    kept = json.loads(progress.read_text())["results"]
    assert len(kept) == 4
    with pytest.raises(ProfileError, match=r"progress\.json: begun with other settings"):
        measure(SPACE, graphs, ProfileSettings(name="here", runs=2 * BURST, warm_ups=0), progress)
    again = []

    def count(networks: Any, *args: Any) -> Any:
        again.append(networks)
        return time_in_turn(networks, *args)

    monkeypatch.setattr(profile_module, "time_in_turn", count)
    measure(SPACE, graphs, QUICK, progress).check(SPACE)
    assert len(again) == 21 - 4
    assert json.loads(progress.read_text())["results"].items() >= kept.items()
    progress.write_text("{")
    with pytest.raises(ProfileError, match=r"progress\.json: no readable progress"):
        measure(SPACE, graphs, QUICK, progress)


def test_an_engine_that_does_not_multiply_integers_gives_no_table() -> None:
    runtime = replace(profiled_runtime("onnxruntime", detect()), integer_weights=lambda *_: {"blocks.0.fc1.weight"})
    with pytest.raises(ProfileError, match="multiplies integers in 1 of 6 linears"):
        measure(SPACE, DiffusionPolicyTGraphs(POLICY, 5), QUICK, runtime=runtime)


def test_impossible_settings_are_named() -> None:
    for field, value in (("threads", 0), ("runs", 0), ("warm_ups", -1), ("subnets", -1)):
        with pytest.raises(SettingsError, match=field.replace("_", "-")):
            ProfileSettings(**{"name": "x", field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens: expected 1 to 6, got 7"):
        DiffusionPolicyTGraphs(POLICY, 7)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = Path(__file__).parents[2] / "config" / "training" / "pusht_keypoints.yaml"
    document = yaml.safe_load(file.read_text())
    document["policy"] = POLICY.model_dump(mode="json")
    document["executed_actions"] = 4
    document["supernet"] = {"warm_start": "pusht_keypoints", "space": SECTION}
    path = tmp_path / "supernet.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    profile(parser.add_subparsers())
    args = parser.parse_args([str(argument) for argument in arguments])
    return int(args.func(args))


def test_the_command_measures_the_executed_tokens_and_the_whole_horizon(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], no_processes: None
) -> None:
    out = tmp_path / "tables" / "cpu.json"
    options = ("--runs", 5, "--warm-ups", 0, "--subnets", 1, "--json")
    assert run("profile", "--config", config, "--out", out, *options) == 0
    table = load_table(out)
    assert table.name == "cpu"
    assert {entry.tokens for entry in table.blocks} == {5, 6}
    assert json.loads(capsys.readouterr().out)["entries"] == len(table.blocks)
    assert [file.name for file in out.parent.iterdir()] == ["cpu.json"]


def test_the_command_models_a_device(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "orin_nx_16gb.json"
    begun = tmp_path / ".orin_nx_16gb.json.5_tokens.progress"
    begun.write_text("of a measurement")
    assert run("profile", "--config", config, "--model", "orin_nx_16gb", "--tokens", 5, "--out", out) == 0
    assert begun.read_text() == "of a measurement"
    load_table(out).check(SPACE)
    assert "modelled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "abacus"), "--model abacus: unknown; there is orin_nx_16gb, orin_nx_8gb"),
        (("--runtime", "abacus"), "runtime 'abacus' is unknown; there are onnxruntime, openvino"),
        (("--table", "x.json"), "--table: is for --validate N"),
        (("--validate", "2"), "--out: --validate N compares N subnets with an existing table and writes none"),
        (("--validate", "2", "--subnets", "3"), "--(out|subnets): --validate N compares"),
        (("--seed", "2"), "--seed: is for --validate N"),
        *(
            (("--model", "orin_nx_16gb", option, "3"), f"{option}: --model measures nothing")
            for option in ("--threads", "--runtime", "--runs", "--warm-ups", "--subnets", "--name", "--seed")
        ),
        (("--tokens", "five"), "--tokens five: expected whole numbers"),
        (("--tokens", "7"), "--tokens 7: expected numbers from 1 to the horizon 6"),
        (("--threads", "0"), "threads: expected at least 1, got 0"),
    ],
)
def test_the_command_names_what_it_cannot_use(
    tmp_path: Path, config: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run("profile", "--config", config, "--out", tmp_path / "x.json", *arguments)


def test_a_configuration_without_a_space_is_named(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "config" / "training" / "pusht_keypoints.yaml"
    with pytest.raises(UserError, match="it has no section supernet"):
        run("profile", "--config", file, "--out", tmp_path / "x.json")
