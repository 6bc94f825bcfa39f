"""Cross-check of W8A8 round-to-nearest and SmoothQuant against NVIDIA's Model Optimizer, on the same linears.

The library is no requirement of this project and brings a CUDA build of PyTorch with it; docs/baselines.md says how to
install it beside a CPU build. It smooths every linear for itself where this project shares one scale among the linears
that read one tensor, so SmoothQuant agrees in distance, not in weights.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from dcqfa_ros.trials.statistics import paired_difference
from training.baselines.bits import BaselineError, Bits
from training.baselines.calibration import Calibration
from training.baselines.network import linear_names
from training.baselines.quality import HeldOut
from training.baselines.smoothquant import ALPHA
from training.policies.diffusion_policy_t import DiffusionPolicyT

PACKAGE = "nvidia-modelopt"
CHECKED = ("rtn", "smoothquant")
PER_TOKEN = {"num_bits": 8, "axis": None, "type": "dynamic", "block_sizes": {-1: None}}
PER_TENSOR = {"num_bits": 8, "axis": None}
WEIGHT = {"num_bits": 8, "axis": 0}


def check_possible(method: str, bits: Bits, options: Mapping[str, Any]) -> None:
    """Refuse a cross-check that cannot be made, before anything is computed.

    Raises:
        BaselineError: the method, its options or the bits are others, or the library is not installed.
    """
    if method not in CHECKED:
        raise BaselineError(f"cross-check: {method}: expected one of {', '.join(CHECKED)}")
    if str(bits) != "w8a8":
        raise BaselineError(f"cross-check: bits {bits}: expected w8a8")
    others = sorted(set(options) - {"static", "fold"})
    if others:
        raise BaselineError(
            f"cross-check: option {', '.join(others)}: the library is asked for the method as published"
        )
    library()


def library() -> Any:
    """The library's quantization module.

    Raises:
        BaselineError: it is not installed.
    """
    try:
        with redirect_stdout(sys.stderr):
            import modelopt.torch.quantization as quantization
    except ImportError as error:
        raise BaselineError(
            f"cross-check: needs {PACKAGE}, which cannot be imported ({error}); see docs/baselines.md"
        ) from error
    return quantization


def quantized_by_library(
    network: DiffusionPolicyT, method: str, calibration: Calibration, static: bool, alpha: float = ALPHA
) -> nn.Module:
    """The library's W8A8 copy of ``network``: per-channel weights, activations per token or per tensor (static).

    Raises:
        BaselineError: the library is not installed.
    """
    quantization = library()
    smooth = method == "smoothquant"
    first = PER_TENSOR if static or smooth else PER_TOKEN
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in linear_names(network):
        rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": WEIGHT})
        rules.append({"quantizer_name": f"{name}.input_quantizer", "cfg": first})
    algorithm = {"method": "smoothquant", "alpha": alpha} if smooth else "max"
    copied = copy.deepcopy(network)
    with torch.no_grad(), redirect_stdout(sys.stderr):  # it prints
        made: nn.Module = quantization.quantize(copied, {"quant_cfg": rules, "algorithm": algorithm}, calibration.run)
    if smooth and not static:  # the library smooths for static scales; the smoothed inputs are then taken per token
        for name in linear_names(network):
            quantizer: Any = made.get_submodule(name).input_quantizer
            quantizer.reset_amax()
            quantizer.set_from_attribute_config(dict(PER_TOKEN))
    return made.eval()


def cross_check(
    teacher: DiffusionPolicyT,
    network: nn.Module,
    method: str,
    bits: Bits,
    calibration: Calibration,
    measure: HeldOut,
    static: bool = False,
) -> dict[str, Any]:
    """Compare the distance of ``network`` to the teacher with that of the library's network.

    Returns:
        JSON-ready: the library's version and distance, ours, the mean difference over samples with its 95 % half-width,
        the mean squared difference between both networks, and whether the distances agree within that half-width.

    Raises:
        BaselineError: as :func:`check_possible`.
    """
    check_possible(method, bits, {})
    theirs = quantized_by_library(teacher, method, calibration, static)
    one, other = (measure.distances(n) for n in (network, theirs))
    difference = paired_difference(dict(enumerate(one.tolist())), dict(enumerate(other.tolist())))
    half_width = difference.half_width
    return {
        "library": f"{PACKAGE} {_version()}",
        "activations": "per tensor, static" if static else "per token",
        "library_distance": float(other.mean()),
        "distance": float(one.mean()),
        "difference": difference.estimate,
        "ci95": half_width,
        "between": measure.between(network, theirs),
        "within_noise": half_width is not None and abs(difference.estimate) <= half_width,
    }


def _version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "(version unknown)"
