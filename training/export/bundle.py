"""From a checkpoint to a bundle: export, quantization, parity on the robot's runtime, and the record of all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dcqfa_ros.bundle.load import BUNDLE_YAML, Bundle, load_bundle
from dcqfa_ros.bundle.schema import BundleSpec, LatencyRecord, QualityRecord
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.runtime.record_chunks import with_fixed_chunks
from training.config import override
from training.data.episodes import read_demonstrations
from training.export.beside import check_same_policy, merged
from training.export.calibration import Float, denoise_chunks, known_tokens, quantize_policy, training_observations
from training.export.diffusion_policy_t import export_graphs, graph_weights
from training.export.half import HalfTablePolicy, half_graphs, round_weights, stored_names
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
from training.trained import TrainedPolicy, load_trained

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

STORED = ("float32", "float16")
HALF_DESCRIPTION = "full precision, weights stored as float16"


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
        store: the type that the full-precision variant's weights are stored in, from ``STORED``. With float16 the
            policy's weights are rounded to it before anything is exported, quantized variants included; everything is
            computed in float32 as before.
        keep: leave the other variants of a bundle that is in the folder as they are, and its default variant.
    """

    variants: tuple[str, ...] = ("fp32", "w8a8")
    calibration: int = 256
    data: str | None = None
    quality: Mapping[str, tuple[Result[QualityRecord], ...]] = field(default_factory=dict)
    latency: Mapping[str, tuple[Result[LatencyRecord], ...]] = field(default_factory=dict)
    threads: int = 1
    store: str = "float32"
    keep: bool = False

    def __post_init__(self) -> None:
        if self.store not in STORED:
            raise ExportError(f"--store {self.store}: expected one of {', '.join(STORED)}")
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


def export_bundle(source: Path | TrainedPolicy, folder: Path, options: ExportOptions) -> BundleSpec:
    """Write a policy's bundle to ``folder`` and return its specification.

    Args:
        source: the policy, or the run folder or checkpoint that holds it.
        folder: of the bundle; an older one is replaced.
        options: what to export.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        DataError: the demonstrations cannot be read.
        ExportError: an exported variant fails its parity check, or a result is of other weights, or the policy reads
            images; nothing is written.
        BundleError: ``folder`` cannot be replaced by a bundle.
    """
    trained = source if isinstance(source, TrainedPolicy) else load_trained(source)
    meaning, network = trained.meaning, trained.network
    if trained.config.policy.image is not None:
        raise ExportError(
            f"{trained.path}: its policy reads images (policy.image), and the encoder of images cannot be exported; "
            "export a policy of key points. Nothing was written"
        )
    diffusion = meaning.specification().diffusion
    elsewhere = {} if options.data is None else {"path": options.data, "format": "auto"}
    demonstrations = read_demonstrations(override(trained.config, data=elsewhere).data)
    parity_inputs = training_observations(meaning, demonstrations, PARITY_SAMPLES, PARITY_SEED)
    known = known_tokens(meaning, demonstrations, PARITY_SAMPLES, PARITY_SEED)
    torch.set_num_threads(options.threads)

    def chunks_of(policy: DiffusionPolicyT) -> Float:
        engine = TorchEngine(policy, options.threads)
        return denoise_chunks(engine, diffusion, network.config, parity_inputs, known=known)

    # The policy is the rounded one where its weights are stored so, and everything is compared with that.
    half, steps = options.store == "float16", diffusion.train_timesteps
    network = round_weights(network, steps) if half else network
    policy = HalfTablePolicy(network, steps) if half else network
    reference = chunks_of(policy)

    variants, contents = [], {}
    for name in options.variants:
        exported, calibration, export_reference = network, None, reference
        if name == "w8a8":
            observations = training_observations(meaning, demonstrations, options.calibration, CALIBRATION_SEED)
            with tqdm(total=len(observations), desc="calibrate", unit="obs") as bar:
                calibrated = known_tokens(meaning, demonstrations, options.calibration, CALIBRATION_SEED)
                exported = quantize_policy(
                    network, diffusion, observations, options.threads, bar.update, known=calibrated
                )
            calibration = {
                "samples": options.calibration,
                "seed": CALIBRATION_SEED,
                "data_sha256": demonstrations.sha256(),
            }
            export_reference = chunks_of(exported)
        description = DESCRIPTIONS[name]
        if isinstance(policy, HalfTablePolicy) and name == "fp32":
            graphs, description = half_graphs(policy, steps), HALF_DESCRIPTION
        else:
            graphs = export_graphs(exported, steps)
        document, files = entry(name, description, name, graphs, _rows(exported, stored_names(graphs)))
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
                    known,
                ),
            }
        )
    there = load_bundle(folder, verify=options.keep) if (folder / BUNDLE_YAML).exists() else None
    whole = {**meaning.fields(), "created_by": versions(), "default_variant": options.variants[0]}
    if options.keep and there is not None:
        whole, variants, contents = _beside(there, meaning.specification(), trained.path, whole, variants, contents)
    spec = BundleSpec.model_validate_json(json.dumps(whole | {"variants": variants}), strict=True)
    old = None if there is None else there.spec
    spec = with_fixed_chunks(recorded(spec, old, options.quality, options.latency), contents, threads=options.threads)
    write_bundle(folder, spec, contents)
    return spec


def _beside(
    there: Bundle,
    ours: BundleSpec,
    path: Path,
    whole: dict[str, Any],
    made: Sequence[dict[str, Any]],
    contents: Mapping[str, bytes],
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes]]:
    """Document without variants, variants and files of the bundle that is there with the variants made in it.

    A variant that stays and follows the bundle's training record must follow the same one afterwards.
    """
    check_same_policy(there.folder, there.spec, ours, path)
    kept = there.spec.model_dump(mode="json")
    if kept["training"] != whole["training"] and any(
        variant.training is None and variant.name not in {document["name"] for document in made}
        for variant in there.spec.variants
    ):
        raise ExportError(
            f"{there.folder}: its training record is not that of {path}, and variants that stay follow it; export "
            "without --keep, or give another --out. Nothing was written"
        )
    documents, files = merged(kept["variants"], made, there)
    return whole | {"default_variant": kept["default_variant"]}, documents, files | dict(contents)


def _rows(exported: DiffusionPolicyT, stored: frozenset[str]) -> list[LayerRow]:
    """Bits of every linear of a plain policy, quantized after training or not: written as asked for.

    ``stored`` names the weights of the graphs that are only stored as float16.
    """
    rows = []
    for name, module in exported.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            bits = bits_of(LinearWeights.of(module))
            half = not stored.isdisjoint(graph_weights(name))
            rows.append(LayerRow(name, bits, bits.model_copy(update={"weight": 16}) if half else bits))
    return rows


def _whole(network: DiffusionPolicyT, precision: str) -> Subnet:
    """The whole policy as the counts know it."""
    config = network.config
    bits = 8 if precision == "w8a8" else 32
    layer = Layer(config.heads, config.ffn_ratio * config.dim, bits, bits)
    return Subnet((layer,) * config.depth, Precision.INT if precision == "w8a8" else Precision.FP32)
