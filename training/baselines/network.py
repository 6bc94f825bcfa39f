"""Plain linears: a policy whose transformer linears each hold codes and scales of their own, as any method sets them.

The q, k, v and o of both attentions, fc1 and fc2 of every block are replaced; embeddings, memory MLP (time), norms and
the final layer stay in floating point, as in the supernet's subnets. No width is elastic and nothing is shared, so a
method is nothing but what it writes into :class:`PlainLinear`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.baselines.bits import FLOAT, BaselineError, Bits
from training.baselines.parts import Part, Unquantized
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.diffusion_policy_t_shape import input_groups
from training.quant.calibrate import InputGroup
from training.quant.fp8 import fp8_codes, fp8_scale
from training.quant.quantizer import TINY

EXCLUDED = ("action_embedding", "observation_embedding", "memory_fc1", "memory_fc2", "norm layers", "head")
ROW_BITS = (0, *range(2, 9), FLOAT)


def weight_codes(weight: Tensor, bits: Tensor, reach: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric integer codes of weight rows, and their scales: round to nearest at the absolute maximum.

    Codes lie from -(2^(bits-1) - 1) to 2^(bits-1) - 1 (15 values at 4 bits). A row of 16 bits keeps its values, rounded
    to float16, at scale 1; one of 0 bits becomes zero.

    Args:
        weight: (out, in) float32.
        bits: (out,) integers of :data:`ROW_BITS`.
        reach: (out,) magnitudes at which rows are clipped; their absolute maxima if None.

    Returns:
        Codes (out, in) and scales (out,), float32.
    """
    weight = weight.detach().to(torch.float32)
    reach = weight.abs().amax(dim=1) if reach is None else reach
    high = (2.0 ** (bits.to(torch.float32) - 1.0) - 1.0).clamp_min(1.0)
    scale = (reach / high).clamp_min(TINY)
    codes = torch.clamp(torch.round(weight / scale[:, None]), -high[:, None], high[:, None])  # type: ignore[arg-type]
    is_float, pruned = bits == FLOAT, bits == 0
    codes = torch.where(is_float[:, None], weight.to(torch.float16).to(torch.float32), codes)
    return codes.masked_fill(pruned[:, None], 0.0), scale.masked_fill(is_float | pruned, 1.0)


