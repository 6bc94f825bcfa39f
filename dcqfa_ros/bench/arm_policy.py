"""A policy of random weights for a cell with an arm: two RGB-D cameras, wrench, joints and pose in, twists out.

It measures and tests what carries a policy, not what one has learned: it has the graphs, the normalisers and the files
of any other bundle, and its actions are bounded to slow twists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.bundle.write import file_spec, write_bundle

VARIANT = "fp32"
CAMERAS = ("front", "wrist")
SOURCES = (
    "front=color:front",
    "front_depth=depth:front",
    "wrist=color:wrist",
    "wrist_depth=depth:wrist",
    "wrench=tool_wrench",
    "joints=joint_states",
    "tcp_pose=tcp_pose",
)
"""Parameter ``observation_sources`` of ``policy_node`` for these policies."""

_ROWS, _WIDTH, _HISTORY, _ACTED = 2, 32, 2, 7
_LINEAR, _ANGULAR = 0.02, 0.05  # m/s and rad/s: the largest twist
_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64
_FILES = {role: f"variants/{VARIANT}/{role}.onnx" for role in ("encoder", "timestep", "denoiser")}


@dataclass(frozen=True, slots=True)
class ArmPolicy:
    """Size of a random policy.

    Attributes:
        width, height: of the cameras' pictures, px.
        side: of the square crop that the network takes, px.
        camera_rate: of the cameras, Hz.
        state_rate: of joints and pose, Hz.
        samples: of the wrench window, at 100 Hz.
        rate: of the actions, Hz.
        executed: actions per chunk, of a horizon of 16.
        hidden, layers: of the denoiser, which decide how long inference takes.
        steps: denoising steps.
        cameras: of them.
        max_age_ms: of every observation.
        seed: of the weights.
    """

    width: int = 640
    height: int = 480
    side: int = 84
    camera_rate: float = 30.0
    state_rate: float = 50.0
    samples: int = 16
    rate: float = 10.0
    executed: int = 8
    hidden: int = 512
    layers: int = 4
    steps: int = 8
    cameras: tuple[str, ...] = CAMERAS
    max_age_ms: float = 500.0
    seed: int = 0


def write_arm_policy(folder: Path, size: ArmPolicy | None = None) -> Path:
    """Write the bundle of a random policy and return its folder.

    Raises:
        BundleError: the folder exists already.
    """
    chosen = size or ArmPolicy()
    observations = _observations(chosen)
    dim = sum(_network_size(o) for o in observations.values())
    models = (_encoder(chosen, dim), _timestep(chosen), _denoiser(chosen))
    files = dict(zip(_FILES.values(), models, strict=True))
    write_bundle(folder, _specification(chosen, observations, files), files)
    return folder


def _network_size(observation: Mapping[str, Any]) -> int:
    shape = [*observation.get("crop", ()), *observation["shape"][2:]] if "crop" in observation else observation["shape"]
    return int(np.prod(shape))


def _observations(size: ArmPolicy) -> dict[str, dict[str, Any]]:
    identity = {"kind": "identity"}
    common = {"history": _HISTORY, "max_age_ms": size.max_age_ms, "dtype": "float32", "normalizer": identity}
    picture = {**common, "rate_hz": size.camera_rate, "crop": [size.side, size.side]}
    state = {**common, "type": "low_dim", "rate_hz": size.state_rate, "units": "-", "frame": "world"}
    found: dict[str, dict[str, Any]] = {}
    for camera in size.cameras:
        scale = {"kind": "min_max", "scale": [1 / 127.5] * 3, "offset": [-1.0] * 3}
        found[camera] = {
            **picture, "type": "image", "shape": [size.height, size.width, 3], "dtype": "uint8",
            "units": "intensity 0 to 255", "frame": f"{camera}_color_optical_frame", "normalizer": scale,
        }  # fmt: skip
        found[f"{camera}_depth"] = {
            **picture, "type": "depth", "shape": [size.height, size.width], "dtype": "uint16", "depth_scale": 0.001,
            "units": "m", "frame": f"{camera}_color_optical_frame",
        }  # fmt: skip
    clip = [50.0] * 3 + [5.0] * 3
    wrench = {"type": "wrench", "shape": [size.samples, 6], "rate_hz": 100.0, "units": "N, N m", "frame": "tool"}
    return {
        **found,
        "wrench": {**common, **wrench, "clip": clip},
        "joints": {**state, "shape": [6], "units": "rad"},
        "tcp_pose": {**state, "shape": [7], "units": "m, quaternion"},
    }


def _specification(
    size: ArmPolicy, observations: Mapping[str, Mapping[str, Any]], files: Mapping[str, bytes]
) -> BundleSpec:
    bits = {"weight": 32, "activation": 32, "kind": "float"}
    layer = {"layer": "denoiser", "searched": bits, "exported": bits, "executed": {"onnxruntime": bits}}
    scale = [1 / _LINEAR] * 3 + [1 / _ANGULAR] * 3 + [2.0]
    variant = {
        "name": VARIANT,
        "description": "random weights",
        "precision": VARIANT,
        "opset": 21,
        "files": {role: file_spec(path, files[path]).model_dump() for role, path in _FILES.items()},
        "layers": [layer],
        "size": {
            "parameters": size.layers * size.hidden**2,
            "paper_bytes": 4 * size.layers * size.hidden**2,
            "disk_bytes": sum(map(len, files.values())),
        },
        "parity": {"samples": 1, "max_abs": 0.0, "rms": 0.0, "tolerance_rms": 1e-4, "export_rms": 0.0,
                   "tolerance_export_rms": 1e-4},
    }  # fmt: skip
    document = {
        "schema_version": 1,
        "name": "random_arm",
        "task": "none: random weights",
        "backbone": "diffusion_policy_t",
        "architecture": {
            "depth": size.layers, "heads": 1, "dim": size.hidden, "ffn_dim": size.hidden, "horizon": 16,
        },
        "license": "Apache-2.0",
        "observations": observations,
        "action": {
            "space": "tcp_twist_gripper",
            "names": ["vx", "vy", "vz", "wx", "wy", "wz", "gripper"],
            "units": ["m/s"] * 3 + ["rad/s"] * 3 + ["opening"],
            "frame": "world",
            "mode": "absolute",
            "rotation": "none",
            "gripper": "continuous",
            "rate_hz": size.rate,
            "horizon": 16,
            "first_executed": 1,
            "executed": size.executed,
            "minimum": [-_LINEAR] * 3 + [-_ANGULAR] * 3 + [0.0],
            "maximum": [_LINEAR] * 3 + [_ANGULAR] * 3 + [1.0],
            "normalizer": {"kind": "min_max", "scale": scale, "offset": [0.0] * 6 + [-1.0]},
        },
        "diffusion": {
            "train_timesteps": 100,
            "beta_schedule": "squared_cosine",
            "prediction": "epsilon",
            "clip_sample": 1.0,
            "sampler": "ddim",
            "steps": size.steps,
        },
        "training": {
            "data": "none",
            "episodes": 1,
            "split": "none",
            "steps": 1,
            "batch": 1,
            "seed": size.seed,
            "command": "none: random weights",
        },
        "default_variant": VARIANT,
        "variants": [variant],
    }  # fmt: skip
    return BundleSpec.model_validate(document)


class _Weights:
    """Random constants, each of its own seed."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> NDArray[np.float32]:
        spread = 1.0 / np.sqrt(shape[0])
        return (spread * self._generator.standard_normal(shape)).astype(np.float32)


