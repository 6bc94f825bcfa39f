"""First values of a supernet's quantizers, fitted to what its full-precision network computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from training.nn.elastic import InputQuantizer
from training.nn.elastic_policy import ElasticPolicy
from training.quant.fp8 import fp8_scale
from training.quant.lsq import weight_range
from training.quant.quantizer import BITS, mse_scale, round_to_nearest
from training.quant.ranges import OBSERVERS, Method, MinMax

ASYMMETRIC_BITS = 4  # at 8 bits a range that keeps zero point 0 has room for the few values below zero


@torch.no_grad()
def calibrate_weights(network: ElasticPolicy, method: Method = "mse") -> None:
    """Set the row steps of every elastic layer: to those of least squared error, or to reach the greatest magnitude."""
    for linear in network.elastic_linears().values():
        for index, bits in enumerate(BITS):
            weight = linear.weight.detach()
            if method == "mse":
                scale = mse_scale(weight, bits, dim=1, codes=weight_range(bits))
            else:
                _, scale = round_to_nearest(weight, bits, dim=1)
            linear.log_step[index].copy_(scale.flatten().log())


@torch.no_grad()
def calibrate_inputs(network: ElasticPolicy, calls: Iterable[tuple[Tensor, ...]], method: Method = "mse") -> None:
    """Set step and range of every input quantizer from the active full-precision network's inputs.

    Args:
        network: with its full-precision largest subnet active.
        calls: arguments of the network, pooled over noise levels where it denoises: for DiffusionPolicy-T noisy
            (B, T, Da), time steps (B,), observations (B, To, Do).
        method: what a range is chosen by: least squared error, everything observed, or 99.9 % of it.
    """
    observers = {name: OBSERVERS[method]() for name in network.input_quantizers()}
    handles = []
    for name, quantizer in network.input_quantizers().items():

        def observe(_module: InputQuantizer, args: tuple[Tensor, ...], observer: MinMax = observers[name]) -> None:
            observer.observe(args[0])

        handles.append(quantizer.register_forward_pre_hook(observe))
    try:
        for arguments in calls:
            network(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    for name, quantizer in network.input_quantizers().items():
        observer = observers[name]
        positive = float(observer.minimum) > -0.2 * float(observer.maximum)  # after GELU: never below -0.17
        for index, bits in enumerate(BITS):
            step, low, high = observer.range(bits, symmetric=not (positive and bits == ASYMMETRIC_BITS))
            quantizer.log_step[index] = step.log()
            quantizer.low[index], quantizer.high[index] = low, high
        reach = torch.maximum(observer.maximum.abs(), observer.minimum.abs())
        quantizer.fp8_scale.copy_(fp8_scale(reach).reshape(()))
