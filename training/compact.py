"""A supernet's checkpoint small enough to ship: what training added to what it started from.

Weights are kept as their difference from the (reordered) full-precision policy that the run started from, or from
another supernet of it that is shipped as well (a distillation's start), in compressed codes with a scale per row: the
difference is small, so its rounding is far below a step of the weights' own quantizers. Biases, norms, positions and
quantizer steps are kept exactly. The optimizers' states are left out: training goes on from a compact checkpoint with
fresh moments. So are the visited states of a distillation, which cannot go on from it; another one can start from it.
What the difference is taken from is needed to read it, and is recognised by its hash.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.checkpoint import CHECKPOINT, CheckpointError, load_checkpoint, save_checkpoint
from training.config import TrainConfig
from training.importance import apply_order, importance_order
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.trained import policy_meaning
from training.warm_start import read_policy_weights, state_sha256

COMPACT = "compact"
_XZ = b"\xfd7zXZ"
_DAMAGED = (lzma.LZMAError, pickle.UnpicklingError, EOFError)
_PRESET = 9 | lzma.PRESET_EXTREME
SQUEEZED = "xz"  # key of a part that is stored as xz's bytes; checkpoints of earlier versions have it plain
OF_START = "sha256"  # key of a sampler that is still that of the supernet packed against: a distillation leaves it
LEFT_OUT = ("format", "model", "ema", "optimizer", "sampler", "buffer")  # as far as one holds them
LEVELS = 31  # codes of 6 bits: 8 bits are 2.5 MB more and change nothing that shows
CLOSE = 2e-3  # of a tensor's size: what rounding a policy to float16 changes, and no training leaves
CLOSE_SOLVED = 0.05  # the time token's position is solved for from the rounded table


class CompactError(UserError, ValueError):
    """A checkpoint that cannot be packed or unpacked; the message names the file and what to do."""


def pack(source: Path, target: Path, *, policy: Path | None = None, against: Path | None = None) -> int:
    """Write the averaged weights of a supernet's checkpoint file in compact form; returns the bytes written.

    Args:
        source: the checkpoint, whole or compact; of a supernet, or of one of its networks trained alone.
        target: file to write.
        policy: run, checkpoint or bundle of the same full-precision policy, rounded: the one that reads the result from
            now on. None: the one that ``source`` started from.
        against: a supernet of the same policy whose weights the difference is taken from; it stays needed.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
        CompactError: it holds no supernet, its full-precision policy is another one, ``policy`` is not close to it, or
            ``against`` is of another policy.
        UserError: ``policy`` cannot be read.
    """
    payload = load_checkpoint(source)
    if not _of_supernet(payload):
        raise CompactError(f"{source}: holds no supernet; give the checkpoint of a supernet run")
    config = policy_meaning(source, payload).config
    _refuse_to_replace(target, _policies(source, config) if policy is None else [policy], against)
    state = averaged_state(source, payload, config)
    base = _base(source, config, payload)
    orders = _orders(source, payload, base)
    if policy is not None:
        base, payload["teacher_sha256"] = _rounded(policy, config, base)
        payload["config"]["supernet"]["warm_start"] = str(policy)
    _reorder(base, orders)
    data = payload["config"]["data"]
    data["path"] = Path(data["path"]).name  # where they lie on this computer is nobody else's business
    packed: dict[str, Any] = {"orders": orders}
    start = base.state_dict()
    if against is not None:
        start, packed["against"] = _supernet_state(against, orders, str(payload["teacher_sha256"]))
    codes, scales, exact = {}, {}, {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and not name.endswith("log_step"):
            difference = tensor - start[name]
            scale = (difference.abs().amax(1) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
            codes[name] = torch.round(difference / scale[:, None]).to(torch.int8)
            scales[name] = scale
        else:
            exact[name] = tensor.clone()
    kept = {k: v for k, v in payload.items() if k not in LEFT_OUT and k != COMPACT}
    if "sampler" in payload:
        sampler = {k: v for k, v in _sampler(source, payload).items() if k not in ("optimizer", "network")}
        kept["sampler"] = {SQUEEZED: _squeeze(sampler)}
        if against is not None:
            theirs, known = load_checkpoint(_file(against)), _sampler_sha256(sampler)
            if "sampler" in theirs and _sampler_sha256(_sampler(_file(against), theirs)) == known:
                kept["sampler"] = {OF_START: known}
    packed |= {"codes": _compress(codes), SQUEEZED: _squeeze({"scales": scales, "exact": exact})}
    save_checkpoint(target, kept | {COMPACT: packed})
    return target.stat().st_size


def _of_supernet(payload: dict[str, Any]) -> bool:
    return (COMPACT in payload or "ema" in payload) and payload.get("config", {}).get("supernet") is not None


def _orders(path: Path, payload: dict[str, Any], base: ElasticDiffusionPolicyT) -> list[dict[str, Tensor]]:
    """How heads and channels of a run were ordered, block by block: from its policy, or as the run it started from."""
    if COMPACT in payload:
        return list(payload[COMPACT]["orders"])
    config = policy_meaning(path, payload).config
    if config.distill is not None:
        for place, start in _readable(_places(path, config.distill.start)):
            if _of_supernet(start) and start.get("teacher_sha256") == payload.get("teacher_sha256"):
                state = averaged_state(place, start, policy_meaning(place, start).config)
                if state_sha256(state) == payload.get("start_sha256"):
                    return _orders(place, start, base)
        raise CompactError(
            f"{path}: the supernet that this distillation started from ({config.distill.start}) is missing or holds "
            "other weights now; restore it"
        )
    found = (importance_order(block) for block in base.elastic_blocks())
    return [{name: tensor.to(torch.int16) for name, tensor in order.items()} for order in found]


def _file(path: Path) -> Path:
    return path / CHECKPOINT if path.is_dir() else path


def _places(path: Path, written: str) -> list[Path]:
    """Files that the checkpoint ``path`` may mean by a name: as written, and beside its own folder; never itself."""
    found = (_file(Path(written)), _file(path.resolve().parent.parent / Path(written).name))
    return [place for place in found if place.is_file() and place.resolve() != path.resolve()]


def _readable(places: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What the files hold, but for damaged ones."""
    for place in places:
        with contextlib.suppress(CheckpointError):
            yield place, load_checkpoint(place)


