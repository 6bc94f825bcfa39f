"""A linear layer executed in integer codes: the training-side reference of an exported quantized MatMul."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.quant.quantizer import code_range, mse_scale, quantize


@dataclass(frozen=True, slots=True)
class LinearBits:
    """Weight and activation bits of a linear layer."""

    weight: int = 8
    activation: int = 8

    def __post_init__(self) -> None:
        code_range(self.weight)
        code_range(self.activation)


class QuantizedLinear(nn.Module):
    """``y = (codes(x) @ codes(W)^T) * (scale_x * scale_W) + b``: static per-tensor input, per-output-channel weight.

    The products of integer codes are summed exactly (whole numbers below 2^24 in float32) for up to 1,024 inputs;
    beyond that the sum is rounded like any float32 sum.
    """

    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear, input_scale: Tensor, bits: LinearBits) -> None:
        """Quantize the weight of ``linear``; ``input_scale`` is a float32 scalar."""
        super().__init__()
        self.bits = bits
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(torch.float32)
        scale = mse_scale(weight, bits.weight, dim=1)  # (out, 1)
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("codes", quantize(weight, scale, bits.weight))
        self.register_buffer("weight_scale", scale[:, 0])
        self.register_buffer("input_scale", input_scale.detach().clone().reshape(()))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        product = quantize(x, self.input_scale, self.bits.activation) @ self.codes.t()
        return product * (self.input_scale * self.weight_scale) + self.bias
