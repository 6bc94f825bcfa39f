"""Post-training quantization: observe activations over whole denoising runs, then replace linears."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.quant.linear import LinearBits, QuantizedLinear
from training.quant.ranges import MSE


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears that read the same tensor and therefore share one input quantizer."""

    name: str
    linears: tuple[str, ...]


def input_groups(network: DiffusionPolicyT) -> tuple[InputGroup, ...]:
    """Quantized linears of the policy by shared input (``algorithms.md`` section 1).

    Embeddings, memory MLP and action head are not among them and stay in floating point.
    """
    groups = []
    for index in range(len(network.blocks)):
        block = f"blocks.{index}"
        groups.append(InputGroup(f"{block}.self_attn.qkv", tuple(f"{block}.self_attn.{p}" for p in "qkv")))
        for single in ("self_attn.o", "cross_attn.q", "cross_attn.o", "fc1", "fc2"):
            groups.append(InputGroup(f"{block}.{single}", (f"{block}.{single}",)))
    memory = tuple(f"blocks.{i}.cross_attn.{p}" for i in range(len(network.blocks)) for p in "kv")
    return (*groups, InputGroup("memory", memory))


@contextmanager
def observed_inputs(network: nn.Module, groups: Sequence[InputGroup]) -> Iterator[dict[str, MSE]]:
    """Record the input of every group while the network runs inside the ``with`` block."""
    statistics = {group.name: MSE() for group in groups}
    handles = []
    for group in groups:
        observer = statistics[group.name]
        handles.append(
            network.get_submodule(group.linears[0]).register_forward_pre_hook(
                lambda _module, args, observer=observer: observer.observe(args[0])
            )
        )
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def quantized_copy(
    network: DiffusionPolicyT,
    groups: Sequence[InputGroup],
    statistics: dict[str, MSE],
    bits: LinearBits,
) -> DiffusionPolicyT:
    """A copy of ``network`` whose grouped linears run in integer codes.

    Raises:
        ValueError: a group was never observed.
        TypeError: a group names something other than a linear layer in full precision.
    """
    result = copy.deepcopy(network)
    for group in groups:
        if not statistics[group.name].observed:
            raise ValueError(f"calibration never ran {group.name!r}; run the whole policy inside observed_inputs()")
        scale = statistics[group.name].range(bits.activation).step
        for name in group.linears:
            parent, _, child = name.rpartition(".")
            linear = network.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"{name!r} is a {type(linear).__name__}, expected a linear layer in full precision")
            setattr(result.get_submodule(parent), child, QuantizedLinear(linear, scale, bits))
    return result.eval()
