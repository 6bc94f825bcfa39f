"""The contract of a variant's three graphs: names, element types and axes of their inputs and outputs.

Axes are letters (:mod:`dcqfa_ros.runtime.engine`). B, T and S must be symbolic, since a graph takes any size of them;
every other letter is a size that the graphs fix and share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import TensorProto, ValueInfoProto

from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.errors import EngineError

Axes = tuple[str | int, ...]
Value = tuple[int, tuple[int | str, ...]]
"""Element type (``TensorProto.DataType``) and shape: a size, the name of a symbolic one, or ``?``."""

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
DTYPES: Mapping[int, type] = {FLOAT: np.float32, INT64: np.int64}

INPUTS: Mapping[str, Mapping[str, tuple[int, Axes]]] = {
    "encoder": {"observation": (FLOAT, ("B", "To", "Do"))},
    "timestep": {"timesteps": (INT64, ("S",))},
    "denoiser": {
        "noisy": (FLOAT, ("B", "T", "Dn")),
        "timestep_kv": (FLOAT, (1, "R", 1, "D")),
        "observation_kv": (FLOAT, ("B", "R", "To", "D")),
    },
}
"""Role -> name -> element type and axes."""

OUTPUTS: Mapping[str, Mapping[str, tuple[int, Axes]]] = {
    "encoder": {"observation_kv": (FLOAT, ("B", "R", "To", "D"))},
    "timestep": {"timestep_kv": (FLOAT, ("S", "R", 1, "D"))},
    "denoiser": {"noise": (FLOAT, ("B", "T", "Da"))},
}

SYMBOLIC = frozenset({"B", "T", "S"})


def declared(values: Iterable[ValueInfoProto]) -> dict[str, Value]:
    """Inputs or outputs of a graph by name."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            tuple(dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    }


def require_roles(files: Mapping[str, bytes], name: str) -> None:
    """Refuse a variant without one of its three graphs.

    Raises:
        EngineError: names the engine and the missing roles.
    """
    missing = [role for role in ROLES if role not in files]
    if missing:
        raise EngineError(f"engine {name}: files lack {', '.join(missing)}")


def check_contract(role: str, inputs: Mapping[str, Value], outputs: Mapping[str, Value], dims: dict[str, int]) -> None:
    """Compare a graph with the contract.

    Args:
        role: encoder, timestep or denoiser.
        inputs: of the graph, by name.
        outputs: likewise; a size that shape inference left open fits any.
        dims: sizes that the graphs of one variant fix, by axis letter; those of this graph are added.

    Raises:
        EngineError: a name, element type or axis is not that of the contract, or a size differs from an earlier one.
    """
    for kind, expected, actual in (("input", INPUTS[role], inputs), ("output", OUTPUTS[role], outputs)):
        if set(actual) != set(expected):
            raise EngineError(f"{role}.onnx: expected {kind} {', '.join(expected)}, got {', '.join(actual)}")
        for name, (element, shape) in actual.items():
            wanted, axes = expected[name]
            if element != wanted or not _axes_fit(kind, axes, shape, dims):
                known = tuple(dims.get(axis, axis) if isinstance(axis, str) else axis for axis in axes)
                raise EngineError(
                    f"{role}.onnx: {kind} {name!r} is {_type_name(element)} {shape}; expected {_type_name(wanted)} "
                    f"{known}, with symbolic B, T and S"
                )


def _axes_fit(kind: str, axes: Axes, shape: tuple[int | str, ...], dims: dict[str, int]) -> bool:
    """Compare axes and remember the sizes they fix."""
    if len(axes) != len(shape):
        return False
    for axis, size in zip(axes, shape, strict=True):
        if axis in SYMBOLIC or not isinstance(size, int):
            fits = kind == "output" or (axis in SYMBOLIC) != isinstance(size, int)
        else:
            fits = size == (axis if isinstance(axis, int) else dims.setdefault(axis, size))
        if not fits:
            return False
    return True


def _type_name(element: int) -> str:
    return str(TensorProto.DataType.Name(element)).lower()
