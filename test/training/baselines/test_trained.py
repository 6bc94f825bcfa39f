"""Methods that train: their networks become plain linears without a change, and foreign runs are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.baselines import BaselineError, find_baseline, parse_bits
from training.baselines.artifact import load_artifact, save_artifact
from training.baselines.calibration import Calibration
from training.baselines.elastic import extracted, same_teacher
from training.checkpoint import CheckpointError
from training.config import TrainConfig, load_config
from training.nn.elastic import Arithmetic, InputQuantizer, integer_bits
from training.quant.batchquant import BatchQuant, reestimated_ranges
from training.supernet import SupernetTrainer
from training.supernet_checkpoint import load_supernet
from training.trained import TrainedPolicy

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def sqil_run(supernet_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of one network at 4 bits."""
    config = supernet_config(supernet={"only": "w4a4"}, run={"steps": 2})
    trainer = SupernetTrainer(config, tmp_path_factory.mktemp("sqil"))
    assert trainer.run()
    return trainer.folder


@pytest.fixture(scope="session")
def batchquant_run(supernet_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of a supernet with ranges from batches."""
    config = supernet_config(
        supernet={"activations": "batchquant", "sampler": {"kind": "uniform"}}, run={"steps": 4, "validate_every": 4}
    )
    trainer = SupernetTrainer(config, tmp_path_factory.mktemp("batchquant"))
    assert trainer.run()
    return trainer.folder


def test_trained_network_becomes_plain_linears_without_a_change(
    sqil_run: Path, teacher: TrainedPolicy, calibration: Calibration, tmp_path: Path
) -> None:
    quantized = find_baseline("sqil").quantize(teacher, parse_bits("w4a4"), calibration, trained=sqil_run)
    _, alone = load_supernet(sqil_run).subnet("w4a4")
    call = calibration.calls[1]
    arguments = (call.noisy, call.timesteps, call.observation)
    assert torch.allclose(quantized.network(*arguments), alone(*arguments), atol=1e-5)
    assert quantized.report["executes_as"].startswith("INT8 products (4-bit codes too")
    assert "static activation scales" in quantized.report["executes_as"]
    assert quantized.report["training_steps"] == 2
    loaded, _ = load_artifact(save_artifact(tmp_path / "out", teacher, quantized))
    assert torch.equal(loaded.network(*arguments), quantized.network(*arguments))


@pytest.mark.parametrize("bits", ["w4a4", "w8a8", "fp8"])
def test_batchquant_network_runs_with_ranges_of_its_own(
    bits: str, batchquant_run: Path, teacher: TrainedPolicy, calibration: Calibration, tmp_path: Path
) -> None:
    quantized = find_baseline("batchquant").quantize(teacher, parse_bits(bits), calibration, trained=batchquant_run)
    alone = extracted(load_supernet(batchquant_run, batch_ranges=True), bits)
    with reestimated_ranges(alone), torch.no_grad():
        calibration.run(alone)
    call = calibration.calls[1]
    arguments = (call.noisy, call.timesteps, call.observation)
    assert torch.allclose(quantized.network(*arguments), alone(*arguments), atol=1e-4)
    assert ("zero points" in quantized.report["executes_as"]) == (bits != "fp8")
    loaded, _ = load_artifact(save_artifact(tmp_path / "out", teacher, quantized))
    assert torch.equal(loaded.network(*arguments), quantized.network(*arguments))


def test_batchquant_training_learns_corrections_and_resumes(
    batchquant_run: Path, supernet_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    supernet = load_supernet(batchquant_run, batch_ranges=True)
    states = [q.batch for q in supernet.network.input_quantizers().values()]
    assert any(float(batch.shift.abs().max()) > 0.0 for batch in states if batch is not None)
    assert any(len(set(batch.raw_gain.tolist())) > 1 for batch in states if batch is not None)
    config = supernet.meaning.config
    half = SupernetTrainer(config, tmp_path / "half")
    for _ in range(2):
        half.train_step()
    half.save()
    rest = SupernetTrainer(config, tmp_path / "half")
    assert rest.step == 2
    for _ in range(2):
        rest.train_step()
    for name, tensor in rest.ema.state_dict().items():
        if not name.endswith(("minimum", "maximum", "batches")):  # of whatever subnet was validated last
            assert torch.equal(tensor, supernet.network.state_dict()[name]), name


def test_batchquant_supernet_is_refused_where_no_ranges_are_estimated(batchquant_run: Path) -> None:
    with pytest.raises(CheckpointError, match="dcqfa baseline batchquant"):
        load_supernet(batchquant_run)


def test_runs_of_another_kind_are_refused(
    sqil_run: Path, batchquant_run: Path, supernet_run: Path, teacher: TrainedPolicy, calibration: Calibration
) -> None:
    w4a4, w8a8 = parse_bits("w4a4"), parse_bits("w8a8")
    for method, bits, run, message in (
        ("sqil", w4a4, supernet_run, "is a supernet's run"),
        ("sqil", w8a8, sqil_run, "was trained at w4a4, not at w8a8"),
        ("sqil", w4a4, None, "give a run of its own"),
        ("sqil", parse_bits("w4a16"), sqil_run, "trains 4 and 8 bits"),
        ("batchquant", w4a4, supernet_run, "no BatchQuant supernet"),
        ("batchquant", w4a4, sqil_run, "no BatchQuant supernet"),
        ("batchquant", parse_bits("w2a8"), batchquant_run, "trains 4 and 8 bits"),
    ):
        with pytest.raises(BaselineError, match=message):
            find_baseline(method).quantize(teacher, bits, calibration, trained=run)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        find_baseline("sqil").quantize(teacher, w4a4, calibration, trained=Path("nowhere"))


def test_runs_of_another_teacher_or_data_are_refused(
    sqil_run: Path, teacher: TrainedPolicy, calibration: Calibration
) -> None:
    bits = parse_bits("w4a4")
    silent = replace(teacher, meaning=replace(teacher.meaning, data_sha256=None))  # as an old bundle is
    others = replace(calibration, data_sha256="0" * 64)
    with pytest.raises(BaselineError, match="other data"):
        find_baseline("sqil").quantize(silent, bits, others, trained=sqil_run)
    changed = copy.deepcopy(teacher.network)
    changed.head.bias += 1.0
    with pytest.raises(BaselineError, match="another teacher"):
        find_baseline("sqil").quantize(replace(teacher, network=changed), bits, calibration, trained=sqil_run)


def test_teacher_whose_biases_were_summed_is_the_same_one(sqil_run: Path, teacher: TrainedPolicy) -> None:
    summed = copy.deepcopy(teacher.network)  # as a bundle's graphs hold them
    shift = summed.action_embedding.bias.clone()
    summed.action_embedding.bias.zero_()
    summed.action_position += shift
    assert same_teacher(load_supernet(sqil_run), replace(teacher, network=summed))


@pytest.mark.parametrize("name", ["sqil", "batchquant"])
def test_committed_configurations_train_what_the_methods_need(name: str) -> None:
    config = load_config(ROOT / f"config/training/pusht_keypoints_{name}.yaml")
    reference = load_config(ROOT / "config/training/pusht_keypoints_supernet.yaml")
    assert config.supernet is not None
    assert reference.supernet is not None
    for section in ("policy", "data", "diffusion", "optimizer", "ema", "run"):
        assert getattr(config, section) == getattr(reference, section)
    for field in ("warm_start", "space", "distillation", "saliency_percentile", "calibration", "step_learning_rate"):
        assert getattr(config.supernet, field) == getattr(reference.supernet, field)
    if name == "sqil":
        assert config.supernet.only == "w4a4"
        assert config.supernet.activations == "learned"
    else:
        assert config.supernet.sandwich == reference.supernet.sandwich
        assert config.supernet.activations == "batchquant"
        assert config.supernet.sampler.kind == "uniform"


@pytest.mark.parametrize("width", [4, 8])
def test_supernets_layers_have_the_gradients_of_the_quantizer_alone(width: int) -> None:
    quantizer = InputQuantizer()
    quantizer.batch = BatchQuant()
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 5, generator=generator), torch.randn(3, 5, generator=generator)
    found = []
    for through_layer in (True, False):
        quantizer.batch.zero_grad()
        leaf = x.clone().requires_grad_()
        if through_layer:
            codes, scale = quantizer(leaf, Arithmetic.INTEGER, integer_bits(8, width))
            assert scale is not None
            y = (codes @ weight.t()) * scale
        else:
            y = quantizer.batch(leaf, width) @ weight.t()
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad, quantizer.batch.raw_gain.grad.clone(), quantizer.batch.shift.grad.clone()))
    assert float(found[0][2].abs().max()) > 0.0
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)
