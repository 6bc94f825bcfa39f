"""A small builder of ONNX graphs with explicit quantization (opset 21, canonical form of ``runtime.md``).

Graphs are written node by node and not traced: what the robot runs is then lean and fixed by this code, weights lie
(in, out) as MatMul reads them, and quantizers stand exactly where training has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from training.quant.linear import QuantizedLinear

OPSET = 21
IR_VERSION = 10  # the lowest that carries opset 21


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """A linear layer as ONNX holds it: ``weight`` (in, out) float32, or integer codes with their scales."""

    weight: NDArray[Any]  # float32, or int8 codes
    bias: NDArray[np.float32]
    weight_scale: NDArray[np.float32] | None = None  # (out,) where quantized
    input_scale: NDArray[np.float32] | None = None  # scalar where quantized

    @classmethod
    def of(cls, module: nn.Module) -> LinearWeights:
        """Read a full-precision or quantized linear layer.

        Raises:
            ValueError: another kind of module, or 4-bit codes, which the canonical W8A8 graph does not hold.
        """
        if isinstance(module, QuantizedLinear):
            if (module.bits.weight, module.bits.activation) != (8, 8):
                raise ValueError(f"export of {module.bits} is not defined; only 8-bit weights and activations are")
            return cls(
                np.ascontiguousarray(module.codes.t().numpy().astype(np.int8)),
                module.bias.numpy(),
                module.weight_scale.numpy(),
                module.input_scale.numpy(),
            )
        if isinstance(module, nn.Linear):
            weight = np.ascontiguousarray(module.weight.detach().t().numpy())
            bias = np.zeros(weight.shape[1], np.float32) if module.bias is None else module.bias.detach().numpy()
            return cls(weight, bias)
        raise ValueError(f"expected a linear layer, got {type(module).__name__}")

    def times(self, factor: float) -> LinearWeights:
        """The layer with its output multiplied by ``factor``; integer codes stay as they are."""
        bias = self.bias * np.float32(factor)
        if self.weight_scale is None:
            return LinearWeights(self.weight * np.float32(factor), bias)
        return LinearWeights(self.weight, bias, self.weight_scale * np.float32(factor), self.input_scale)


def concatenate(parts: Sequence[LinearWeights]) -> LinearWeights:
    """One layer with the outputs of all ``parts`` side by side; lossless, because weight scales are per output channel.

    Raises:
        ValueError: the parts do not share one input quantizer.
    """
    weight = np.concatenate([part.weight for part in parts], axis=1)
    bias = np.concatenate([part.bias for part in parts])
    scales = [part.weight_scale for part in parts if part.weight_scale is not None]
    inputs = [part.input_scale for part in parts if part.input_scale is not None]
    if not scales:
        return LinearWeights(weight, bias)
    if len(scales) != len(parts) or len(inputs) != len(parts) or len({float(scale) for scale in inputs}) != 1:
        raise ValueError("linears that are merged must share one input quantizer")
    return LinearWeights(weight, bias, np.concatenate(scales), inputs[0])


class GraphBuilder:
    """Collects nodes and constants of one graph; every method returns the name of the tensor it makes."""

    def __init__(self, name: str) -> None:
        """Begin a graph called ``name``."""
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._quantized: dict[tuple[str, bytes], str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], element_type: int = TensorProto.FLOAT) -> str:
        """Declare a graph input; a dimension given as text is symbolic."""
        self._inputs.append(helper.make_tensor_value_info(name, element_type, list(shape)))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Declare a float32 graph output made by a node of that name."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def constant(self, name: str, array: Any) -> str:
        """Store an array under ``name``.

        Raises:
            ValueError: another array has that name.
        """
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if self._constants.setdefault(name, tensor) != tensor:
            raise ValueError(f"constant {name!r} is defined twice with different contents")
        return name

    def index(self, *values: int) -> str:
        """Store a one-dimensional int64 constant, shared between equal uses."""
        return self.constant("index." + "_".join(str(value) for value in values), np.array(values, np.int64))

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add an operator with one output called ``name``."""
        return self.nodes(operator, inputs, [name], name, **attributes)[0]

    def nodes(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: Any
    ) -> list[str]:
        """Add an operator with several outputs."""
        self._nodes.append(helper.make_node(operator, list(inputs), list(outputs), name, **attributes))
        return list(outputs)

    def linear(self, x: str, layer: LinearWeights, name: str, bias: bool = True) -> str:
        """``x @ W + b`` over the last dimension; quantized layers read ``x`` through QuantizeLinear / DequantizeLinear.

        A tensor that several layers read with one scale is quantized once.
        """
        if layer.weight_scale is None or layer.input_scale is None:
            weight = self.constant(f"{name}.weight", layer.weight)
        else:
            codes = self.constant(f"{name}.weight", layer.weight)
            scale = self.constant(f"{name}.weight_scale", layer.weight_scale)
            zeros = self.constant(f"{name}.weight_zero", np.zeros(len(layer.weight_scale), np.int8))
            weight = self.node("DequantizeLinear", [codes, scale, zeros], f"{name}.weight_real", axis=1)
            x = self._quantized_input(x, layer.input_scale, name)
        product = self.node("MatMul", [x, weight], f"{name}.product")
        return self.node("Add", [product, self.constant(f"{name}.bias", layer.bias)], name) if bias else product

    def _quantized_input(self, x: str, input_scale: NDArray[np.float32], name: str) -> str:
        key = (x, input_scale.tobytes())
        if key not in self._quantized:
            scale = self.constant(f"{name}.input_scale", input_scale)
            zero = self.constant("zero", np.array(0, np.int8))
            codes = self.node("QuantizeLinear", [x, scale, zero], f"{name}.input_codes")
            self._quantized[key] = self.node("DequantizeLinear", [codes, scale, zero], f"{name}.input_real")
        return self._quantized[key]

    def layer_norm(self, x: str, module: nn.LayerNorm, name: str) -> str:
        """Layer normalisation over the last dimension."""
        weight = self.constant(f"{name}.weight", module.weight.detach().numpy())
        bias = self.constant(f"{name}.bias", module.bias.detach().numpy())
        return self.node("LayerNormalization", [x, weight, bias], name, axis=-1, epsilon=module.eps)

    def serialize(self) -> bytes:
        """Check the graph and return it as a deterministic ``.onnx`` file without metadata."""
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, list(self._constants.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="dcqfa_ros"
        )
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString(deterministic=True))
