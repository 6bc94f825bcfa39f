"""What the export of a policy and that of a supernet's subnets share: a variant's entry in ``bundle.yaml``."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from dcqfa_ros.bundle.schema import Bits, BundleSpec, DiffusionSpec, LatencyRecord, QualityRecord
from dcqfa_ros.bundle.write import file_spec
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from training.export.calibration import Float, KnownTokens, denoise_chunks
from training.export.diffusion_policy_t import graph_weights
from training.export.executed import bits_in, executed
from training.export.graph import OPSET
from training.export.records import Results
from training.export.weights import LinearWeights, Rounding
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig

PACKAGES = ("dcqfa_ros", "torch", "onnx", "onnxruntime", "numpy")


class ExportError(UserError):
    """A policy that cannot be exported, or an export that does not agree with the network it comes from."""


@dataclass(frozen=True, slots=True)
class LayerRow:
    """Bits of one linear layer, as asked for and as written."""

    layer: str
    searched: Bits
    exported: Bits


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Root mean square errors that are allowed, as :class:`dcqfa_ros.bundle.provenance.ParityRecord` names them.

    ``maximum`` bounds the largest error, None for any.
    """

    rms: float
    export_rms: float
    maximum: float | None = None


def bits_of(weights: LinearWeights) -> Bits:
    """Bits of a layer as it is written."""
    grid = weights.grid
    if grid is None:
        kind = "int" if weights.weight_scale is not None else "float"
        return Bits.model_validate({"weight": weights.stored_bits, "activation": 32, "kind": kind})
    kind = "int" if grid.rounding is Rounding.INTEGER else "float"
    activation = 8 if grid.rounding is Rounding.FP8 else grid.bits
    return Bits.model_validate({"weight": weights.stored_bits, "activation": activation, "kind": kind})


def entry(
    name: str, description: str, precision: str, graphs: Mapping[str, bytes], rows: Sequence[LayerRow]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The part of a variant's document that follows from its graphs, and its files by path."""
    files = {role: (f"variants/{name}/{role}.onnx", data) for role, data in graphs.items()}
    document = {
        "name": name,
        "description": description,
        "precision": precision,
        "opset": OPSET,
        "files": {role: file_spec(path, data).model_dump(mode="json") for role, (path, data) in files.items()},
        "layers": _layers(rows, graphs),
    }
    return document, dict(files.values())


def _layers(rows: Sequence[LayerRow], graphs: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Bits of every linear as asked for, as written, and as each runtime executes them."""
    found = executed(graphs)
    return [
        {
            "layer": row.layer,
            "searched": row.searched.model_dump(mode="json"),
            "exported": row.exported.model_dump(mode="json"),
            "executed": {
                runtime: bits_in(weights, graph_weights(row.layer)).model_dump(mode="json")
                for runtime, weights in found.items()
            },
        }
        for row in rows
    ]


def parity(
    name: str,
    graphs: Mapping[str, bytes],
    diffusion: DiffusionSpec,
    policy: DiffusionPolicyTConfig,
    inputs: Float,
    reference: Float,
    export_reference: Float,
    tolerance: Tolerance,
    known: KnownTokens | None = None,
) -> dict[str, Any]:
    """Error of whole denoised chunks on ONNX Runtime, from ``inputs`` and the tokens ``known``.

    ``reference`` holds the chunks of the full-precision policy, ``export_reference`` those of the network that was
    exported, quantized where it is.

    Raises:
        ExportError: an error is larger than is tolerated.
    """
    engine = OnnxRuntimeEngine(graphs, name=name)
    try:
        chunks = denoise_chunks(engine, diffusion, policy, inputs, known=known)
    finally:
        engine.close()
    maximum, rms = float(np.abs(chunks - reference).max()), rms_error(chunks, reference)
    export_rms = rms_error(chunks, export_reference)
    if not export_rms <= tolerance.export_rms:
        raise ExportError(
            f"variant {name}: denoised chunks on ONNX Runtime differ from the network with the same quantizers by rms "
            f"{export_rms:.3g} (normalised units); allowed is {tolerance.export_rms:g}. Nothing was written"
        )
    if not rms <= tolerance.rms or (tolerance.maximum is not None and maximum > tolerance.maximum):
        raise ExportError(
            f"variant {name}: denoised chunks on ONNX Runtime differ from the full-precision policy by rms {rms:.3g}, "
            f"maximum {maximum:.3g} (normalised units); allowed is rms {tolerance.rms:g}. Nothing was written"
        )
    return {
        "samples": len(inputs),
        "max_abs": maximum,
        "rms": rms,
        "tolerance_rms": tolerance.rms,
        "export_rms": export_rms,
        "tolerance_export_rms": tolerance.export_rms,
    }


def rms_error(values: Float, reference: Float) -> float:
    """Root mean square difference."""
    return float(np.sqrt(np.square((values - reference).astype(np.float64)).mean()))


def recorded(
    spec: BundleSpec, old: BundleSpec | None, quality: Results[QualityRecord], latency: Results[LatencyRecord]
) -> BundleSpec:
    """``spec`` with its variants' latencies and evaluations: those given, and those of ``old`` with the same weights.

    A given record takes the place of an older one of the same conditions.

    Raises:
        ExportError: a result is of a variant that is not there, or of other weights than are about to be written.
    """
    known = {variant.name for variant in spec.variants}
    for name in sorted(set(quality) - known):
        raise ExportError(
            f"--quality {name}: no such variant; there are {', '.join(sorted(known))}. Nothing was written"
        )
    if latency and not set(latency) & known:
        raise ExportError(
            f"--latency {next(iter(latency.values()))[0].file}: holds no row of {', '.join(sorted(known))}. "
            "Nothing was written"
        )
    variants = []
    for variant in spec.variants:
        for option, results in (("--quality", quality), ("--latency", latency)):
            for result in results.get(variant.name, ()):
                if result.weights != variant.weights:
                    raise ExportError(
                        f"{option} {result.file}: was obtained with other weights of variant {variant.name} "
                        f"({result.weights[:12]}..., now {variant.weights[:12]}...); repeat it with this export. "
                        "Nothing was written"
                    )
        same = [v for v in (*(old.variants if old else ()), variant) if v.weights == variant.weights]
        scores = {_quality_key(r): r for v in same for r in v.quality}
        scores |= {_quality_key(r.record): r.of(spec.name) for r in quality.get(variant.name, ())}
        times = {_latency_key(r): r for v in same for r in v.latency}
        times |= {_latency_key(r.record): r.of(spec.name) for r in latency.get(variant.name, ())}
        update = {"quality": tuple(scores.values()), "latency": tuple(times.values())}
        variants.append(variant.model_copy(update=update))
    return spec.model_copy(update={"variants": tuple(variants)})


def _quality_key(record: QualityRecord) -> tuple[str, int, int, int]:
    return record.metric, record.first_seed, record.seeds, record.steps


def _latency_key(record: LatencyRecord) -> tuple[str, str, str, int, int]:
    return record.device, record.runtime.partition(" ")[0], record.kind, record.threads, record.steps


def versions() -> dict[str, str]:
    """Versions of what makes a bundle, by package; one that is not installed as a package is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
