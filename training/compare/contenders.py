"""The entries of a comparison, opened: what each computes, where it comes from, how large it is, what it cost.

What can be exported is exported and evaluated as the graphs that a robot runs, on ONNX Runtime; the rest (baselines,
whose quantizers have no graph) is evaluated in PyTorch with its quantizers simulated. Every contender says which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcqfa_ros.bundle.schema import Bits, BundleSpec
from dcqfa_ros.devices.precisions import PRECISIONS, label, on_onnxruntime
from dcqfa_ros.runtime.engine import ROLES, Engine
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.processor import X86, Processor
from training.compare.config import Entry
from training.compare.cost import Cost
from training.lut import LookUpTable, TableError
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.subnet import Layer, Precision, Subnet
from training.torch_engine import TorchEngine
from training.warm_start import state_sha256

MIB = 2**20
ONNX = "exported graphs on ONNX Runtime, as the robot runs them"
FLOAT_TABLE = "exported graphs on ONNX Runtime, weights stored as float16 and computed in float32"
SIMULATED = "PyTorch with simulated quantizers: the method has no exported form here"
PRODUCTS = {"float32": "FP32", "float16": "FP16", "fp8": "FP8", "int8_a4": "INT8", "int8": "INT8", "int4": "INT4"}
PRODUCTS |= {"int4_weights_float16": "FP16"}  # of the executed forms of look-up tables
OWN = {"INT8 products": "W8A8", "INT4 products": "W4A4"}  # what they are of where nothing else is said
CONTAINERS = "4-bit codes are held and multiplied as 8 bits: no gain over W8A8"
Executes = Callable[[Bits], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Runnable:
    """What a process needs to run an entry: its meaning, and either graphs or a PyTorch network."""

    spec: BundleSpec
    graphs: Mapping[str, bytes] | None
    network: nn.Module | None

    def engine(self, large_batches: bool = True) -> Engine:
        """A new engine, one thread.

        Args:
            large_batches: see :class:`OnnxRuntimeEngine`; False: as the robot runs it.

        Raises:
            EngineError: a graph is damaged.
        """
        if self.graphs is not None:
            return OnnxRuntimeEngine(dict(self.graphs), threads=1, large_batches=large_batches)
        assert isinstance(self.network, DiffusionPolicyT)
        return TorchEngine(self.network, 1)

    @property
    def artifact(self) -> str:
        """SHA-256 of what runs: of the graphs, or of every tensor of the network."""
        if self.graphs is not None:
            files = (hashlib.sha256(self.graphs[role]).hexdigest() for role in ROLES)
            return hashlib.sha256("".join(files).encode()).hexdigest()
        assert self.network is not None
        return state_sha256({k: v for k, v in self.network.state_dict().items() if isinstance(v, torch.Tensor)})


@dataclass(frozen=True, slots=True)
class Contender:
    """An entry that was found.

    Attributes:
        entry: as asked for.
        runnable: what runs.
        weights: SHA-256 of the trained weights behind it.
        data: SHA-256 of the demonstrations behind it; None where its files do not tell.
        origin: SHA-256 of the full-precision policy it comes from, None likewise.
        executed: how it is evaluated.
        device: what a device executes, as far as that differs.
        subnet: what the look-up table knows it as; None where it cannot be told.
        size: ``parameters``, ``paper_mib`` (parameters x bits / 8) and ``artifact_mib`` with what that is of.
        cost: of training.
        report: of a baseline.
    """

    entry: Entry
    runnable: Runnable
    weights: str
    data: str | None
    origin: str | None
    executed: str
    device: str | None
    subnet: Subnet | None
    size: dict[str, Any]
    cost: Cost
    report: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """What must agree before results are put together."""
        entry = self.entry
        return {
            "kind": entry.kind,
            "weights": self.weights,
            "artifact": self.runnable.artifact,
            "data": self.data,
            "policy": self.origin,
            "bits": entry.bits,
            "variant": entry.variant,
            "subnet": entry.subnet,
            "baseline": entry.baseline,
            "baseline_bits": entry.baseline_bits,
            "options": dict(sorted(entry.options.items())),
            "seed": entry.seed,
        }


def bits_of(name: str, subnet: Subnet | None) -> list[Bits]:
    """The bits of an entry's layers, each once; empty where they cannot be told."""
    if name in PRECISIONS:
        return [PRECISIONS[name]]
    layers = (layer for layer in (subnet.layers if subnet is not None else ()) if layer is not None)
    pairs = sorted({(layer.w, layer.a) for layer in layers})
    return [Bits.model_validate({"weight": w, "activation": a, "kind": "int"}) for w, a in pairs]


def on_this_processor(processor: Processor) -> Executes:
    """How ONNX Runtime executes bits on a processor: products, and what differs from what was asked for."""

    def executes(bits: Bits) -> tuple[str, str]:
        execution = on_onnxruntime(bits, processor=processor)
        if execution.bits is None:
            return "no products", execution.note
        if execution.bits.kind == "int":
            return "INT8 products", "" if execution.bits == bits else CONTAINERS
        return f"{label(execution.bits)} products", execution.note

    return executes


def by_table(table: LookUpTable) -> Executes:
    """How the device of a look-up table executes bits, by the forms that the table says."""
    if table.runtime == "onnxruntime":  # whose processor executed all that the table has
        return on_this_processor(Processor(table.device.name, X86, 1, (), avx2=True))

    def executes(bits: Bits) -> tuple[str, str]:
        name = label(bits).lower()
        precision = Precision(name) if bits.kind == "float" else Precision.INT
        try:
            form = table.form(precision, Layer(1, 1, bits.weight, bits.activation)).executed
        except TableError:
            return "no products that the table knows", ""
        products = f"{PRODUCTS.get(form, form)} products"
        if form == "int4_weights_float16":
            return products, "INT4 weights are read packed and widened: bandwidth is saved, no arithmetic"
        if bits.kind == "float":
            return products, "" if products == f"{label(bits)} products" else f"there are no {label(bits)} products"
        return products, CONTAINERS if min(bits.weight, bits.activation) == 4 and products == "INT8 products" else ""

    return executes


def device_executes(asked: Iterable[Bits], device: str, executes: Executes) -> str | None:
    """What a device executes of an exported network, in one sentence; None where its bits cannot be told."""
    forms: dict[str, tuple[list[str], list[str]]] = {}
    for bits in asked:
        products, remark = executes(bits)
        names, remarks = forms.setdefault(products, ([], []))
        names.append(label(bits))
        if remark and remark not in remarks:
            remarks.append(remark)
    parts = []
    for products, (names, remarks) in forms.items():
        of = "" if names == [OWN.get(products, products.removesuffix(" products"))] else f" of {', '.join(names)}"
        parts.append(f"{products}{of}" + (f" ({'; '.join(remarks)})" if remarks else ""))
    return f"{'; '.join(parts)} on {device}." if parts else None
