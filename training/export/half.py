"""Full-precision policies whose weights are stored as float16: half the file, computed in float32 all the same.

The policy's weights are rounded first, in the form they have in the graphs, and then exported: the policy is the
rounded one, so a bundle agrees with it as closely as any export in full precision. The canonical form and how it is
read: :mod:`dcqfa_ros.runtime.stored_half`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.stored_half import stored_half_names
from training.export.diffusion_policy_t import export_graphs
from training.graph_weights import graph_state
from training.policies.diffusion_policy_t import DiffusionPolicyT

LEAST_ELEMENTS = 1024  # smaller constants (biases, norms, masks) would save next to nothing
SUFFIX = ".float16"
# Half a step of float16 is 2^-11 (4.9e-4) of a value, 3e-8 below 6e-5: a tensor that loses more is too small for it.
LARGEST_LOSS = 1e-3
_LARGEST = float(np.finfo(np.float16).max)
_EXACT = 1e-6  # relative: what folding a scale into rounded weights may move


class StoreError(UserError, ValueError):
    """Weights that float16 cannot hold; the message names the tensor."""


def rounded_to_half(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Round to float16.

    Raises:
        StoreError: a value is not finite or beyond float16's largest, or the tensor is so small that it loses more than
            ``LARGEST_LOSS`` of its size.
    """
    advice = "; store the weights as float32 (--store float32)"
    if not np.isfinite(values).all():
        raise StoreError(f"{name}: holds values that are not finite{advice}")
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _LARGEST:
        raise StoreError(f"{name}: holds {largest:g}, beyond float16's largest number {_LARGEST:g}{advice}")
    half = values.astype(np.float16)
    size = float(np.linalg.norm(values.astype(np.float64)))
    lost = float(np.linalg.norm(half.astype(np.float64) - values))
    if lost > LARGEST_LOSS * size:
        raise StoreError(
            f"{name}: float16 would lose {lost / size:.2g} of its size, since its values are as small as "
            f"{largest:.2g} at most; allowed is {LARGEST_LOSS:g}{advice}"
        )
    return half


def store_in_half(data: bytes, label: str) -> bytes:
    """A graph with every float32 constant of ``LEAST_ELEMENTS`` elements or more stored as float16.

    Raises:
        StoreError: float16 cannot hold one; the message names graph and tensor.
    """
    model = onnx.load_model_from_string(data)
    graph = model.graph
    casts: list[NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < LEAST_ELEMENTS:
            continue
        name = tensor.name
        half = rounded_to_half(numpy_helper.to_array(tensor), f"{label}: {name}")
        tensor.CopyFrom(numpy_helper.from_array(half, name + SUFFIX))
        casts.append(helper.make_node("Cast", [name + SUFFIX], [name], f"{name}.widened", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString(deterministic=True))


def half_graphs(policy: HalfTablePolicy, train_timesteps: int) -> dict[str, bytes]:
    """The graphs of a rounded policy, stored as float16.

    Raises:
        StoreError: float16 cannot hold a constant, or rounding it would change what ``policy`` computes.
    """
    stored = {}
    for role, data in export_graphs(policy, train_timesteps).items():
        before = _constants(data)
        stored[role] = store_in_half(data, f"{role}.onnx")
        after = {name.removesuffix(SUFFIX): array for name, array in _constants(stored[role]).items()}
        for name, values in before.items():
            if not np.allclose(after[name].astype(values.dtype), values, rtol=_EXACT, atol=1e-12):
                raise StoreError(f"{role}.onnx: {name}: is not rounded to float16; round the policy first")
    return stored


def _constants(data: bytes) -> dict[str, NDArray[Any]]:
    graph = onnx.load_model_from_string(data).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def stored_names(graphs: Mapping[str, bytes]) -> frozenset[str]:
    """Names of the constants that graphs store as float16 and use as float32."""
    models = (onnx.load_model_from_string(data) for data in graphs.values())
    return frozenset(name for model in models for name in stored_half_names(model))


def round_weights(network: DiffusionPolicyT, train_timesteps: int) -> DiffusionPolicyT:
    """A copy of a full-precision policy with the weights that its graphs hold after rounding to float16.

    Rounded are constants of the graphs, which may be several parameters in one: a bias may come back in the position
    added after it.

    Raises:
        StoreError: float16 cannot hold a constant.
    """
    graphs = export_graphs(network, train_timesteps)
    state = graph_state(
        {role: store_in_half(graphs[role], f"{role}.onnx") for role in ("encoder", "denoiser")},
        network.config,
        Path("float16"),
    )
    time_position = network.memory_position.detach()[:, :1]
    state["memory_position"] = torch.cat([time_position, state["memory_position"]], dim=1)
    with torch.random.fork_rng(devices=[]):  # making a network draws its weights
        rounded = DiffusionPolicyT(network.config)
    rounded.load_state_dict(state)
    return rounded.requires_grad_(False).eval()


class HalfTablePolicy(DiffusionPolicyT):
    """A policy that looks keys and values of its time token up in a table rounded to float16, as its bundle does."""

    def __init__(self, network: DiffusionPolicyT, train_timesteps: int) -> None:
        """Take the weights of ``network``, which are rounded already (:func:`round_weights`).

        Raises:
            StoreError: float16 cannot hold the table.
        """
        with torch.random.fork_rng(devices=[]):
            super().__init__(network.config)
        self.load_state_dict(network.state_dict())
        self.requires_grad_(False).eval()
        with torch.inference_mode():
            table = network.timestep_keys_values(torch.arange(train_timesteps)).numpy()
        self._table = torch.from_numpy(rounded_to_half(table, "table of the time token").astype(np.float32))

    def timestep_keys_values(self, timesteps: Tensor) -> Tensor:
        """Rows (S, R, 1, D) of the table, of integer time steps (S,)."""
        return self._table[timesteps]
