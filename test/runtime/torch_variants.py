"""Exported variants of a small DiffusionPolicy-T in every precision, and values inside their graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper

from dcqfa_ros.runtime.engine import Engine
from training.export.diffusion_policy_t import Rest, export_graphs
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.quant.elastic_calibration import calibrate_inputs, calibrate_weights
from training.subnet import Layer, Precision, Subnet

CONFIG = DiffusionPolicyTConfig(depth=2, heads=3, dim=24, ffn_ratio=2)  # sizes that are no multiples of 16
HISTORY, OBSERVED, ACTED = CONFIG.observation_horizon, CONFIG.observation_dim, CONFIG.action_dim
Arrays = Mapping[str, np.ndarray]


def _uniform(precision: Precision, weight: int, activation: int) -> Subnet:
    return Subnet((Layer(3, 48, weight, activation), Layer(2, 36, weight, activation)), precision)


_MIXED = Subnet((Layer(3, 48, 8, 8), Layer(1, 36, 4, 4)), Precision.INT)
_PLANS = {
    "fp32": (_uniform(Precision.FP32, 32, 32), Rest.FLOAT32),
    "fp16": (_uniform(Precision.FP16, 16, 16), Rest.FLOAT16),
    "fp8": (_uniform(Precision.FP8, 8, 8), Rest.FLOAT32),
    "w8a8": (_uniform(Precision.INT, 8, 8), Rest.FLOAT32),
    "w4a4": (_uniform(Precision.INT, 4, 4), Rest.INT8),
    "w4a8": (_uniform(Precision.INT, 4, 8), Rest.INT8),
    "mixed": (_MIXED, Rest.FLOAT16),
}
VARIANTS = tuple(_PLANS)
KINDS = {"fp32": "float32", "fp16": "float16", "fp8": "fp8"}  # of the blocks' layers; int8 for the others


@cache
def variant(name: str) -> dict[str, bytes]:
    """Role -> canonical graph of a variant with random weights and fitted quantizers."""
    subnet, rest = _PLANS[name]
    with torch.no_grad():
        return export_graphs(_supernet().extract(subnet), 20, rest)


@cache
def _supernet() -> ElasticDiffusionPolicyT:
    network = ElasticDiffusionPolicyT(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith("log_step"):
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) / CONFIG.dim**0.5)
        calibrate_weights(network)
        noisy = torch.randn(4, CONFIG.horizon, ACTED, generator=generator)
        observed = torch.randn(4, HISTORY, OBSERVED, generator=generator)
        calibrate_inputs(network, [(noisy, torch.tensor([1, 5, 11, 19]), observed)])
    return network


def on_one_thread() -> Iterator[None]:
    """Body of a fixture: products as small as these only lose time on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def denoiser_inputs(engine: Engine, batch: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Noise, one row of the time steps' keys and values, and those of random observations."""
    observed = engine.observation_kv(random(seed, batch, HISTORY, OBSERVED)).copy()
    return random(seed + 1, batch, tokens, ACTED), engine.timestep_kv(np.array([3, 17]))[1:2].copy(), observed


def values(data: bytes, names: Sequence[str], inputs: Arrays) -> dict[str, np.ndarray]:
    """What tensors inside a canonical graph hold, computed by ONNX Runtime node by node as the graph is written."""
    model = onnx.load_from_string(data)
    present = {value.name: value for value in model.graph.output}
    del model.graph.output[:]
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info} | present
    wanted = [name for name in dict.fromkeys(names) if name not in inputs]
    for name in wanted:
        model.graph.output.append(helper.make_tensor_value_info(name, known[name].type.tensor_type.elem_type, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip(wanted, session.run(wanted, dict(inputs)), strict=True))
    return found | {name: inputs[name] for name in names if name in inputs}
