"""A supernet's checkpoint small enough to ship: what training added to the full-precision policy.

Weights are kept as their difference from the (reordered) full-precision policy that the run started from, in compressed
6-bit codes with a scale per row: the difference is small, so its rounding is far below a step of the weights' own
quantizers. Biases, norms, positions and quantizer steps are kept exactly. The optimizers' states are left out: training
goes on from a compact checkpoint with fresh moments. So are the visited states of a distillation, which cannot go on
from it; another one can start from it. The full-precision policy itself is needed to read it, and is recognised by its
hash.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.config import TrainConfig
from training.importance import BlockOrder, apply_order, importance_order
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.trained import policy_meaning
from training.warm_start import policy_beside, read_policy_weights

COMPACT = "compact"
LEFT_OUT = ("format", "model", "ema", "optimizer", "sampler", "buffer", "teacher_calls")  # as far as one holds them
LEVELS = 31  # codes of 6 bits: 8 bits are 2.5 MB more and change nothing that shows


class CompactError(UserError, ValueError):
    """A checkpoint that cannot be packed or unpacked; the message names the file and what to do."""


def pack(source: Path, target: Path) -> int:
    """Write the averaged weights of a supernet's checkpoint file in compact form; returns the bytes written.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        CompactError: it holds no whole supernet, or its full-precision policy is another one.
    """
    payload = load_checkpoint(source)
    if "ema" not in payload or "sampler" not in payload:
        raise CompactError(f"{source}: holds no whole supernet; give the checkpoint of a supernet run")
    config = policy_meaning(source, payload).config
    base = _base(source, config, payload)
    orders = []
    for block in base.elastic_blocks():
        order = importance_order(block)
        orders.append({name: tensor.to(torch.int16) for name, tensor in asdict(order).items()})
        apply_order(block, order)
    start, codes, scales, exact = base.state_dict(), {}, {}, {}
    for name, tensor in payload["ema"].items():
        if tensor.ndim == 2 and not name.endswith("log_step"):
            difference = tensor - start[name]
            scale = (difference.abs().amax(1) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
            codes[name] = torch.round(difference / scale[:, None]).to(torch.int8)
            scales[name] = scale
        else:
            exact[name] = tensor.clone()
    kept = {k: v for k, v in payload.items() if k not in LEFT_OUT}
    sampler = {k: v for k, v in payload["sampler"].items() if k not in ("optimizer", "network")}
    packed = {"orders": orders, "codes": _compress(codes), "scales": scales, "exact": exact}
    save_checkpoint(target, kept | {"sampler": sampler, COMPACT: packed})
    return target.stat().st_size


def averaged_state(path: Path, payload: dict[str, Any], config: TrainConfig) -> dict[str, Tensor]:
    """The averaged weights of a supernet's checkpoint, whole or compact.

    Raises:
        CheckpointError: it holds neither, or is damaged.
        CompactError: the full-precision policy that a compact one needs is missing or another one.
    """
    if COMPACT not in payload:
        if "ema" not in payload:
            raise CheckpointError(f"{path}: field 'ema' is missing; it is no checkpoint of this version")
        return dict(payload["ema"])
    packed = payload[COMPACT]
    base = _base(path, config, payload)
    try:
        for block, order in zip(base.elastic_blocks(), packed["orders"], strict=True):
            apply_order(block, BlockOrder(**{name: tensor.long() for name, tensor in order.items()}))
        state = base.state_dict()
        for name, codes in _decompress(packed["codes"], state).items():
            state[name] = state[name] + codes.float() * packed["scales"][name][:, None]
        return state | packed["exact"]
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, zlib.error) as error:
        raise CheckpointError(f"{path}: its compact weights cannot be unpacked ({error})") from error


def sampler_state(payload: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The configuration sampler's state in a supernet's checkpoint; a compact one lacks what ``fresh`` then supplies.

    Args:
        payload: the checkpoint.
        fresh: state of a new sampler of the same space.

    Raises:
        CheckpointError: there is none.
    """
    learned: dict[str, Any] | None = payload.get("sampler")
    if learned is None:
        raise CheckpointError("the checkpoint holds no configuration sampler; it is of one network, not of a supernet")
    if COMPACT not in payload:
        return learned
    return fresh | learned | {"network": learned["averaged"]}  # averaged weights only


def _compress(codes: dict[str, Tensor]) -> dict[str, Any]:
    """Names in order, and all codes one after the other as zlib's bytes in a uint8 tensor."""
    data = zlib.compress(torch.cat([tensor.flatten() for tensor in codes.values()]).numpy().tobytes(), 9)
    return {"names": list(codes), "data": torch.frombuffer(bytearray(data), dtype=torch.uint8)}


def _decompress(packed: dict[str, Any], shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes by name, in the shapes of the tensors of the same names."""
    data = bytearray(zlib.decompress(packed["data"].numpy().tobytes()))
    flat, names = torch.frombuffer(data, dtype=torch.int8), packed["names"]
    parts = flat.split([shapes[name].numel() for name in names])
    return {name: part.view(shapes[name].shape) for name, part in zip(names, parts, strict=True)}


def _base(path: Path, config: TrainConfig, payload: dict[str, Any]) -> ElasticDiffusionPolicyT:
    """The supernet as the run started from it, before its heads and channels were ordered."""
    assert config.supernet is not None
    weights = read_policy_weights(policy_beside(path, config.supernet.warm_start), config.policy)
    if weights.sha256 != payload.get("teacher_sha256"):
        raise CompactError(
            f"{path}: was made from another full-precision policy than {weights.path}; restore that one "
            "(supernet.warm_start of its configuration)"
        )
    network = ElasticDiffusionPolicyT(config.policy)
    network.load_state_dict(weights.state, strict=False)
    return network