def _policies(path: Path, config: TrainConfig) -> list[Path]:
    """Where the full-precision policy of the checkpoint ``path`` may be: as written, and beside its own folder."""
    assert config.supernet is not None
    written = Path(config.supernet.warm_start)
    found = (written, path.resolve().parent.parent / written.name)
    return [place for place in found if place.exists()] or [written]


def _refuse_to_replace(target: Path, policies: list[Path], against: Path | None) -> None:
    """Refuse to write where something lies that reading the result takes."""
    needed = {place.resolve() for place in policies}
    waiting = [] if against is None else [_file(against)]
    while waiting:
        file = waiting.pop()
        if file.is_file() and file.resolve() not in needed:
            needed.add(file.resolve())
            then = load_checkpoint(file).get(COMPACT, {}).get("against")
            waiting += [] if then is None else _places(file, then["path"])
    if {target.resolve(), target.resolve().parent} & needed:
        raise CompactError(f"{target}: would replace what it is packed against; give another --out")


def _reorder(base: ElasticDiffusionPolicyT, orders: list[dict[str, Tensor]]) -> None:
    for block, order in zip(base.elastic_blocks(), orders, strict=True):
        apply_order(block, {name: tensor.long() for name, tensor in order.items()})


def _rounded(policy: Path, config: TrainConfig, base: ElasticDiffusionPolicyT) -> tuple[ElasticDiffusionPolicyT, str]:
    """``policy`` in the place of ``base``, and its hash."""
    weights = read_policy_weights(policy, config.policy)
    for name, tensor in base.state_dict().items():
        close = CLOSE_SOLVED if name == "memory_position" else CLOSE
        if name in weights.state and (weights.state[name] - tensor).norm() > close * tensor.norm():
            raise CompactError(
                f"{weights.path}: {name} is not that of the policy the supernet started from, rounded; give that policy"
            )
    network = ElasticDiffusionPolicyT(config.policy)
    network.load_state_dict(weights.state, strict=False)
    return network, weights.sha256


