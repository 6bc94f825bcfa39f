"""Tables of devices that are not at hand, modelled from published peaks and marked ``modelled``.

A kernel takes the longer of computing and reading its weights and activations, at an assumed share of the peaks, plus
one launch (:mod:`training.roofline`). The peaks are in :mod:`training.device_peaks`; ``dcqfa profile --model NAME``
writes the tables.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from training.cost import FLOAT_BYTES
from training.device_peaks import DEVICES, ORIN_NX_16GB, Arithmetic, ModelledDevice
from training.lut import BlockEntry, DeviceFacts, ExecutedForm, FixedEntry, LookUpTable, Method, space_bits
from training.roofline import FLOAT_KERNELS, block_work
from training.space import SearchSpace
from training.subnet import Precision

FIXED_CHUNK_KERNELS, FIXED_STEP_KERNELS = 4, 4
"""Launches outside the blocks: two embeddings and the two linears of the memory MLP; embedding, norm, head, update."""

__all__ = ["DEVICES", "ORIN_NX_16GB", "Arithmetic", "ModelledDevice", "modelled_table"]


def modelled_table(device: ModelledDevice, space: SearchSpace) -> LookUpTable:
    """Model every entry of ``space`` on ``device``."""
    forms = [
        ExecutedForm(
            precision=precision,
            w=w if precision is Precision.INT else None,
            a=a if precision is Precision.INT else None,
            executed=_arithmetic(device, precision, w).executed,
            stored_bits=_arithmetic(device, precision, w).stored_bits,
        )
        for precision in space.precisions
        for w, a in space_bits(space, precision)
    ]
    used = {
        form.executed: form
        for precision in space.precisions
        for form in (_arithmetic(device, precision, w) for w, _ in space_bits(space, precision))
    }
    assumptions = (
        f"assumed: {device.compute_share:.0%} of peak products, {device.bandwidth_share:.0%} of peak bandwidth, "
        f"{device.launch_seconds * 1e6:g} microseconds per kernel, a workspace of {device.workspace_bytes} bytes"
    )
    return LookUpTable(
        name=device.name,
        device=DeviceFacts(name=device.title, fingerprint=device.source, memory_bytes=device.memory_bytes),
        runtime=device.runtime,
        versions={},
        threads=1,
        modelled=True,
        method=Method(statistic="roofline", runs=0, warm_ups=0, notes=(assumptions, *device.notes)),
        workspace_bytes=device.workspace_bytes,
        forms=tuple(forms),
        blocks=tuple(entry for form in used.values() for entry in _blocks(device, space, form)),
        fixed=tuple(_fixed(device, space, precision) for precision in space.precisions),
    )


def _arithmetic(device: ModelledDevice, precision: Precision, w: int) -> Arithmetic:
    return device.forms[precision, w if precision is Precision.INT else None]


def _blocks(device: ModelledDevice, space: SearchSpace, form: Arithmetic) -> Iterator[BlockEntry]:
    """Entries of every different block in one executed form."""
    seen = set()
    floats = device.floating.operations if form.stored_bits < 32 else form.operations
    for index, block in enumerate(space.shape.blocks):
        key = (block.kind, block.dim, block.head_dim, block.tokens, block.memory_tokens)
        heads, widths = space.head_choices[index], space.mlp_choices[index]
        work = block_work(block, heads, widths)
        # Layers that are not quantized run in floating point and are stored as what lies outside the blocks.
        apart = form.stored_bits if form.stored_bits >= 16 else space.shape.fixed_bits
        stored_bits = _either(work.quantized, form.stored_bits, apart)
        peaks = _either(work.quantized, form.operations, min(floats, form.operations))
        moved = work.inputs * work.outputs * stored_bits / 8
        wide = max(form.activation_bits, device.floating.activation_bits)
        activation_bits = _either(work.quantized, form.activation_bits, wide)
        moved = moved + work.tokens * (work.inputs + work.outputs) * activation_bits / 8
        seconds = _kernel(device, 2.0 * work.tokens * work.inputs * work.outputs, peaks, moved)  # (H, M, K)
        step, chunk = ((seconds * part).sum(dim=-1) for part in (~work.per_chunk, work.per_chunk))
        rest = (work.attention_flops / (device.compute_share * floats))[:, None] + FLOAT_KERNELS * device.launch_seconds
        if work.once:
            chunk = chunk + rest
        else:
            step = step + rest
        for h, head_count in enumerate(heads):
            for m, mlp in enumerate(widths):
                if (*key, head_count, mlp) in seen:
                    continue
                seen.add((*key, head_count, mlp))
                yield BlockEntry(
                    kind=block.kind,
                    dim=block.dim,
                    head_dim=block.head_dim,
                    tokens=block.tokens,
                    memory_tokens=block.memory_tokens,
                    heads=head_count,
                    mlp=mlp,
                    executed=form.executed,
                    step_ms=_milliseconds(float(step[h, m])),
                    step_spread_ms=0.0,
                    kv_ms=_milliseconds(float(chunk[h, m])),
                    kv_spread_ms=0.0,
                )


def _fixed(device: ModelledDevice, space: SearchSpace, precision: Precision) -> FixedEntry:
    shape = space.shape
    form = device.forms[precision, None] if precision is Precision.FP32 else device.floating
    weights = torch.tensor(float(FLOAT_BYTES * shape.fixed_parameters))
    launches = (FIXED_CHUNK_KERNELS - 1) * device.launch_seconds  # one launch is in the kernel itself
    chunk = _kernel(device, torch.tensor(float(shape.fixed_flops_chunk)), form.operations, weights) + launches
    step = shape.fixed_flops_step / (device.compute_share * form.operations)
    return FixedEntry(
        backbone=shape.backbone,
        fixed_parameters=shape.fixed_parameters,
        tokens=shape.blocks[-1].tokens,
        precision=precision,
        encoder_ms=_milliseconds(float(chunk)),
        step_fixed_ms=_milliseconds(step + FIXED_STEP_KERNELS * device.launch_seconds),
    )


def _kernel(
    device: ModelledDevice, operations: torch.Tensor, peak: torch.Tensor | float, moved: torch.Tensor
) -> torch.Tensor:
    """Seconds of kernels with so many operations and bytes."""
    computing = operations / (device.compute_share * peak)
    return torch.maximum(computing, moved / (device.bandwidth_share * device.bandwidth)) + device.launch_seconds


def _either(condition: torch.Tensor, yes: float, no: float) -> torch.Tensor:
    """Float64; of two numbers, ``torch.where`` makes float32."""
    return torch.where(condition, torch.tensor(yes, dtype=torch.float64), torch.tensor(no, dtype=torch.float64))


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 7)
