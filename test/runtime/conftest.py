"""A tiny policy that obeys the ONNX contract of ``dcqfa_ros.runtime.engine`` with a handful of nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.bundle.write import write_bundle
from test.conftest import ROLES, make_spec

ROWS, WIDTH, HISTORY, OBSERVED, ACTED, HIDDEN = 2, 4, 2, 20, 2, 8
KV = ROWS * WIDTH
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def serialize(
    nodes: list[NodeProto],
    inputs: Mapping[str, tuple[int, list[Any]]],
    outputs: Mapping[str, tuple[int, list[Any]]],
    constants: Mapping[str, np.ndarray],
    opset: int = 21,
) -> bytes:
    """Make ONNX bytes of a graph; inputs and outputs are name -> (element type, shape)."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def quantized_matmul(name: str, x: str, weight: np.ndarray, scale: float) -> tuple[list[NodeProto], dict[str, Any]]:
    """Nodes and constants of ``x @ weight`` with canonical int8 quantizers; the result is called ``name``."""
    steps = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    constants = {
        f"{name}_s": np.float32(scale),
        f"{name}_z": np.int8(0),
        f"{name}_w": np.clip(np.rint(weight / steps), -127, 127).astype(np.int8),
        f"{name}_ws": steps,
        f"{name}_wz": np.zeros(len(steps), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", [x, f"{name}_s", f"{name}_z"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [f"{name}_x"]),
        helper.make_node("DequantizeLinear", [f"{name}_w", f"{name}_ws", f"{name}_wz"], [f"{name}_wx"], axis=1),
        helper.make_node("MatMul", [f"{name}_x", f"{name}_wx"], [name]),
    ]
    return nodes, constants


def encoder_model() -> bytes:
    """``observation`` -> ``observation_kv``: a linear map per time step."""
    nodes = [
        helper.make_node("MatMul", ["observation", "weight"], ["flat"]),
        helper.make_node("Reshape", ["flat", "split"], ["parts"]),
        helper.make_node("Transpose", ["parts"], ["observation_kv"], perm=[0, 2, 1, 3]),
    ]
    return serialize(
        nodes,
        {"observation": (FLOAT, ["B", HISTORY, OBSERVED])},
        {"observation_kv": (FLOAT, ["B", ROWS, HISTORY, WIDTH])},
        {"weight": _random(1, OBSERVED, KV), "split": np.array([0, HISTORY, ROWS, WIDTH])},
    )


def timestep_model() -> bytes:
    """``timesteps`` -> ``timestep_kv``: sines."""
    nodes = [
        helper.make_node("Cast", ["timesteps"], ["real"], to=FLOAT),
        helper.make_node("Unsqueeze", ["real", "last"], ["column"]),
        helper.make_node("Mul", ["column", "frequencies"], ["angles"]),
        helper.make_node("Sin", ["angles"], ["flat"]),
        helper.make_node("Reshape", ["flat", "split"], ["timestep_kv"]),
    ]
    return serialize(
        nodes,
        {"timesteps": (INT64, ["S"])},
        {"timestep_kv": (FLOAT, ["S", ROWS, 1, WIDTH])},
        {
            "last": np.array([1]),
            "frequencies": _random(2, 1, KV),
            "split": np.array([-1, ROWS, 1, WIDTH]),
        },
    )


def denoiser_model(quantized: bool, poison: bool = False, sign: float = 1.0, **renamed: str) -> bytes:
    """``noisy``, ``timestep_kv``, ``observation_kv`` -> ``noise``: causal, and it reads all of its inputs.

    ``poison`` makes the result NaN, ``sign`` -1 makes it wrong but well-formed; ``renamed`` replaces names of inputs
    and outputs, against the contract.
    """
    noisy, noise = renamed.get("noisy", "noisy"), renamed.get("noise", "noise")
    constants: dict[str, Any] = {
        "axis": np.array(1),
        "axes": np.array([1, 2, 3]),
        "token": np.array([1, 2]),
        "bias": _random(3, HIDDEN) * np.float32(np.nan if poison else 1.0),
    }
    nodes = [
        helper.make_node("CumSum", [noisy, "axis"], ["past"]),
        helper.make_node("ReduceMean", ["observation_kv", "axes"], ["seen"], keepdims=0),
        helper.make_node("Unsqueeze", ["seen", "token"], ["seen_token"]),
        helper.make_node("ReduceMean", ["timestep_kv", "axes"], ["time"], keepdims=0),
        helper.make_node("Unsqueeze", ["time", "token"], ["time_token"]),
    ]
    for name, source, weight in (
        ("up", "past", _random(4, ACTED, HIDDEN)),
        ("down", "bent", _random(5, HIDDEN, ACTED) * np.float32(sign)),
    ):
        if name == "down":
            nodes += [
                helper.make_node("Add", ["up", "bias"], ["biased"]),
                helper.make_node("Add", ["biased", "seen_token"], ["informed"]),
                helper.make_node("Add", ["informed", "time_token"], ["timed"]),
                helper.make_node("Tanh", ["timed"], ["bent"]),
            ]
        if quantized:
            more, extra = quantized_matmul(name, source, weight, 0.05 if name == "up" else 1 / 127)
            nodes, constants = nodes + more, constants | extra
        else:
            constants[f"{name}_w"] = weight
            nodes.append(helper.make_node("MatMul", [source, f"{name}_w"], [name]))
    nodes.append(helper.make_node("Identity", ["down"], [noise]))
    return serialize(
        nodes,
        {
            noisy: (FLOAT, ["B", "T", ACTED]),
            "timestep_kv": (FLOAT, [1, ROWS, 1, WIDTH]),
            "observation_kv": (FLOAT, ["B", ROWS, HISTORY, WIDTH]),
        },
        {noise: (FLOAT, ["B", "T", ACTED])},
        constants,
    )


def tiny_files(quantized: bool = False, poison: bool = False) -> dict[str, bytes]:
    """Return role -> ONNX bytes of the tiny policy."""
    return dict(zip(ROLES, (encoder_model(), timestep_model(), denoiser_model(quantized, poison)), strict=True))


def tiny_spec(alike: bool = False, **changes: Any) -> tuple[BundleSpec, dict[str, bytes]]:
    """Return the tiny policy's description with variants fp32 and w8a8, and its files by path.

    ``alike`` gives both the weights of fp32.
    """
    files = {}
    for variant in ("fp32", "w8a8"):
        roles = tiny_files(quantized=variant == "w8a8" and not alike, poison=changes.get("poison", False))
        files.update({f"variants/{variant}/{role}.onnx": data for role, data in roles.items()})
    changes.pop("poison", None)
    return make_spec(files, alike=alike, **changes), files


def observation(seed: int = 0, batch: int = 1) -> dict[str, np.ndarray]:
    """Return a random observation of the tiny policy, pixels."""
    generator = np.random.default_rng(seed)
    return {
        "keypoints": generator.uniform(0, 512, (batch, 2, 9, 2)).astype(np.float32),
        "agent_position": generator.uniform(0, 512, (batch, 2, 2)).astype(np.float32),
    }


@pytest.fixture
def policy_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Return a factory that writes the tiny policy as a bundle and returns its folder."""

    def make(folder: str = "tiny", **changes: Any) -> Path:
        place = tmp_path / folder
        write_bundle(place, *tiny_spec(**changes))
        return place

    return make