def _supernet_state(
    path: Path, orders: list[dict[str, Tensor]] | None, teacher: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Averaged weights of the supernet at ``path``, and how it is recognised."""
    file = _file(path)
    payload = load_checkpoint(file)
    if not _of_supernet(payload) or payload.get("teacher_sha256") != teacher:
        raise CompactError(f"{file}: is no supernet of the same full-precision policy")
    config = policy_meaning(file, payload).config
    if orders is not None:
        theirs = _orders(file, payload, _base(file, config, payload))
        if any(not torch.equal(x[name], y[name]) for x, y in zip(theirs, orders, strict=True) for name in x):
            raise CompactError(f"{file}: its heads or channels are in another order; give a supernet it started from")
    state = averaged_state(file, payload, config)
    return state, {"path": str(file.parent if file.name == CHECKPOINT else file), "sha256": state_sha256(state)}


def _state_against(path: Path, against: dict[str, str], teacher: str) -> dict[str, Tensor]:
    """Averaged weights of the supernet that the checkpoint ``path`` was packed against."""
    places = _places(path, against["path"])
    for place, payload in _readable(places):
        if payload.get("teacher_sha256") == teacher:
            state, found = _supernet_state(place, None, teacher)
            if found["sha256"] == against["sha256"]:
                return state
    raise CompactError(
        f"{path}: was packed against {against['path']}, which "
        f"{'holds other weights now' if places else 'is missing'}; restore it"
    )


def averaged_state(path: Path, payload: dict[str, Any], config: TrainConfig) -> dict[str, Tensor]:
    """The averaged weights of a supernet's checkpoint, whole or compact.

    Raises:
        CheckpointError: it holds neither, or is damaged.
        CompactError: the full-precision policy, or the supernet, that a compact one needs is missing or another one.
    """
    if COMPACT not in payload:
        if "ema" not in payload:
            raise CheckpointError(f"{path}: field 'ema' is missing; it is no checkpoint of this version")
        return dict(payload["ema"])
    packed = payload[COMPACT]
    base = _base(path, config, payload)
    against = packed.get("against")
    if against is not None:
        start = _state_against(path, against, str(payload["teacher_sha256"]))
    try:
        _reorder(base, packed["orders"])
        state = base.state_dict() if against is None else start
        rest = _expand(packed[SQUEEZED]) if SQUEEZED in packed else packed
        for name, codes in _decompress(packed["codes"], state).items():
            state[name] = state[name] + codes.float() * rest["scales"][name][:, None]
        return state | rest["exact"]
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, zlib.error, *_DAMAGED) as error:
        raise CheckpointError(f"{path}: its compact weights cannot be unpacked ({error})") from error


def sampler_state(path: Path, payload: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The configuration sampler's state in a supernet's checkpoint; a compact one lacks what ``fresh`` then supplies.

    Args:
        path: the checkpoint's file.
        payload: what it holds.
        fresh: state of a new sampler of the same space.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        CompactError: it is that of the supernet packed against, which is missing or another one.
    """
    learned = _sampler(path, payload) if "sampler" in payload else None
    if learned is None:
        raise CheckpointError("the checkpoint holds no configuration sampler; it is of one network, not of a supernet")
    if COMPACT not in payload:
        return learned
    return fresh | learned | {"network": learned["averaged"]}  # averaged weights only


def _sampler(path: Path, payload: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = payload["sampler"]
    if OF_START in given:
        return _sampler_against(path, payload[COMPACT]["against"]["path"], given[OF_START])
    try:
        return _expand(given[SQUEEZED]) if SQUEEZED in given else given
    except (RuntimeError, *_DAMAGED) as error:
        raise CheckpointError(f"{path}: the configuration sampler cannot be unpacked ({error})") from error


def _sampler_against(path: Path, written: str, known: str) -> dict[str, Any]:
    for place, other in _readable(_places(path, written)):
        sampler = _sampler(place, other) if "sampler" in other else None
        if sampler is not None and _sampler_sha256(sampler) == known:
            return {name: part for name, part in sampler.items() if name not in ("optimizer", "network")}
    raise CompactError(
        f"{path}: its configuration sampler is that of {written}, which is missing or holds another one now"
    )


def _sampler_sha256(sampler: dict[str, Any]) -> str:
    """Tells samplers apart: averaged weights, and what the predictor has seen."""
    parts = {
        f"{part}.{name}": torch.as_tensor(value)
        for part in ("averaged", "predictor")
        for name, value in sampler.get(part, {}).items()
    }
    return state_sha256(parts | {f"{sampler['kind']}.updates": torch.as_tensor(sampler["updates"])})


def _squeeze(document: dict[str, Any]) -> Tensor:
    """What ``torch.save`` writes of a document, as xz's bytes in a uint8 tensor."""
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return torch.frombuffer(bytearray(lzma.compress(buffer.getvalue(), preset=_PRESET)), dtype=torch.uint8)


def _expand(data: Tensor) -> dict[str, Any]:
    raw = lzma.decompress(data.numpy().tobytes())
    document: dict[str, Any] = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return document


def _compress(codes: dict[str, Tensor]) -> dict[str, Any]:
    """Names in order, and all codes one after the other as xz's bytes in a uint8 tensor."""
    flat = torch.cat([tensor.flatten() for tensor in codes.values()])
    data = lzma.compress(flat.numpy().tobytes(), preset=_PRESET)
    return {"names": list(codes), "data": torch.frombuffer(bytearray(data), dtype=torch.uint8)}


def _decompress(packed: dict[str, Any], shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes by name, in the shapes of the tensors of the same names."""
    data = packed["data"].numpy().tobytes()
    # Checkpoints packed by earlier versions hold zlib's bytes.
    raw = bytearray(lzma.decompress(data) if data.startswith(_XZ) else zlib.decompress(data))
    flat, names = torch.frombuffer(raw, dtype=torch.int8), packed["names"]
    parts = flat.split([shapes[name].numel() for name in names])
    return {name: part.view(shapes[name].shape) for name, part in zip(names, parts, strict=True)}


def _base(path: Path, config: TrainConfig, payload: dict[str, Any]) -> ElasticDiffusionPolicyT:
    """The supernet as the run started from it, before its heads and channels were ordered."""
    first: UserError | None = None
    for place in _policies(path, config):
        try:
            weights = read_policy_weights(place, config.policy)
        except UserError as error:
            first = first or error
            continue
        if weights.sha256 == payload.get("teacher_sha256"):
            network = ElasticDiffusionPolicyT(config.policy)
            network.load_state_dict(weights.state, strict=False)
            return network
        first = first or CompactError(
            f"{path}: was made from another full-precision policy than {weights.path}; restore that one "
            "(supernet.warm_start of its configuration)"
        )
    assert first is not None
    raise first
