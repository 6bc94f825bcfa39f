"""A quantized policy on disk: a checkpoint that holds packed codes in place of the weights of its plain linears.

``dcqfa eval`` runs it like any checkpoint. Rows of one bit width lie together, code after code without gaps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.baselines import QuantizedPolicy
from training.baselines.bits import FLOAT, BaselineError
from training.baselines.network import ROW_BITS, PlainLinear, plain_copy, plain_linears
from training.baselines.parts import QUANTIZERS, TRANSFORMS, Part, make_part
from training.checkpoint import BASELINE, CHECKPOINT, CheckpointError, load_checkpoint, save_checkpoint
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.trained import TrainedPolicy, meaning_document, policy_meaning
from training.warm_start import state_sha256


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers (rows, n) of magnitude below 2^(bits-1) as uint8 (rows, ceil(n bits / 8)), 2 to 8 bits.

    Raises:
        BaselineError: a code does not fit.
    """
    high = 2 ** (bits - 1) - 1
    if codes.numel() and float(codes.abs().max()) > high:
        raise BaselineError(f"codes: expected magnitudes up to {high} at {bits} bits, got {float(codes.abs().max()):g}")
    shifted = (codes + high).to(torch.uint8).numpy()
    each = (shifted[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(each.reshape(len(codes), -1), axis=1, bitorder="little"))


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (rows, count) float32 in ``packed`` (rows, ceil(count bits / 8)).

    Raises:
        BaselineError: the rows are of another length.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-count * bits // 8):
        raise BaselineError(f"packed codes: expected uint8 rows of {-(-count * bits // 8)} bytes, got {packed.shape}")
    each = np.unpackbits(packed.numpy(), axis=1, count=count * bits, bitorder="little").reshape(-1, count, bits)
    values = (each.astype(np.uint16) << np.arange(bits, dtype=np.uint16)).sum(-1)
    return torch.from_numpy(values.astype(np.float32)) - (2.0 ** (bits - 1) - 1.0)


def linear_document(linear: PlainLinear) -> dict[str, Any]:
    """A plain linear as an artifact holds it."""
    rows: dict[str, Tensor] = {}
    for bits in linear.row_bits.unique().tolist():
        codes = linear.codes[linear.row_bits == bits].cpu()
        if bits == FLOAT:
            rows[str(bits)] = codes.to(torch.float16)
        elif linear.fp8:
            rows[str(bits)] = codes.to(torch.float8_e4m3fn).view(torch.uint8)
        elif bits:
            rows[str(bits)] = pack_codes(codes, bits)
    return {
        "row_bits": linear.row_bits.clone(),
        "rows": rows,
        "scale": linear.weight_scale[(linear.row_bits > 0) & (linear.row_bits < FLOAT)].clone(),
        "bias": linear.bias.clone(),
        "fp8": linear.fp8,
        "transforms": [part.spec() for part in linear.transforms if isinstance(part, Part)],
        "transform_state": linear.transforms.state_dict(),
        "activation": linear.activation.spec(),
        "activation_state": linear.activation.state_dict(),
    }


def restore_linear(linear: PlainLinear, document: dict[str, Any]) -> None:
    """Fill a plain linear from :func:`linear_document`.

    Raises:
        BaselineError, KeyError, RuntimeError, TypeError, ValueError: the document is not of this layer.
    """
    row_bits = document["row_bits"]
    if row_bits.shape != (linear.out_features,) or not set(row_bits.tolist()) <= set(ROW_BITS):
        raise BaselineError(f"row_bits: expected {linear.out_features} values of {ROW_BITS}")
    codes = torch.zeros(linear.out_features, linear.in_features)
    for key, packed in document["rows"].items():
        bits = int(key)
        if bits == FLOAT:
            part = packed.to(torch.float32)
        elif document["fp8"]:
            part = packed.view(torch.float8_e4m3fn).to(torch.float32)
        else:
            part = unpack_codes(packed, bits, linear.in_features)
        codes[row_bits == bits] = part
    scale = torch.ones(linear.out_features)
    scale[(row_bits > 0) & (row_bits < FLOAT)] = document["scale"]
    if not (codes.isfinite().all() and scale.isfinite().all()):
        raise BaselineError("codes or scales hold NaN or infinity")
    linear.set_codes(codes, scale, row_bits, fp8=bool(document["fp8"]))
    linear.bias.copy_(document["bias"])
    linear.transforms.extend(make_part(spec, TRANSFORMS) for spec in document["transforms"])
    linear.transforms.load_state_dict(document["transform_state"])
    linear.activation = make_part(document["activation"], QUANTIZERS)
    linear.activation.load_state_dict(document["activation_state"])


def save_artifact(folder: Path, policy: TrainedPolicy, quantized: QuantizedPolicy) -> Path:
    """Write the quantized policy of ``policy`` to ``folder`` atomically; returns the checkpoint's path."""
    linears = plain_linears(quantized.network)
    inside = tuple(f"{name}." for name in linears)
    others = {name: t for name, t in quantized.network.state_dict().items() if not name.startswith(inside)}
    payload = {
        **meaning_document(policy.meaning),
        BASELINE: {
            "report": quantized.report,
            "source_sha256": state_sha256(policy.network.state_dict()),
            "linears": {name: linear_document(linear) for name, linear in linears.items()},
            "others": {name: tensor.clone() for name, tensor in others.items()},
        },
    }
    save_checkpoint(folder / CHECKPOINT, payload)
    return folder / CHECKPOINT


def load_artifact(path: Path) -> tuple[TrainedPolicy, dict[str, Any]]:
    """Read a quantized policy and its report from a folder or checkpoint file.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no quantized policy.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    payload = load_checkpoint(file)
    document = payload.get(BASELINE)
    if not isinstance(document, dict):
        raise CheckpointError(f"{file}: holds no quantized policy; make one with 'dcqfa baseline'")
    meaning = policy_meaning(file, payload)
    network = plain_copy(DiffusionPolicyT(meaning.config.policy))
    linears = plain_linears(network)
    try:
        inside = tuple(f"{name}." for name in linears)
        missing, unknown = network.load_state_dict(document["others"], strict=False)
        if unknown or any(not name.startswith(inside) for name in missing):
            raise BaselineError(f"parameters missing or unknown: {', '.join([*missing, *unknown][:4])}")
        if set(document["linears"]) != set(linears):
            raise BaselineError("its quantized linears are not those of the policy")
        for name, linear in linears.items():
            restore_linear(linear, document["linears"][name])
        report = dict(document["report"])
    except (BaselineError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the stored quantized policy cannot be rebuilt ({error})") from error
    return TrainedPolicy(meaning, network.requires_grad_(False).eval(), file), report
