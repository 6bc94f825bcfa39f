"""From a supernet's checkpoint to variants of a bundle: any number of its subnets, each in the bits it was trained in.

A subnet's variant stands beside the full-precision policy that the supernet was trained from, in the same bundle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from dcqfa_ros.bundle.load import BUNDLE_YAML, Bundle, load_bundle
from dcqfa_ros.bundle.schema import Bits, BundleSpec, DiffusionSpec, LatencyRecord, QualityRecord
from dcqfa_ros.bundle.types import NAME_PATTERN
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.record_chunks import with_fixed_chunks
from training.checkpoint_engine import refuse_images
from training.config import override
from training.data.episodes import read_demonstrations
from training.export.beside import check_same_policy, merged
from training.export.block_parity import block_errors
from training.export.blocks import blocks_of
from training.export.bundle import PARITY_SAMPLES, PARITY_SEED
from training.export.calibration import Float, denoise_chunks, training_observations
from training.export.diffusion_policy_t import Rest, export_graphs
from training.export.records import Result
from training.export.variant import (
    ExportError,
    LayerRow,
    Tolerance,
    bits_of,
    entry,
    parity,
    recorded,
    rms_error,
    versions,
)
from training.export.weights import LinearWeights
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.space_counts import paper_bytes, parameters
from training.subnet import FLOAT_BITS, Precision, Subnet
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.torch_engine import TorchEngine
from training.warm_start import policy_beside, read_policy_weights

SAME_SAMPLES = 4
SAME_RMS = 1e-4  # normalised units; the exporter's own bound for full precision is 1e-5
BLOCK_SAMPLES = 16
BLOCK_TIMESTEP = 48
TOLERANCE_BLOCK_RMS = 0.01  # of a block's output
# A subnet is a network of its own: how far its chunks lie from the whole policy's is recorded and not bounded (2 is the
# range of normalised actions), since its score tells what that costs. From the same network in PyTorch, chunks of
# integers differ by single steps that denoising carries on.
ANY_RMS = 2.0
REST = {
    Precision.FP32: Rest.FLOAT32,
    Precision.FP16: Rest.FLOAT16,
    Precision.FP8: Rest.FLOAT16,
    Precision.INT: Rest.INT8,
}
TOLERANCE = {
    Precision.FP32: Tolerance(ANY_RMS, 1e-5),
    Precision.FP16: Tolerance(ANY_RMS, 0.005),
    Precision.FP8: Tolerance(ANY_RMS, 0.05),
    Precision.INT: Tolerance(ANY_RMS, 0.05),
}
OUTSIDE = "embeddings, memory MLP, attention products, norms and action head in floating point"


@dataclass(frozen=True, slots=True)
class SubnetOptions:
    """What to export of a supernet.

    Attributes:
        subnets: variant's name -> subnet's name.
        searched: variant's name -> the device and budgets of the search that chose it.
        default: the bundle's default variant; None for the one it has, or the first of a new bundle.
        data: path of the demonstrations; None for the one the run used.
        quality: evaluations to record per variant; they must be of the weights that are written.
        latency: measured latencies to record per variant, likewise.
        threads: PyTorch threads.
    """

    subnets: Mapping[str, str]
    searched: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    data: str | None = None
    quality: Mapping[str, tuple[Result[QualityRecord], ...]] = field(default_factory=dict)
    latency: Mapping[str, tuple[Result[LatencyRecord], ...]] = field(default_factory=dict)
    threads: int = 1

    def __post_init__(self) -> None:
        if not (self.subnets or self.default or self.quality or self.latency):
            raise ExportError("--subnet: no subnet is named; name one, as in --subnet w8a8 or --subnet fast=NAME")
        if "fp32" in self.subnets:
            raise ExportError("--subnet fp32: that name is of the full-precision policy; write NAME=fp32")


def export_subnets(checkpoint: Path, folder: Path, options: SubnetOptions) -> BundleSpec:
    """Add subnets of a supernet to the bundle in ``folder``, or make one of them, and return its specification.

    Variants of the same names are replaced, others stay as they are; one whose files come out the same keeps its
    recorded latencies and evaluations. The bundle is exchanged in one step.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        DataError: the demonstrations cannot be read.
        SpaceError: a subnet is not in the search space.
        WarmStartError: the full-precision policy that the supernet was trained from cannot be read.
        ExportError: a variant fails its parity check, a result is of other weights, the policy reads images, or the
            bundle in ``folder`` is of another policy; nothing is written.
        BundleError: ``folder`` holds a damaged bundle, or cannot be replaced by one.
    """
    supernet = load_supernet(checkpoint)
    refuse_images(supernet.meaning, supernet.path)
    there = load_bundle(folder) if (folder / BUNDLE_YAML).exists() else None
    meaning = supernet.meaning
    specification = meaning.specification()
    if there is not None:
        check_same_policy(folder, there.spec, specification, supernet.path)
    if there is None and not options.subnets:
        raise ExportError(f"{folder}: no bundle to record results in; name a subnet with --subnet")
    _check_names(options, None if there is None else there.spec)
    for name in options.subnets.values():
        supernet.space.parse(name)  # all of them before the first is exported
    source = {} if options.data is None else {"path": options.data, "format": "auto"}
    demonstrations = read_demonstrations(override(meaning.config, data=source).data)
    inputs = training_observations(meaning, demonstrations, PARITY_SAMPLES, PARITY_SEED)
    torch.set_num_threads(options.threads)
    policy = _policy(supernet)
    reference = denoise_chunks(TorchEngine(policy, options.threads), specification.diffusion, policy.config, inputs)
    if there is not None:
        _check_same_weights(there, supernet, specification.diffusion, inputs, reference)

    fields = meaning.fields()
    training = None if there is None else fields["training"]
    documents, contents = [], {}
    for name, subnet in tqdm(options.subnets.items(), desc="export", unit="variant"):
        work = _Export(supernet, specification.diffusion, inputs, reference, options)
        document, files = work.variant(name, subnet)
        document["training"] = training
        documents.append(document)
        contents.update(files)
    if there is None:
        whole = fields | {"created_by": versions(), "default_variant": options.default or documents[0]["name"]}
    else:
        kept = there.spec.model_dump(mode="json")
        whole = kept | {"created_by": versions(), "default_variant": options.default or kept["default_variant"]}
        documents, files = merged(kept["variants"], documents, there)
        contents = files | contents
    spec = BundleSpec.model_validate_json(json.dumps(whole | {"variants": documents}), strict=True)
    spec = recorded(spec, None if there is None else there.spec, options.quality, options.latency)
    spec = with_fixed_chunks(spec, contents)
    write_bundle(folder, spec, contents)
    return spec


def _check_names(options: SubnetOptions, there: BundleSpec | None) -> None:
    """Refuse names that a bundle cannot hold, before anything is exported.

    Raises:
        ExportError: the name of a variant is not one, or the default variant is not there.
    """
    for name in options.subnets:
        if name == "auto" or not re.fullmatch(NAME_PATTERN, name):
            raise ExportError(
                f"--subnet {name}: not the name of a variant (a letter, then up to 63 letters, digits, '_', '.', '-'; "
                "not 'auto'); give one, as in --subnet fast=NAME"
            )
    known = {*options.subnets, *(variant.name for variant in (there.variants if there else ()))}
    if options.default is not None and options.default not in known:
        raise ExportError(f"--default {options.default}: no such variant; there are {', '.join(sorted(known))}")


class AsStored(TorchEngine):
    """A subnet in PyTorch with the memory MLP and the table of time steps as the graphs store them."""

    def __init__(self, network: ElasticDiffusionPolicyT, rest: Rest, train_timesteps: int, threads: int) -> None:
        """Change ``network``, which is the caller's own."""
        super().__init__(network, threads)
        table = super().timestep_kv(np.arange(train_timesteps))
        self._table = rest.stored_table(table).values().reshape(table.shape)
        with torch.no_grad():
            for module in (network.memory_fc1, network.memory_fc2):
                module.weight.copy_(torch.from_numpy(rest.stored(LinearWeights.of(module)).values().T))
        network.freeze()

    def timestep_kv(self, timesteps: NDArray[np.int64]) -> Float:
        """Rows (S, R, 1, D) of the table."""
        return np.ascontiguousarray(self._table[timesteps])


