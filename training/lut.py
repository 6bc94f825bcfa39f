"""Look-up tables: what each block of a search space takes on one device (``algorithms.md`` section 4).

A table is a JSON file. An entry belongs to one block size in one *executed* form: a runtime may execute several
precisions of the space alike (ONNX Runtime's CPU provider multiplies 4-bit codes as 8-bit ones), so the table says
which form each precision takes, and how wide its weights then lie in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.bundle.types import Name, Positive, Text
from dcqfa_ros.errors import UserError
from training.files import write_atomically
from training.policy_shape import BlockShape, PolicyShape
from training.space import SearchSpace
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet

StoredBits = Literal[4, 8, 16, 32]
Milliseconds = Annotated[float, Field(ge=0.0)]


class TableError(UserError, ValueError):
    """A look-up table that cannot be used; the message names file and field, or the missing entry and what to do."""


class DeviceFacts(StrictModel):
    """The device; ``fingerprint`` as :func:`dcqfa_ros.devices.detect.detect` gives it, or the source of a model."""

    name: Text
    fingerprint: Text
    memory_bytes: Annotated[int, Field(ge=0)]


class Method(StrictModel):
    """How the numbers came about: timed ``runs`` per network after ``warm_ups``, or the assumptions of a model."""

    statistic: Text
    runs: Annotated[int, Field(ge=0)]
    warm_ups: Annotated[int, Field(ge=0)]
    notes: tuple[Text, ...] = ()


class ExecutedForm(StrictModel):
    """What the runtime makes of one precision of the space.

    Attributes:
        precision: as in the subnet; ``w`` and ``a`` are its bits for integers and None otherwise.
        executed: key of the entries, for people too: ``int8``, ``float32``.
        stored_bits: bits of a weight of a block in the memory of the running engine.
    """

    precision: Precision
    w: int | None = None
    a: int | None = None
    executed: Name
    stored_bits: StoredBits


class BlockEntry(StrictModel):
    """Median and interquartile range of one block: per denoising step, and of its keys and values once per chunk."""

    kind: Name
    dim: Positive
    head_dim: Positive
    tokens: Positive
    memory_tokens: Annotated[int, Field(ge=0)]
    heads: Positive
    mlp: Positive
    executed: Name
    step_ms: Milliseconds
    step_spread_ms: Milliseconds
    kv_ms: Milliseconds
    kv_spread_ms: Milliseconds


class CacheEffect(StrictModel):
    """What a denoising step saves while weights of the blocks stay in the processor's cache from step to step.

    Entries of blocks hold beyond the cache. A network whose blocks take at most ``low_bytes`` saves ``ms_per_mb`` for
    every megabyte (1e6 bytes) of them, one of ``high_bytes`` or more saves nothing, and in between the share that stays
    falls linearly.
    """

    low_bytes: Annotated[int, Field(ge=0)]
    high_bytes: Annotated[int, Field(ge=0)]
    ms_per_mb: Milliseconds

    @model_validator(mode="after")
    def _ordered(self) -> CacheEffect:
        if self.low_bytes > self.high_bytes:
            raise ValueError("expected low_bytes to be at most high_bytes")
        return self

    def saved_ms(self, block_bytes: float) -> float:
        """Milliseconds that a denoising step saves where the blocks take ``block_bytes`` bytes."""
        return self.ms_per_mb * block_bytes / 1e6 * (1.0 - self.streamed(block_bytes))

    def streamed(self, block_bytes: float) -> float:
        """Share of the blocks that comes from beyond the cache, 0 to 1."""
        if block_bytes <= self.low_bytes:
            return 0.0
        if block_bytes >= self.high_bytes:
            return 1.0
        return (block_bytes - self.low_bytes) / (self.high_bytes - self.low_bytes)


class FixedEntry(StrictModel):
    """What runs outside the blocks of a policy, once per chunk and at every denoising step, and what is not additive.

    Attributes:
        cache: None where sums of block times hold for networks of every size.
        workspace_bytes: memory of the engine beyond weights and activations; None for that of the table.
        block_workspace_bytes: of it for each block that is kept.
        weight_copies: how often an engine holds the weights of blocks, packed copies included.
        context_step_ms: of a denoising step of the measurement's reference network, which tells later how fast the
            computer is; None where it was not kept. Blocks need not add up to it.
    """

    backbone: Name
    fixed_parameters: Annotated[int, Field(ge=0)]
    tokens: Positive
    precision: Precision
    encoder_ms: Milliseconds
    step_fixed_ms: Milliseconds
    cache: CacheEffect | None = None
    workspace_bytes: Annotated[int, Field(ge=0)] | None = None
    block_workspace_bytes: Annotated[int, Field(ge=0)] = 0
    weight_copies: Annotated[float, Field(ge=0.0)] = 1.0
    context_step_ms: Milliseconds | None = None


class Validation(StrictModel):
    """Predicted against measured latency of whole chunks of random subnets that no entry was made from.

    Errors are relative: (predicted - measured) / measured.
    """

    precision: Precision
    tokens: Positive
    subnets: Positive
    steps: Positive
    mean: float
    median_absolute: Annotated[float, Field(ge=0.0)]
    p90_absolute: Annotated[float, Field(ge=0.0)]
    max_absolute: Annotated[float, Field(ge=0.0)]


class LookUpTable(StrictModel):
    """All entries of one device, runtime and number of threads.

    Attributes:
        name: names the device in conditions, reports and errors.
        modelled: computed from published peaks instead of measured.
        workspace_bytes: memory of the engine beyond weights and activations, where fixed parts do not say otherwise.
        forms: every precision the table knows.
        blocks: by kind, sizes and executed form.
        fixed: by backbone, tokens and precision.
    """

    schema_version: Literal[2] = 2
    name: Name
    device: DeviceFacts
    runtime: Text
    versions: dict[Text, Text]
    threads: Positive
    modelled: bool
    method: Method
    workspace_bytes: Annotated[int, Field(ge=0)]
    forms: tuple[ExecutedForm, ...]
    blocks: tuple[BlockEntry, ...]
    fixed: tuple[FixedEntry, ...]
    validation: tuple[Validation, ...] = ()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> LookUpTable:
        """A table with fields replaced, validated and with an index of its own; ``deep`` changes nothing."""
        del deep
        return LookUpTable(**{**dict(self), **(update or {})})

    @cached_property
    def _forms(self) -> dict[tuple[object, ...], ExecutedForm]:
        return {(form.precision, form.w, form.a): form for form in self.forms}

    @cached_property
    def _blocks(self) -> dict[tuple[object, ...], BlockEntry]:
        return {
            (e.kind, e.dim, e.head_dim, e.tokens, e.memory_tokens, e.heads, e.mlp, e.executed): e for e in self.blocks
        }

    @cached_property
    def _fixed(self) -> dict[tuple[object, ...], FixedEntry]:
        return {(e.backbone, e.fixed_parameters, e.tokens, e.precision): e for e in self.fixed}

    def form(self, precision: Precision, layer: Layer) -> ExecutedForm:
        """How a layer is executed.

        Raises:
            TableError: the table does not know that precision.
        """
        bits = (layer.w, layer.a) if precision is Precision.INT else (None, None)
        found = self._forms.get((precision, *bits))
        if found is None:
            label = f"w{layer.w}a{layer.a}" if precision is Precision.INT else precision.value
            raise TableError(f"table {self.name}: no precision {label}; {self._advice()}")
        return found

    def block(self, shape: BlockShape, layer: Layer, executed: str) -> BlockEntry:
        """Times of one block.

        Raises:
            TableError: there is no such entry.
        """
        key = (shape.kind, shape.dim, shape.head_dim, shape.tokens, shape.memory_tokens)
        found = self._blocks.get((*key, layer.heads, layer.mlp, executed))
        if found is None:
            raise TableError(
                f"table {self.name}: no entry for block type {shape.kind!r} (width {shape.dim}, head size "
                f"{shape.head_dim}, {shape.tokens} tokens, {shape.memory_tokens} memory tokens) with {layer.heads} "
                f"heads and {layer.mlp} hidden channels executed as {executed}; {self._advice()}"
            )
        return found

    def fixed_parts(self, shape: PolicyShape, precision: Precision) -> FixedEntry:
        """Times of what lies outside the blocks.

        Raises:
            TableError: there is no such entry.
        """
        tokens = shape.blocks[-1].tokens
        found = self._fixed.get((shape.backbone, shape.fixed_parameters, tokens, precision))
        if found is None:
            raise TableError(
                f"table {self.name}: no fixed parts of {shape.backbone!r} ({shape.fixed_parameters} parameters outside "
                f"the blocks, {tokens} tokens) at {precision.value}; {self._advice()}"
            )
        return found

    def check(self, space: SearchSpace) -> None:
        """Check that the table has every entry the space can ask for.

        Raises:
            TableError: the first entry that is missing.
        """
        for precision in space.precisions:
            self.fixed_parts(space.shape, precision)
            for layer_bits in space_bits(space, precision):
                for index, shape in enumerate(space.shape.blocks):
                    for heads in space.head_choices[index]:
                        for mlp in space.mlp_choices[index]:
                            layer = Layer(heads, mlp, *layer_bits)
                            self.block(shape, layer, self.form(precision, layer).executed)

    def _advice(self) -> str:
        if self.modelled:
            command = f"dcqfa profile --config CONFIG --model {self.name} --out FILE"
            return f"the table is modelled: compute it for this space with {command}"
        return f"measure it on that device: dcqfa profile --config CONFIG --threads {self.threads} --out FILE"


_STORED_AS = {bits: precision for precision, bits in FLOAT_BITS.items()}


def space_bits(space: SearchSpace, precision: Precision) -> Sequence[tuple[int, int]]:
    """Weight and activation bits that layers can have at one precision of the whole network."""
    if precision is not Precision.INT:
        return ((FLOAT_BITS[precision], FLOAT_BITS[precision]),)
    return tuple((w, a) for w in space.weight_bits for a in space.activation_bits)


def stored_subnet(table: LookUpTable, subnet: Subnet) -> Subnet:
    """The subnet whose bytes are those ``subnet`` takes in memory: each layer at the bits its weights are stored in.

    A whole-network precision is stored in one form, because only integer bits differ between layers.
    """
    if subnet.precision is not Precision.INT:
        layer = next(layer for layer in subnet.layers if layer is not None)
        return stored_as(subnet, table.form(subnet.precision, layer).stored_bits)
    layers = tuple(x and replace(x, w=table.form(subnet.precision, x).stored_bits) for x in subnet.layers)
    return Subnet(layers, subnet.precision)


def stored_as(subnet: Subnet, bits: StoredBits) -> Subnet:
    """The subnet with weights of ``bits`` in every layer; floating-point ones change their precision with them."""
    if subnet.precision is Precision.INT:
        return Subnet(tuple(layer and replace(layer, w=bits) for layer in subnet.layers), subnet.precision)
    layers = tuple(layer and replace(layer, w=bits, a=bits) for layer in subnet.layers)
    return Subnet(layers, _STORED_AS[bits])


def merged(tables: Sequence[LookUpTable]) -> LookUpTable:
    """One table of the entries of several, taken on the same device in the same way (for other numbers of tokens).

    Raises:
        TableError: the tables are not alike, or an entry is in two of them.
    """
    first = tables[0]
    for table in tables[1:]:
        for field in ("name", "device", "runtime", "versions", "threads", "modelled"):
            if getattr(table, field) != getattr(first, field):
                raise TableError(f"table {first.name}: {field} differs; tables of one device and runtime can be merged")
    notes = tuple(dict.fromkeys(note for table in tables for note in table.method.notes))
    result = first.model_copy(
        update={
            "method": first.method.model_copy(update={"notes": notes}),
            "workspace_bytes": max(table.workspace_bytes for table in tables),
            "forms": tuple(dict.fromkeys(form for table in tables for form in table.forms)),
            "blocks": tuple(entry for table in tables for entry in table.blocks),
            "fixed": tuple(entry for table in tables for entry in table.fixed),
            "validation": tuple(entry for table in tables for entry in table.validation),
        }
    )
    return parse_table(table_json(result), first.name)


def load_table(path: Path) -> LookUpTable:
    """Read a table.

    Raises:
        TableError: the file cannot be read, or a field is unknown, missing or ill-typed; each is named.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TableError(
            f"{path}: cannot be read ({error.strerror}); give a table that `dcqfa profile` wrote"
        ) from error
    return parse_table(data, str(path))


