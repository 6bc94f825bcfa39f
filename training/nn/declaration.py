"""Whether the modules of a policy are what it declares: counts, tables and the search believe the declaration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from training.nn.elastic import ElasticBlock, ElasticLinear, Units
from training.policy_shape import BlockShape, LinearShape, linear_size
from training.subnet import Layer

if TYPE_CHECKING:
    from training.nn.elastic_policy import ElasticPolicy


def check_declaration(policy: ElasticPolicy) -> None:
    """Return if blocks, linear layers and what they are sliced by are as :attr:`ElasticPolicy.shape` says.

    Raises:
        ValueError: naming the module.
    """
    blocks = policy.shape.blocks
    if len(policy.sizes) != len(blocks):
        raise ValueError(f"sizes: expected one for each of {len(blocks)} declared blocks, got {len(policy.sizes)}")
    names = [block.name for block in blocks]
    for declared, size in zip(blocks, policy.sizes, strict=True):
        if names.count(declared.name) > 1:
            raise ValueError(f"{declared.name}: declared as two blocks")
        try:
            module = policy.get_submodule(declared.name)
        except AttributeError as error:
            raise ValueError(f"{declared.name}: declared as a block, but the policy has no such module") from error
        if not isinstance(module, ElasticBlock):
            raise ValueError(f"{declared.name}: declared as a block, but is a {type(module).__name__}, no ElasticBlock")
        layer = Layer(*size, 32, 32)
        _check_linears(declared, module, layer)
        for name, units in module.units().items():
            _check_units(declared, f"{declared.name}: units {name!r}", units, module, layer)


def _check_linears(declared: BlockShape, block: ElasticBlock, layer: Layer) -> None:
    modules = dict(block.named_modules())
    linears = {linear.name: linear for linear in declared.linears}
    elastic = {name for name, module in modules.items() if isinstance(module, ElasticLinear)}
    for name in sorted(elastic - {name for name, linear in linears.items() if linear.quantized}):
        raise ValueError(f"{declared.name}.{name}: an ElasticLinear that is not declared as a quantized layer")
    for name, linear in linears.items():
        module = modules.get(name)
        if linear.quantized and not isinstance(module, ElasticLinear):
            raise ValueError(f"{declared.name}.{name}: declared as a quantized layer, but is no ElasticLinear")
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{declared.name}.{name}: declared as a linear layer, but is none")
        wanted = (*linear_size(declared, linear, layer), linear.bias)
        if wanted != (module.in_features, module.out_features, module.bias is not None):
            raise ValueError(f"{declared.name}.{name}: declared with inputs, outputs and bias {wanted}, is {module}")
    # What is sliced must be somebody's unit; that units are sliced is checked one by one.
    named = {id(part) for units in block.units().values() for part in (*units.producers, *units.consumers)}
    for name, linear in linears.items():
        if (linear.in_slice, linear.out_slice) != ("full", "full") and id(modules[name]) not in named:
            raise ValueError(f"{declared.name}.{name}: declared as sliced, but none of the block's units has it")


def _check_units(declared: BlockShape, what: str, units: Units, block: ElasticBlock, layer: Layer) -> None:
    by_module: Mapping[int, LinearShape] = {id(block.get_submodule(one.name)): one for one in declared.linears}
    parts: Sequence[tuple[str, Sequence[ElasticLinear], str, str]] = (
        ("producers", units.producers, "out_slice", "out_features"),
        ("consumers", units.consumers, "in_slice", "in_features"),
    )
    slices = {getattr(by_module[id(module)], field) for _, modules, field, _ in parts for module in modules}
    if len(slices) != 1 or slices == {"full"}:
        raise ValueError(f"{what}: expected layers that the shape slices by heads or by mlp, got {sorted(slices)}")
    heads = slices == {"heads"}
    if heads and units.width != declared.head_dim:
        raise ValueError(f"{what}: {units.width} channels each, declared with head_dim {declared.head_dim}")
    count = layer.heads if heads else layer.mlp
    for part, modules, _, features in parts:
        for module in modules:
            if getattr(module, features) != count * units.width:
                raise ValueError(f"{what}: expected {count} of {units.width} channels in its {part}, got {module}")
