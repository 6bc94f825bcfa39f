"""What the torch engine knows of a graph: its nodes, linear layers with their quantizers, inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.runtime.contract import Value

INTEGER, FP8, HALF, FLOAT = "int8", "fp8", "float16", "float"  # how a linear layer is multiplied
CODE_RANGE = (-128, 127)


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer as the graph holds it: ``y = x @ weight + bias``, with quantizers where it has them.

    Attributes:
        kind: ``INTEGER``, ``FP8``, ``HALF`` or ``FLOAT``.
        weight: (in, out); int8 codes, uint8 bit patterns of FP8 E4M3, float16, or float32.
        bias: (out,) float32, None where the graph adds none.
        weight_scale: (out,) float32 where quantized.
        input_scale: float32 scalar where quantized.
        codes: lowest and highest code of the input, integer layers only.
        weight_name: the initializer's name.
    """

    kind: str
    weight: NDArray[Any]
    weight_name: str
    bias: NDArray[np.float32] | None = None
    weight_scale: NDArray[np.float32] | None = None
    input_scale: np.float32 | None = None
    codes: tuple[int, int] = CODE_RANGE


@dataclass(frozen=True, slots=True)
class Node:
    """One operator: an ONNX operator of ``OPERATORS``, ``Linear`` (with ``layer``) or ``Attention``.

    ``Attention`` reads q, k, v and a mask if there is one; its attribute ``scale`` multiplies the scores.
    """

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    layer: LinearLayer | None = None

    def __str__(self) -> str:
        return f"{self.operator} {self.name!r}"


@dataclass(frozen=True, slots=True)
class Graph:
    """A recognised graph, nodes in an order in which they can run; ``label`` is what errors call the file."""

    label: str
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]
    constants: Mapping[str, NDArray[Any]]
    nodes: tuple[Node, ...]

    @property
    def linears(self) -> dict[str, str]:
        """Name of every linear layer's weight -> how it is multiplied; ``FLOAT`` is in the type of activations."""
        return {node.layer.weight_name: node.layer.kind for node in self.nodes if node.layer is not None}