def _serialize(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, tuple[int, list[Any]]],
    output: tuple[str, list[Any]],
    constants: Mapping[str, NDArray[Any]],
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "random",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(output[0], _FLOAT, output[1])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized


def _encoder(size: ArmPolicy, dim: int) -> bytes:
    """``observation`` -> ``observation_kv``: a linear map per time step."""
    nodes = [
        helper.make_node("MatMul", ["observation", "weight"], ["linear"]),
        helper.make_node("Tanh", ["linear"], ["flat"]),
        helper.make_node("Reshape", ["flat", "split"], ["parts"]),
        helper.make_node("Transpose", ["parts"], ["observation_kv"], perm=[0, 2, 1, 3]),
    ]
    constants = {
        "weight": _Weights(size.seed)(dim, _ROWS * _WIDTH),
        "split": np.array([0, _HISTORY, _ROWS, _WIDTH]),
    }
    inputs = {"observation": (_FLOAT, ["B", _HISTORY, dim])}
    return _serialize(nodes, inputs, ("observation_kv", ["B", _ROWS, _HISTORY, _WIDTH]), constants)


def _timestep(size: ArmPolicy) -> bytes:
    """``timesteps`` -> ``timestep_kv``: sines."""
    nodes = [
        helper.make_node("Cast", ["timesteps"], ["real"], to=_FLOAT),
        helper.make_node("Unsqueeze", ["real", "last"], ["column"]),
        helper.make_node("Mul", ["column", "frequencies"], ["angles"]),
        helper.make_node("Sin", ["angles"], ["flat"]),
        helper.make_node("Reshape", ["flat", "split"], ["timestep_kv"]),
    ]
    constants = {
        "last": np.array([1]),
        "frequencies": _Weights(size.seed + 1)(1, _ROWS * _WIDTH),
        "split": np.array([-1, _ROWS, 1, _WIDTH]),
    }
    return _serialize(nodes, {"timesteps": (_INT64, ["S"])}, ("timestep_kv", ["S", _ROWS, 1, _WIDTH]), constants)