@dataclass(frozen=True, slots=True)
class _Export:
    """What the export of one subnet after the other shares."""

    supernet: TrainedSupernet
    diffusion: DiffusionSpec
    inputs: Float
    reference: Float
    options: SubnetOptions

    def variant(self, name: str, asked: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        """A variant's document without records, and its files by path."""
        space, threads = self.supernet.space, self.options.threads
        subnet, network = self.supernet.subnet(asked)
        rest = REST[subnet.precision]
        graphs = export_graphs(network, self.diffusion.train_timesteps, rest)
        engine = AsStored(network, rest, self.diffusion.train_timesteps, threads)
        chunks = denoise_chunks(engine, self.diffusion, network.config, self.inputs)
        document, files = entry(name, _described(subnet), precision_name(subnet), graphs, _rows(network, subnet, rest))
        parts = self._parts(name, graphs, engine, network)
        agreement = parity(
            name,
            graphs,
            self.diffusion,
            network.config,
            self.inputs,
            self.reference,
            chunks,
            TOLERANCE[subnet.precision],
        )
        shape = space.shape
        document |= {
            "subnet": space.name(subnet),
            "blocks": [
                {"index": index, "heads": layer.heads, "ffn_dim": layer.mlp}
                for index, layer in enumerate(subnet.layers)
                if layer is not None
            ],
            "size": {
                "parameters": parameters(shape, subnet),
                "paper_bytes": paper_bytes(shape, subnet),
                "disk_bytes": sum(len(data) for data in graphs.values()),
            },
            "searched_for": self.options.searched.get(name),
            "parity": agreement | parts,
        }
        return document, files

    def _parts(
        self, name: str, graphs: Mapping[str, bytes], stored: AsStored, network: ElasticDiffusionPolicyT
    ) -> dict[str, float]:
        """Largest relative error of encoder, table and every block, each from the training-side network's inputs."""
        inputs = self.inputs[: min(BLOCK_SAMPLES, len(self.inputs))]
        noisy = np.random.default_rng(PARITY_SEED).standard_normal(self.reference[: len(inputs)].shape)
        blocks = block_errors(network, blocks_of(network), noisy.astype(np.float32), np.array([BLOCK_TIMESTEP]), inputs)
        errors = {f"block {index}": error for index, error in enumerate(blocks)}
        engine = OnnxRuntimeEngine(graphs, name=name)
        try:
            steps = np.arange(self.diffusion.train_timesteps)
            for part, found, expected in (
                ("the encoder", engine.observation_kv(inputs), stored.observation_kv(inputs)),
                ("the table of time steps", engine.timestep_kv(steps), stored.timestep_kv(steps)),
            ):
                errors[part] = rms_error(found, expected) / max(1e-12, rms_error(expected, np.zeros_like(expected)))
        finally:
            engine.close()
        part, worst = max(errors.items(), key=lambda item: item[1])
        if not worst <= TOLERANCE_BLOCK_RMS:
            raise ExportError(
                f"variant {name}: {part} on ONNX Runtime differs from the training-side one by {worst:.3g} of its "
                f"output; allowed is {TOLERANCE_BLOCK_RMS:g}. Nothing was written"
            )
        return {"block_rms": worst, "tolerance_block_rms": TOLERANCE_BLOCK_RMS}


def _policy(supernet: TrainedSupernet) -> DiffusionPolicyT:
    """The full-precision policy that the supernet was trained from and taught by."""
    config = supernet.meaning.config
    assert config.supernet is not None
    weights = read_policy_weights(policy_beside(supernet.path, config.supernet.warm_start), config.policy)
    policy = DiffusionPolicyT(config.policy)
    policy.load_state_dict(weights.state)
    return policy.eval()


def _rows(network: ElasticDiffusionPolicyT, subnet: Subnet, rest: Rest) -> list[LayerRow]:
    """Bits of every linear of an extracted subnet."""
    rows = []
    for index, (block, layer) in enumerate(
        zip(blocks_of(network), (layer for layer in subnet.layers if layer is not None), strict=True)
    ):
        if subnet.precision is Precision.INT:
            searched = Bits.model_validate({"weight": layer.w, "activation": layer.a, "kind": "int"})
        else:
            bits = FLOAT_BITS[subnet.precision]
            searched = Bits.model_validate({"weight": bits, "activation": bits, "kind": "float"})
        linears = {f"self_attn.{part}": getattr(block.self_attention, part) for part in "qkvo"}
        linears |= {f"cross_attn.{part}": getattr(block.cross, part) for part in "qkvo"}
        linears |= {"fc1": block.fc1, "fc2": block.fc2}
        rows += [LayerRow(f"blocks.{index}.{name}", searched, bits_of(weights)) for name, weights in linears.items()]
    for name in ("action_embedding", "observation_embedding", "memory_fc1", "memory_fc2", "head"):
        module = network.get_submodule(name)
        assert isinstance(module, nn.Linear)
        plain = LinearWeights.of(module)
        written = rest.stored(plain) if name.startswith("memory") else plain
        rows.append(LayerRow(name, bits_of(plain), bits_of(written)))
    return rows


def _described(subnet: Subnet) -> str:
    bits = sorted({(layer.w, layer.a) for layer in subnet.layers if layer is not None})
    how = "/".join(f"W{w}A{a}" for w, a in bits) if subnet.precision is Precision.INT else subnet.precision.value
    return f"subnet of {subnet.depth} blocks, {how} with learned steps; {OUTSIDE}"


def precision_name(subnet: Subnet) -> str:
    """The bundle's word for the bits of a subnet."""
    if subnet.precision is not Precision.INT:
        return subnet.precision.value
    bits = {(layer.w, layer.a) for layer in subnet.layers if layer is not None}
    return {frozenset({(8, 8)}): "w8a8", frozenset({(4, 4)}): "w4a4"}.get(frozenset(bits), "mixed")


def _check_same_weights(
    there: Bundle, supernet: TrainedSupernet, diffusion: DiffusionSpec, inputs: Float, reference: Float
) -> None:
    """Refuse a bundle whose full-precision variant, if it has one, computes other chunks than the supernet's teacher.

    Values are compared and not bytes: weights that were read back from a bundle may differ in their last bit.
    """
    whole = next((v.name for v in there.spec.variants if v.precision == "fp32" and v.subnet is None), None)
    if whole is None:
        return
    count = min(SAME_SAMPLES, len(inputs))
    engine = OnnxRuntimeEngine({role: there.read(whole, role) for role in ROLES}, name=whole)
    try:
        error = rms_error(denoise_chunks(engine, diffusion, supernet.network.config, inputs[:count]), reference[:count])
    finally:
        engine.close()
    if not error <= SAME_RMS:
        raise ExportError(
            f"{there.folder}: its full-precision policy (variant {whole}) is not the one that {supernet.path} was "
            f"trained from: their chunks differ by rms {error:.3g} (normalised units); give another --out. "
            "Nothing was written"
        )
