"""From a checkpoint to a bundle: export, quantization, parity on the robot's runtime, and the record of all of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dcqfa_ros.bundle.schema import BundleSpec, DiffusionSpec, LatencyRecord, QualityRecord
from dcqfa_ros.bundle.write import file_spec, write_bundle
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from training.config import override
from training.data.episodes import read_demonstrations
from training.export.calibration import Float, denoise_chunks, quantize_policy, training_observations
from training.export.diffusion_policy_t import export_graphs, graph_weights
from training.export.executed import RUNTIME, integer_weights
from training.export.graph import OPSET
from training.export.records import Result
from training.policies.diffusion_policy_t import DiffusionPolicyT, parameter_count
from training.quant.linear import QuantizedLinear
from training.torch_engine import TorchEngine
from training.trained import load_trained

CALIBRATION_SEED = 256
PARITY_SEED = 257
PARITY_SAMPLES = 64
FP32_MAX_ABS = 1e-4  # normalised action units, over whole denoised chunks
TOLERANCE_RMS = {"fp32": 1e-5, "w8a8": 0.02}  # 0.02 is 5 px on the 512 px table
# Against the network with the same quantizers. Rounding differences of 1e-7 move single activations by a whole
# quantization step, and denoising carries that on: integer arithmetic agrees less closely than floating point.
TOLERANCE_EXPORT_RMS = {"fp32": 1e-5, "w8a8": 0.005}
PACKAGES = ("dcqfa_ros", "torch", "onnx", "onnxruntime", "numpy")
DESCRIPTIONS = {
    "fp32": "full precision",
    "w8a8": "post-training 8-bit weights and activations; embeddings, memory MLP, attention products, norms and action "
    "head stay in floating point",
}


class ExportError(UserError):
    """A policy that cannot be exported, or an export that does not agree with the network it comes from."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export.

    Attributes:
        variants: names from ``DESCRIPTIONS``, the default one first.
        calibration: observations that activation scales are found on.
        data: path of the demonstrations; None for the one the run used.
        quality: evaluations to record per variant; they must be of the weights that are written.
        latency: measured latencies to record per variant, likewise; those of variants that are not exported are left
            out.
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
        absent = sorted(set(self.quality) - set(self.variants))
        if absent:
            raise ExportError(
                f"--quality {absent[0]}: that variant is not exported (--variants {','.join(self.variants)})"
            )


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
        files = {role: (f"variants/{name}/{role}.onnx", data) for role, data in graphs.items()}
        contents.update(dict(files.values()))
        described = {role: file_spec(path, data).model_dump(mode="json") for role, (path, data) in files.items()}
        _check_weights(name, described["denoiser"]["sha256"], options)
        layers = _layers(network, exported, graphs)
        variants.append(
            {
                "name": name,
                "description": DESCRIPTIONS[name],
                "precision": name,
                "opset": OPSET,
                "files": described,
                "layers": layers,
                "size": {
                    "parameters": parameter_count(network),
                    "paper_bytes": _paper_bytes(network, layers),
                    "disk_bytes": sum(len(data) for data in graphs.values()),
                },
                "calibration": calibration,
                "latency": [result.record.model_dump(mode="json") for result in options.latency.get(name, ())],
                "quality": [result.record.model_dump(mode="json") for result in options.quality.get(name, ())],
                "parity": _parity(name, graphs, diffusion, network, parity_inputs, reference, export_reference),
            }
        )
    document = {
        **meaning.fields(),
        "created_by": _versions(),
        "default_variant": options.variants[0],
        "variants": variants,
    }
    spec = BundleSpec.model_validate_json(json.dumps(document), strict=True)
    write_bundle(folder, spec, contents)
    return spec


def _parity(
    name: str,
    graphs: Mapping[str, bytes],
    diffusion: DiffusionSpec,
    network: DiffusionPolicyT,
    inputs: Float,
    reference: Float,
    export_reference: Float,
) -> dict[str, Any]:
    """Error of whole denoised chunks on ONNX Runtime.

    ``reference`` holds the chunks of the full-precision network, ``export_reference`` those of the network that was
    exported, quantized where it is.
    """
    engine = OnnxRuntimeEngine(graphs, name=name)
    try:
        chunks = denoise_chunks(engine, diffusion, network.config, inputs)
    finally:
        engine.close()
    maximum, rms = float(np.abs(chunks - reference).max()), _rms(chunks, reference)
    export_rms = _rms(chunks, export_reference)
    if not export_rms <= TOLERANCE_EXPORT_RMS[name]:
        raise ExportError(
            f"variant {name}: denoised chunks on ONNX Runtime differ from the network with the same quantizers by rms "
            f"{export_rms:.3g} (normalised units); allowed is {TOLERANCE_EXPORT_RMS[name]:g}. Nothing was written"
        )
    if not rms <= TOLERANCE_RMS[name] or (name == "fp32" and maximum > FP32_MAX_ABS):
        raise ExportError(
            f"variant {name}: denoised chunks on ONNX Runtime differ from the network by rms {rms:.3g}, maximum "
            f"{maximum:.3g} (normalised units); allowed is rms {TOLERANCE_RMS[name]:g}. Nothing was written"
        )
    return {
        "samples": len(inputs),
        "max_abs": maximum,
        "rms": rms,
        "tolerance_rms": TOLERANCE_RMS[name],
        "export_rms": export_rms,
        "tolerance_export_rms": TOLERANCE_EXPORT_RMS[name],
    }


def _rms(chunks: Float, reference: Float) -> float:
    return float(np.sqrt(np.square((chunks - reference).astype(np.float64)).mean()))


def _check_weights(name: str, weights: str, options: ExportOptions) -> None:
    """Refuse results that were obtained with other weights than those about to be written."""
    for option, results in (("--quality", options.quality), ("--latency", options.latency)):
        for result in results.get(name, ()):
            if result.weights != weights:
                raise ExportError(
                    f"{option} {result.file}: was obtained with other weights of variant {name} (denoiser "
                    f"{result.weights[:12]}..., now {weights[:12]}...); repeat it with this export. Nothing was written"
                )


def _versions() -> dict[str, str]:
    """Versions of what makes a bundle, by package; one that is not installed as a package is left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _layers(network: DiffusionPolicyT, exported: DiffusionPolicyT, graphs: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Bits of every linear as asked for, as written, and as ONNX Runtime executes them (from its optimized graphs)."""
    integers = integer_weights(graphs["encoder"], "encoder.onnx") | integer_weights(graphs["denoiser"], "denoiser.onnx")
    rows = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        written = _bits(exported.get_submodule(name))
        executed = written if integers.intersection(graph_weights(name)) else _bits(module)
        rows.append({"layer": name, "searched": written, "exported": written, "executed": {RUNTIME: executed}})
    return rows


def _bits(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, QuantizedLinear):
        return {"weight": module.bits.weight, "activation": module.bits.activation, "kind": "int"}
    return {"weight": 32, "activation": 32, "kind": "float"}


def _paper_bytes(network: DiffusionPolicyT, layers: list[dict[str, Any]]) -> int:
    """Parameters x bits / 8 without scales: weights by their layer's bits, everything else at 32 bits."""
    bits = {row["layer"]: row["exported"]["weight"] for row in layers}
    total = 0
    for name, parameter in network.named_parameters():
        layer, _, kind = name.rpartition(".")
        total += parameter.numel() * (bits.get(layer, 32) if kind == "weight" else 32)
    return total // 8
