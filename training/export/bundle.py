"""From a checkpoint to a bundle: export, quantization, parity on the robot's runtime, and the record of all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dcqfa_ros.bundle.load import BUNDLE_YAML, load_bundle
from dcqfa_ros.bundle.schema import BundleSpec, LatencyRecord, QualityRecord
from dcqfa_ros.bundle.write import write_bundle
from training.config import override
from training.data.episodes import read_demonstrations
from training.export.calibration import denoise_chunks, quantize_policy, training_observations
from training.export.diffusion_policy_t import export_graphs
from training.export.records import Result
from training.export.variant import (
    ExportError,
    LayerRow,
    Tolerance,
    bits_of,
    entry,
    parity,
    recorded,
    versions,
)
from training.export.weights import LinearWeights
from training.policies.diffusion_policy_t import DiffusionPolicyT, parameter_count
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.quant.linear import QuantizedLinear
from training.space_counts import paper_bytes
from training.subnet import Layer, Precision, Subnet
from training.torch_engine import TorchEngine
from training.trained import load_trained

CALIBRATION_SEED = 256
PARITY_SEED = 257
PARITY_SAMPLES = 64
FP32_MAX_ABS = 1e-4  # normalised action units, over whole denoised chunks
# Of 0.02 is 5 px on the 512 px table. Against the network with the same quantizers: rounding differences of 1e-7 move
# single activations by a whole quantization step, and denoising carries that on.
TOLERANCE = {"fp32": Tolerance(1e-5, 1e-5, FP32_MAX_ABS), "w8a8": Tolerance(0.02, 0.005)}
DESCRIPTIONS = {
    "fp32": "full precision",
    "w8a8": "post-training 8-bit weights and activations; embeddings, memory MLP, attention products, norms and action "
    "head stay in floating point",
}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export.

    Attributes:
        variants: names from ``DESCRIPTIONS``, the default one first.
        calibration: observations that activation scales are found on.
        data: path of the demonstrations; None for the one the run used.
        quality: evaluations to record per variant; they must be of the weights that are written.
        latency: measured latencies to record per variant, likewise.
        threads: PyTorch threads.
    """

    variants: tuple[str, ...] = ("fp32", "w8a8")
    calibration: int = 256
    data: str | None = None
    quality: Mapping[str, tuple[Result[QualityRecord], ...]] = field(default_factory=dict)
    latency: Mapping[str, tuple[Result[LatencyRecord], ...]] = field(default_factory=dict)
    threads: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in DESCRIPTIONS]
        if unknown or not self.variants:
            raise ExportError(
                f"--variants {','.join(self.variants)}: {unknown[0] if unknown else 'nothing'} cannot be exported; "
                f"choose from {', '.join(DESCRIPTIONS)}"
            )
        if len(set(self.variants)) != len(self.variants):
            raise ExportError(f"--variants {','.join(self.variants)}: a variant is named twice")
        if self.calibration < 1:
            raise ExportError(f"--calibration: expected at least 1, got {self.calibration}")


def export_bundle(checkpoint: Path, folder: Path, options: ExportOptions) -> BundleSpec:
    """Write the bundle of a run folder or checkpoint to ``folder`` and return its specification.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        DataError: the demonstrations cannot be read.
        ExportError: an exported variant fails its parity check, or a result is of other weights, or the policy reads
            images; nothing is written.
        BundleError: ``folder`` cannot be replaced by a bundle.
    """
    trained = load_trained(checkpoint)
    meaning, network = trained.meaning, trained.network
    if trained.config.policy.image is not None:
        raise ExportError(
            f"{trained.path}: its policy reads images (policy.image), and the encoder of images cannot be exported; "
            "export a policy of key points. Nothing was written"
        )
    diffusion = meaning.specification().diffusion
    source = {} if options.data is None else {"path": options.data, "format": "auto"}
    demonstrations = read_demonstrations(override(trained.config, data=source).data)
    parity_inputs = training_observations(meaning, demonstrations, PARITY_SAMPLES, PARITY_SEED)
    torch.set_num_threads(options.threads)
    reference = denoise_chunks(TorchEngine(network, options.threads), diffusion, network.config, parity_inputs)

    variants, contents = [], {}
    for name in options.variants:
        exported, calibration, export_reference = network, None, reference
        if name == "w8a8":
            observations = training_observations(meaning, demonstrations, options.calibration, CALIBRATION_SEED)
            with tqdm(total=len(observations), desc="calibrate", unit="obs") as bar:
                exported = quantize_policy(network, diffusion, observations, options.threads, bar.update)
            calibration = {
                "samples": options.calibration,
                "seed": CALIBRATION_SEED,
                "data_sha256": demonstrations.sha256(),
            }
            engine = TorchEngine(exported, options.threads)
            export_reference = denoise_chunks(engine, diffusion, network.config, parity_inputs)
        graphs = export_graphs(exported, diffusion.train_timesteps)
        document, files = entry(name, DESCRIPTIONS[name], name, graphs, _rows(exported))
        contents.update(files)
        variants.append(
            {
                **document,
                "size": {
                    "parameters": parameter_count(network),
                    "paper_bytes": paper_bytes(diffusion_policy_t_shape(network.config), _whole(network, name)),
                    "disk_bytes": sum(len(data) for data in graphs.values()),
                },
                "calibration": calibration,
                "parity": parity(
                    name,
                    graphs,
                    diffusion,
                    network.config,
                    parity_inputs,
                    reference,
                    export_reference,
                    TOLERANCE[name],
                ),
            }
        )
    whole = {
        **meaning.fields(),
        "created_by": versions(),
        "default_variant": options.variants[0],
        "variants": variants,
    }
    spec = BundleSpec.model_validate_json(json.dumps(whole), strict=True)
    old = load_bundle(folder, verify=False).spec if (folder / BUNDLE_YAML).exists() else None
    spec = recorded(spec, old, options.quality, options.latency)
    write_bundle(folder, spec, contents)
    return spec


def _rows(exported: DiffusionPolicyT) -> list[LayerRow]:
    """Bits of every linear of a plain policy, quantized after training or not: written as asked for."""
    rows = []
    for name, module in exported.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            bits = bits_of(LinearWeights.of(module))
            rows.append(LayerRow(name, bits, bits))
    return rows


def _whole(network: DiffusionPolicyT, precision: str) -> Subnet:
    """The whole policy as the counts know it."""
    config = network.config
    bits = 8 if precision == "w8a8" else 32
    layer = Layer(config.heads, config.ffn_ratio * config.dim, bits, bits)
    return Subnet((layer,) * config.depth, Precision.INT if precision == "w8a8" else Precision.FP32)
