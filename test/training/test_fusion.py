"""Fusion leaves every result as it was, bit for bit, and touches only what matches exactly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto

from dcqfa_ros.runtime.fusion import fuse_for_onnxruntime_cpu
from dcqfa_ros.runtime.lowering import lower_for_onnxruntime_cpu, parse_model
from training.export.diffusion_policy_t import export_graphs
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import input_groups
from training.quant.calibrate import observed_inputs, quantized_copy
from training.quant.linear import LinearBits

CONFIG = DiffusionPolicyTConfig(depth=2, heads=4, dim=64, ffn_ratio=2)


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    """A quantized policy as canonical graphs."""
    torch.manual_seed(0)
    network = DiffusionPolicyT(CONFIG).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    groups = input_groups(network)
    with observed_inputs(network, groups) as statistics, torch.no_grad():
        network(torch.randn(8, 16, 2), torch.arange(8), torch.randn(8, 2, 20))
    return export_graphs(quantized_copy(network, groups, statistics, LinearBits()), 100)


def lowered(data: bytes) -> ModelProto:
    model = parse_model(data, "graph")
    lower_for_onnxruntime_cpu(model, "graph")
    return model


def run(model: ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["MatMulAddFusion"],
    )
    return session.run(None, feeds)[0]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 9), (3, 16)])
def test_fused_graphs_give_the_same_result_bit_for_bit(graphs: dict[str, bytes], batch: int, tokens: int) -> None:
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    feeds = {
        "denoiser": {
            "noisy": draw(batch, tokens, 2),
            "timestep_kv": draw(1, 16, 1, 16),
            "observation_kv": draw(batch, 16, 2, 16),
        },
        "encoder": {"observation": draw(batch, 2, 20)},
    }
    for role, inputs in feeds.items():
        plain, fused = lowered(graphs[role]), lowered(graphs[role])
        assert fuse_for_onnxruntime_cpu(fused)
        np.testing.assert_array_equal(run(fused, inputs), run(plain, inputs))


def test_every_attention_and_every_quantized_product_is_fused(graphs: dict[str, bytes]) -> None:
    model = lowered(graphs["denoiser"])
    made = fuse_for_onnxruntime_cpu(model)
    assert made == {"MatMulIntegerToFloat": 6 * CONFIG.depth, "MultiHeadAttention": 2 * CONFIG.depth}
    left = Counter(node.op_type for node in model.graph.node)
    assert not left["Softmax"]
    assert not left["DequantizeLinear"]


def test_what_is_read_twice_or_leaves_the_graph_stays_apart(graphs: dict[str, bytes]) -> None:
    model = lowered(graphs["denoiser"])
    product = next(n for n in model.graph.node if n.op_type == "MatMul" and n.name.endswith("fc1.product"))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(product.output[0]))
    weights = next(n for n in model.graph.node if n.op_type == "Softmax")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(weights.output[0]))
    made = fuse_for_onnxruntime_cpu(model)
    assert made == {"MatMulIntegerToFloat": 6 * CONFIG.depth - 1, "MultiHeadAttention": 2 * CONFIG.depth - 1}
    names = {name for node in model.graph.node for name in node.output}
    assert {product.output[0], weights.output[0]} <= names


def test_a_graph_without_the_patterns_is_left_as_it_is(graphs: dict[str, bytes]) -> None:
    model = lowered(graphs["timestep"])
    before = model.SerializeToString()
    assert not fuse_for_onnxruntime_cpu(model)
    assert model.SerializeToString() == before