class PlainLinear(nn.Module):
    """``y = (codes(transform(x)) @ codes(W)^T) * (scale_x * scale_W) + b``.

    A new one computes what the linear layer computes.

    Attributes:
        codes: (out, in) float32 buffer: integer or E4M3 codes, or values where a row is left in floating point.
        weight_scale: (out,) float32 buffer.
        row_bits: (out,) uint8 buffer; 16 for rows in floating point, 0 for pruned ones.
        bias: (out,) float32 buffer.
        fp8: whether the codes are E4M3 values.
        transforms: applied to the input in order, before it is quantized.
        activation: the quantizer of the input.
        input_factor: (in,) what has been folded into the input relative to the original layer's, None for nothing.
        output_factor: (out,) the same of the output. Both are for comparisons alone; see :meth:`output_error`.
    """

    codes: Tensor
    weight_scale: Tensor
    row_bits: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        """Make a layer with zero weights."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fp8 = False
        self.register_buffer("codes", torch.zeros(out_features, in_features))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("row_bits", torch.full((out_features,), FLOAT, dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out_features))
        self.transforms = nn.ModuleList()
        self.activation: Part = Unquantized()
        self.input_factor: Tensor | None = None
        self.output_factor: Tensor | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> PlainLinear:
        """The same function as ``linear``, nothing quantized."""
        plain = cls(linear.in_features, linear.out_features)
        plain.codes.copy_(linear.weight.detach())
        if linear.bias is not None:
            plain.bias.copy_(linear.bias.detach())
        return plain

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, (out, in) float32: the weight itself until it is quantized."""
        return self.codes * self.weight_scale[:, None]

    @torch.no_grad()
    def set_weight(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Exchange the weight (out, in), and bias (out,), in floating point: nothing is quantized afterwards."""
        self.codes.copy_(weight)
        self.weight_scale.fill_(1.0)
        self.row_bits.fill_(FLOAT)
        self.fp8 = False
        if bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def quantize_weight(self, bits: int | Tensor, reach: Tensor | None = None) -> None:
        """Replace the weight by integer codes; see :func:`weight_codes`.

        Args:
            bits: of all rows, or (out,) of each.
            reach: (out,) clipping magnitudes; absolute maxima if None.

        Raises:
            BaselineError: bits that no row can have, or tensors of another length.
        """
        rows = torch.full((self.out_features,), bits) if isinstance(bits, int) else bits.detach().cpu()
        if rows.shape != (self.out_features,) or not set(rows.unique().tolist()) <= set(ROW_BITS):
            raise BaselineError(
                f"bits of weight rows: expected {self.out_features} values of {ROW_BITS}, got {tuple(rows.shape)} "
                f"with {sorted(set(rows.tolist()))}"
            )
        codes, scale = weight_codes(self.weight, rows, reach)
        self.set_codes(codes, scale, rows)

    @torch.no_grad()
    def quantize_weight_fp8(self) -> None:
        """Replace the weight by E4M3 codes at one scale per row."""
        weight = self.weight
        scale = fp8_scale(weight, dim=1)
        self.set_codes(fp8_codes(weight, scale), scale.flatten(), torch.full((self.out_features,), 8), fp8=True)

    @torch.no_grad()
    def set_codes(self, codes: Tensor, scale: Tensor, row_bits: Tensor, fp8: bool = False) -> None:
        """Take over codes (out, in), scales (out,) and bits (out,) found elsewhere."""
        self.codes.copy_(codes)
        self.weight_scale.copy_(scale)
        self.row_bits.copy_(row_bits.to(torch.uint8))
        self.fp8 = fp8

    def inputs(self, x: Tensor) -> Tensor:
        """The input (..., in) behind its transforms: what the quantizer sees."""
        for transform in self.transforms:
            x = transform(x)
        return x

    def output_error(self, original: nn.Linear, x: Tensor) -> float:
        """Error of the outputs relative to ``original`` at its own inputs (tokens, in): E|y~ - y|^2 / E|y|^2."""
        expected = nn.functional.linear(x, original.weight, original.bias)  # no hooks of the original run
        y = self(x if self.input_factor is None else x * self.input_factor)
        y = y if self.output_factor is None else y / self.output_factor
        return float((y - expected).square().mean() / expected.square().mean().clamp_min(TINY))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        codes, scale = self.activation(self.inputs(x))
        return (codes @ self.codes.t()) * (scale * self.weight_scale) + self.bias


def plain_copy(network: DiffusionPolicyT) -> DiffusionPolicyT:
    """A copy of ``network`` with plain linears that computes the same: evaluation mode, no gradients."""
    result = copy.deepcopy(network).requires_grad_(False).eval()
    for name in linear_names(network):
        linear = network.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name!r} is a {type(linear).__name__}, expected a linear layer in full precision")
        replace_module(result, name, PlainLinear.of(linear))
    return result


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def linear_groups(network: DiffusionPolicyT) -> tuple[InputGroup, ...]:
    """The quantized linears by the tensor that they read (the memory is read by the k and v of every block)."""
    return input_groups(network)


def linear_names(network: DiffusionPolicyT) -> tuple[str, ...]:
    """Module paths of the quantized linears."""
    return tuple(name for group in linear_groups(network) for name in group.linears)


def plain_linears(network: nn.Module) -> dict[str, PlainLinear]:
    """The plain linears of a copy, by module path."""
    return {name: module for name, module in network.named_modules() if isinstance(module, PlainLinear)}


def quantize_weights(network: nn.Module, bits: Bits) -> None:
    """Round the weights of all plain linears to nearest, per output channel."""
    for linear in plain_linears(network).values():
        if bits.fp8:
            linear.quantize_weight_fp8()
        else:
            linear.quantize_weight(bits.weights)


@contextmanager
def hooked(network: nn.Module, hooks: Mapping[str, Callable[..., Tensor | None]]) -> Iterator[None]:
    """Call ``hooks``, by module path, behind forward passes in the ``with`` block; what they return counts."""
    handles = [network.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observed(
    network: DiffusionPolicyT, observe: Callable[[InputGroup, Tensor], None], groups: Sequence[InputGroup] | None = None
) -> Iterator[None]:
    """Hand ``observe`` the input of every group of linears (tokens, in), while the network runs in the ``with`` block.

    Of a plain linear it is the input behind the transforms: what the quantizer sees.
    """
    handles = []

    def hook(group: InputGroup) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def call(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach()
            observe(group, (module.inputs(x) if isinstance(module, PlainLinear) else x).flatten(0, -2))

        return call

    for group in linear_groups(network) if groups is None else groups:
        handles.append(network.get_submodule(group.linears[0]).register_forward_pre_hook(hook(group)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
