"""Moving magnitude between activations and weights: ``(X / s) (W * s)^T`` equals ``X W^T`` for any positive s.

Where the division goes in this backbone: the three LayerNorms of a block have weight and bias, into which it folds for
self-attention's q, k and v, for cross-attention's q and for fc1. The input of o is a mixture of v's rows channel by
channel, so it folds into the rows of v. The input of fc2 stands behind GELU and the memory tokens are read by the k and
v of every block: both keep an explicit multiplication.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.baselines.network import PlainLinear
from training.baselines.parts import Multiply
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.quant.calibrate import InputGroup

NORMS = {"self_attn.qkv": "norm1", "cross_attn.q": "norm2", "fc1": "norm3"}
VALUES = {"self_attn.o": "self_attn.v", "cross_attn.o": "cross_attn.v"}
LEAST = 1e-5  # of a scale, as a share of the largest


def linears_of(network: DiffusionPolicyT, group: InputGroup) -> list[PlainLinear]:
    """The plain linears of one group."""
    found = [network.get_submodule(name) for name in group.linears]
    assert all(isinstance(linear, PlainLinear) for linear in found)
    return found  # type: ignore[return-value]


def weight_peaks(network: DiffusionPolicyT, group: InputGroup) -> Tensor:
    """Greatest magnitude (in,) of the weights of all linears of a group, per input channel."""
    return torch.stack([linear.weight.abs().amax(0) for linear in linears_of(network, group)]).amax(0)


def usable(scale: Tensor) -> Tensor:
    """``scale`` (in,) with 1 where it is not a positive finite number, and no channel far below the largest."""
    scale = torch.where(torch.isfinite(scale) & (scale > 0.0), scale, 1.0)
    return scale.clamp_min(LEAST * float(scale.max()))


@torch.no_grad()
def smooth(network: DiffusionPolicyT, group: InputGroup, scale: Tensor, fold: bool = True) -> None:
    """Divide the input of a group by ``scale`` (in,) and multiply its weights by it: the function stays the same.

    Args:
        network: with plain linears whose weights are in floating point; changed in place.
        group: linears that read one tensor.
        scale: positive, float32.
        fold: fold the division where that is possible; else it stays an explicit multiplication everywhere.
    """
    block, part = _split(group.name)
    for linear in linears_of(network, group):
        linear.set_weight(linear.weight * scale)
    if fold and part in NORMS:
        norm = network.get_submodule(f"{block}.{NORMS[part]}")
        assert isinstance(norm, nn.LayerNorm)
        norm.weight.div_(scale)
        norm.bias.div_(scale)
        for linear in linears_of(network, group):
            linear.input_factor = 1.0 / scale
    elif fold and part in VALUES:
        values = network.get_submodule(f"{block}.{VALUES[part]}")
        assert isinstance(values, PlainLinear)
        values.set_weight(values.weight / scale[:, None], values.bias / scale)
        values.output_factor = 1.0 / scale
        for linear in linears_of(network, group):
            linear.input_factor = 1.0 / scale
    else:
        for linear in linears_of(network, group):
            linear.transforms.append(Multiply(len(scale), 1.0 / scale))


def _split(name: str) -> tuple[str, str]:
    """``blocks.0.self_attn.qkv`` as ``blocks.0`` and ``self_attn.qkv``; the memory belongs to no block."""
    if name.count(".") < 2:
        return "", name
    blocks, index, part = name.split(".", 2)
    return f"{blocks}.{index}", part
