"""From a checkpoint to a bundle: export, quantization, parity on the robot's runtime, and the record of all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from training.export.calibration import Float, denoise_chunks, quantize_policy, training_observations
from training.export.diffusion_policy_t import export_graphs
from training.export.executed import RUNTIME, integer_weights
from training.export.graph import OPSET
from training.policies.diffusion_policy_t import DiffusionPolicyT, parameter_count
from training.quant.linear import QuantizedLinear
from training.torch_engine import TorchEngine
from training.trained import load_trained

CALIBRATION_SEED = 256
PARITY_SEED = 257
PARITY_SAMPLES = 64
FP32_MAX_ABS = 1e-4  # normalised action units, over whole denoised chunks
TOLERANCE_RMS = {"fp32": 1e-5, "w8a8": 0.02}  # 0.02 is 5 px on the 512 px table
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
        quality: evaluations to record per variant.
        latency: measured latencies to record per variant; those of variants that are not exported are left out.
        threads: PyTorch threads.
    """

    variants: tuple[str, ...] = ("fp32", "w8a8")
    calibration: int = 256
    data: str | None = None
    quality: Mapping[str, tuple[QualityRecord, ...]] = field(default_factory=dict)
    latency: Mapping[str, tuple[LatencyRecord, ...]] = field(default_factory=dict)
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
        ExportError: an exported variant fails its parity check; nothing is written.
        BundleError: ``folder`` cannot be replaced by a bundle.
    """
    trained = load_trained(checkpoint)
    meaning, network = trained.meaning, trained.network
    diffusion = meaning.specification().diffusion
    data = override(trained.config, data={"path": options.data}).data
    parity_inputs = training_observations(meaning, data, PARITY_SAMPLES, PARITY_SEED)
    torch.set_num_threads(options.threads)
    reference = denoise_chunks(TorchEngine(network, options.threads), diffusion, network.config, parity_inputs)

    variants, contents = [], {}
    for name in options.variants:
        exported = network
        if name == "w8a8":
            observations = training_observations(meaning, data, options.calibration, CALIBRATION_SEED)
            with tqdm(total=len(observations), desc="calibrate", unit="obs") as bar:
                exported = quantize_policy(network, diffusion, observations, options.threads, bar.update)
        graphs = export_graphs(exported, diffusion.train_timesteps)
        files = {role: (f"variants/{name}/{role}.onnx", data) for role, data in graphs.items()}
        contents.update(dict(files.values()))
        layers = _layers(network, exported, graphs)
        variants.append(
            {
                "name": name,
                "description": DESCRIPTIONS[name],
                "precision": name,
                "opset": OPSET,
                "files": {role: file_spec(path, data).model_dump(mode="json") for role, (path, data) in files.items()},
                "layers": layers,
                "size": {
                    "parameters": parameter_count(network),
                    "paper_bytes": _paper_bytes(network, layers),
                    "disk_bytes": sum(len(data) for data in graphs.values()),
                },
                "latency": [record.model_dump(mode="json") for record in options.latency.get(name, ())],
                "quality": [record.model_dump(mode="json") for record in options.quality.get(name, ())],
                "parity": _parity(name, graphs, diffusion, network, parity_inputs, reference),
            }
        )
    document = {**meaning.fields(), "default_variant": options.variants[0], "variants": variants}
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
) -> dict[str, Any]:
    """Error of whole denoised chunks on ONNX Runtime against the full-precision network."""
    engine = OnnxRuntimeEngine(graphs, name=name)
    try:
        error = (denoise_chunks(engine, diffusion, network.config, inputs) - reference).astype(np.float64)
    finally:
        engine.close()
    maximum, rms = float(np.abs(error).max()), float(np.sqrt(np.square(error).mean()))
    if not rms <= TOLERANCE_RMS[name] or (name == "fp32" and maximum > FP32_MAX_ABS):
        raise ExportError(
            f"variant {name}: denoised chunks on ONNX Runtime differ from the network by rms {rms:.3g}, maximum "
            f"{maximum:.3g} (normalised units); allowed is rms {TOLERANCE_RMS[name]:g}. Nothing was written"
        )
    return {"samples": len(inputs), "max_abs": maximum, "rms": rms, "tolerance_rms": TOLERANCE_RMS[name]}


def _layers(network: DiffusionPolicyT, exported: DiffusionPolicyT, graphs: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Bits of every linear as asked for, as written, and as ONNX Runtime executes them (from its optimized graphs)."""
    integers = integer_weights(graphs["encoder"], "encoder.onnx") | integer_weights(graphs["denoiser"], "denoiser.onnx")
    rows = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        written = _bits(exported.get_submodule(name))
        executed = written if f"{graph_weight(name)}.weight" in integers else _bits(module)
        rows.append({"layer": name, "searched": written, "exported": written, "executed": {RUNTIME: executed}})
    return rows


def graph_weight(layer: str) -> str:
    """Name in the ONNX graphs of the (possibly merged) linear that holds ``layer``."""
    parent, _, child = layer.rpartition(".")
    if parent.endswith("self_attn") and child in "qkv":
        return f"{parent}.qkv"
    if parent.endswith("cross_attn") and child in "kv":
        return "cross_attn.kv"
    return layer


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
