"""A small builder of ONNX graphs with explicit quantization (opset 21, canonical form of ``runtime.md``).

Graphs are written node by node and not traced: what the robot runs is then lean and fixed by this code, weights lie
(in, out) as MatMul reads them, and quantizers stand exactly where training has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from ml_dtypes import float8_e4m3fn
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from training.export.weights import INT8_CODES, InputGrid, LinearWeights, Rounding

OPSET = 21
IR_VERSION = 10  # the lowest that carries opset 21


class GraphBuilder:
    """Collects nodes and constants of one graph; every method returns the name of the tensor it makes."""

    def __init__(self, name: str) -> None:
        """Begin a graph called ``name``."""
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._on_grid: dict[tuple[object, ...], str] = {}
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
        """``x @ W + b`` over the last dimension; a layer with a grid reads ``x`` rounded to it.

        A tensor that several layers read with one grid is rounded once.
        """
        if layer.grid is not None:
            x = self._rounded(x, layer.grid, name)
        product = self.node("MatMul", [x, self._weight(layer, name)], f"{name}.product")
        return self.node("Add", [product, self.constant(f"{name}.bias", layer.bias)], name) if bias else product

    def _weight(self, layer: LinearWeights, name: str) -> str:
        """The weight in float32, from the type it is stored in."""
        stored = self.constant(f"{name}.weight", layer.weight)
        if layer.weight.dtype == np.float16:
            return self.node("Cast", [stored], f"{name}.weight_real", to=TensorProto.FLOAT)
        if layer.weight_scale is None:
            return stored
        inputs = [stored, self.constant(f"{name}.weight_scale", layer.weight_scale)]
        if layer.weight.dtype == np.int8:
            inputs.append(self.constant(f"{name}.weight_zero", np.zeros(len(layer.weight_scale), np.int8)))
        return self.node("DequantizeLinear", inputs, f"{name}.weight_real", axis=1)

    def _rounded(self, x: str, grid: InputGrid, name: str) -> str:
        key = (x, *grid.key())
        if key not in self._on_grid:
            self._on_grid[key] = self._round(x, grid, name)
        return self._on_grid[key]

    def _round(self, x: str, grid: InputGrid, name: str) -> str:
        if grid.scale is None:
            half = self.node("Cast", [x], f"{name}.input_half", to=TensorProto.FLOAT16)
            return self.node("Cast", [half], f"{name}.input_real", to=TensorProto.FLOAT)
        scale = self.constant(f"{name}.input_scale", grid.scale)
        if grid.rounding is Rounding.FP8:
            zero = self.constant("zero_fp8", np.zeros((), float8_e4m3fn))
        else:
            zero = self.constant("zero", np.array(0, np.int8))
        if grid.rounding is Rounding.INTEGER and (grid.low, grid.high) != INT8_CODES:
            # Codes of fewer bits lie in INT8 containers: clipped before they are rounded, which is the same.
            limits = [
                self.constant(f"{name}.input_{end}", np.float32(code) * grid.scale)
                for end, code in (("low", grid.low), ("high", grid.high))
            ]
            x = self.node("Clip", [x, *limits], f"{name}.input_clipped")
        codes = self.node("QuantizeLinear", [x, scale, zero], f"{name}.input_codes")
        return self.node("DequantizeLinear", [codes, scale, zero], f"{name}.input_real")

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
