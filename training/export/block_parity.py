"""Every block of an exported subnet against the training-side network, each from that network's own inputs.

Quantized networks do not agree end to end: a difference of 1e-7 moves an activation across a rounding boundary, and the
blocks after it carry that on. Block by block, from the same inputs, they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcqfa_ros.runtime.fusion import fuse_for_onnxruntime_cpu
from dcqfa_ros.runtime.lowering import lower_for_onnxruntime_cpu, parse_model
from dcqfa_ros.runtime.ort_engine import open_session, session_options
from training.export.blocks import BlockWeights
from training.export.diffusion_policy_t import add_block
from training.export.graph import GraphBuilder
from training.nn.elastic import Bits, ElasticDecoderBlock, Width
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Call:
    """Inputs (B, T, dim), (B, H, S, D) twice and masks (T, T), (T, S) of one block, and its result (B, T, dim)."""

    x: Tensor
    keys: Tensor
    values: Tensor
    self_mask: Tensor
    cross_mask: Tensor
    result: Tensor


def block_errors(
    network: ElasticDiffusionPolicyT,
    blocks: Sequence[BlockWeights],
    noisy: Float,
    timesteps: NDArray[np.int64],
    observation: Float,
) -> list[float]:
    """Root mean square error of every block's result on ONNX Runtime, relative to that of the result itself.

    Args:
        network: the extracted subnet.
        blocks: what was exported of it.
        noisy: (B, T, Da) normalised actions.
        timesteps: (1,) noise level.
        observation: (B, To, Do), normalised.
    """
    calls = _record(network, noisy, timesteps, observation)
    return [_error(block, call) for block, call in zip(blocks, calls, strict=True)]


@torch.inference_mode()
def _record(
    network: ElasticDiffusionPolicyT, noisy: Float, timesteps: NDArray[np.int64], observation: Float
) -> list[_Call]:
    calls, decode = [], network.decode_block

    def recording(
        block: ElasticDecoderBlock, x: Tensor, keys: Tensor, values: Tensor, self_mask: Tensor, cross_mask: Tensor,
        width: Width, bits: Bits,
    ) -> Tensor:  # fmt: skip
        result = decode(block, x, keys, values, self_mask, cross_mask, width, bits)
        calls.append(_Call(x, keys, values, self_mask, cross_mask, result))
        return result

    network.decode_block = recording
    try:
        network.denoise(
            torch.from_numpy(noisy),
            network.timestep_keys_values(torch.from_numpy(timesteps)),
            network.observation_keys_values(torch.from_numpy(observation)),
        )
    finally:
        network.decode_block = decode
    return calls


def _error(block: BlockWeights, call: _Call) -> float:
    g = GraphBuilder("block")
    feeds = {
        "x": call.x,
        "keys": call.keys,
        "values": call.values,
        "self_mask": call.self_mask[None, None],
        "cross_mask": call.cross_mask[None, None],
    }
    names = {name: g.input(name, tuple(tensor.shape)) for name, tensor in feeds.items()}
    result = add_block(
        g, names["x"], block, "block", (names["keys"], names["values"]), names["self_mask"], names["cross_mask"]
    )
    g.output(result, tuple(call.result.shape))
    model = parse_model(g.serialize(), "block.onnx")
    if lower_for_onnxruntime_cpu(model, "block.onnx"):
        fuse_for_onnxruntime_cpu(model)
    session = open_session(model, session_options())
    found = session.run(None, {name: tensor.contiguous().numpy() for name, tensor in feeds.items()})[0]
    expected = call.result.numpy().astype(np.float64)
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))
