"""Post-training quantization: observe activations over whole denoising runs, then replace linears."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from training.quant.linear import LinearBits, QuantizedLinear
from training.quant.ranges import MSE

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears that read the same tensor and therefore share one input quantizer."""

    name: str
    linears: tuple[str, ...]


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
    network: Network,
    groups: Sequence[InputGroup],
    statistics: dict[str, MSE],
    bits: LinearBits,
) -> Network:
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