def parse_table(data: bytes, label: str) -> LookUpTable:
    """Read a table from its JSON.

    Raises:
        TableError: as :func:`load_table`; ``label`` names the file.
    """
    try:
        table = LookUpTable.model_validate_json(data, strict=True)
    except ValidationError as error:
        lines = [f"{label}: {'.'.join(str(p) for p in e['loc']) or '(document)'}: {e['msg']}" for e in error.errors()]
        raise TableError("\n".join([*lines[:5], "measure it again with `dcqfa profile`"])) from error
    for field, found, entries in (
        ("forms", table._forms, table.forms),
        ("blocks", table._blocks, table.blocks),
        ("fixed", table._fixed, table.fixed),
    ):
        if len(found) != len(entries):
            raise TableError(f"{label}: {field}: an entry is there twice; measure it again with `dcqfa profile`")
    return table


def save_table(path: Path, table: LookUpTable) -> None:
    """Write a table so that a reader finds the old one or the new one, whole.

    Raises:
        WriteError: the disk refuses.
    """
    write_atomically(path, table_json(table))


def table_json(table: LookUpTable) -> bytes:
    """The table as JSON, one entry a line."""
    document = table.model_dump(mode="json")
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            entries = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            lines.append(f'  "{key}": [\n{entries}\n  ]')
        else:
            lines.append(f'  "{key}": {json.dumps(value)}')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()