def _denoiser(size: ArmPolicy) -> bytes:
    """``noisy``, ``timestep_kv``, ``observation_kv`` -> ``noise``: causal layers that read all of their inputs."""
    weights = _Weights(size.seed + 2)
    constants: dict[str, NDArray[Any]] = {
        "axis": np.array(1), "axes": np.array([1, 2, 3]), "token": np.array([1, 2]),
        "up": weights(_ACTED, size.hidden), "down": weights(size.hidden, _ACTED),
    }  # fmt: skip
    nodes = [
        helper.make_node("CumSum", ["noisy", "axis"], ["past"]),
        helper.make_node("ReduceMean", ["observation_kv", "axes"], ["seen"], keepdims=0),
        helper.make_node("Unsqueeze", ["seen", "token"], ["seen_token"]),
        helper.make_node("ReduceMean", ["timestep_kv", "axes"], ["time"], keepdims=0),
        helper.make_node("Unsqueeze", ["time", "token"], ["time_token"]),
        helper.make_node("MatMul", ["past", "up"], ["hidden"]),
        helper.make_node("Add", ["hidden", "seen_token"], ["informed"]),
        helper.make_node("Add", ["informed", "time_token"], ["timed"]),
        helper.make_node("Tanh", ["timed"], ["layer_0"]),
    ]
    for layer in range(size.layers):
        constants[f"weight_{layer}"] = weights(size.hidden, size.hidden)
        nodes += [
            helper.make_node("MatMul", [f"layer_{layer}", f"weight_{layer}"], [f"sum_{layer}"]),
            helper.make_node("Tanh", [f"sum_{layer}"], [f"layer_{layer + 1}"]),
        ]
    nodes.append(helper.make_node("MatMul", [f"layer_{size.layers}", "down"], ["noise"]))
    inputs: dict[str, tuple[int, list[Any]]] = {
        "noisy": (_FLOAT, ["B", "T", _ACTED]),
        "timestep_kv": (_FLOAT, [1, _ROWS, 1, _WIDTH]),
        "observation_kv": (_FLOAT, ["B", _ROWS, _HISTORY, _WIDTH]),
    }
    return _serialize(nodes, inputs, ("noise", ["B", "T", _ACTED]), constants)
