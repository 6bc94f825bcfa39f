"""Search space of a policy: which of its blocks are kept, how wide they are, and at how many bits they run.

A policy declares its elastic blocks as a :class:`PolicyShape`; the space, the tables, the sampler and the search know
nothing else of it. A :class:`Subnet` is one point of the space (``algorithms.md`` section 1). Embeddings, time MLP and
the final layer lie outside the blocks: they are neither elastic nor below 8 bits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from training.depths import blocks_always_kept, depth_choices, evenly_spread, offered
from training.policy_shape import PolicyShape
from training.space_config import SpaceConfig, check_shape, ratio_text, width_counts
from training.subnet import FLOAT_BITS, Layer, Precision, SpaceError, Subnet, make_layer

GENES_PER_BLOCK = 5  # keep, heads, mlp, weight bits, activation bits

_UNIFORM = re.compile(
    r"d(?P<depths>\d{1,4}(?:\+\d{1,4})*)-h(?P<heads>\d*\.?\d+)-m(?P<mlp>\d*\.?\d+)-(?P<bits>fp32|fp16|fp8|w\d{1,2}a\d{1,2})",
    re.A,
)
_BITS = re.compile(r"w(\d{1,2})a(\d{1,2})", re.A)
_LAYER = re.compile(
    r"(?:0|(?P<heads>\d{1,6})h(?P<mlp>\d{1,6})(?:w(?P<w>\d{1,2})a(?P<a>\d{1,2}))?)(?:x(?P<run>\d{1,4}))?", re.A
)
_FORMS = (
    "a uniform network such as d6-h.75-m3-w4a4, a list of layers such as w4a4.4h1024x2.0.3h768, "
    "or largest, smallest, fp32, fp16, fp8, w8a8, w4a8, w8a4, w4a4"
)


class SearchSpace:
    """All subnets of a policy that a configuration allows, with their integer genes and their names.

    Attributes:
        shape: the policy.
        config: the configuration.
        groups: block indices of each group.
        elastic_groups: groups whose depth is chosen, in the order of their first blocks.
        depth_choices: ascending numbers of blocks that may be kept of each group, the whole group last.
        always_kept: indices of the blocks that no subnet skips, whatever the depth.
        precisions: precisions in the space, widest first, ``int`` last.
        head_choices: per block the head counts, ascending.
        mlp_choices: per block the hidden channels, ascending.
        weight_bits: ascending.
        activation_bits: ascending.
        gene_sizes: number of values of each gene: one for the precision (index into ``precisions``), then per block
            keep (1: kept) and the indices of head count, hidden channels, weight bits and activation bits.
    """

    def __init__(self, shape: PolicyShape, config: SpaceConfig) -> None:
        """Span the space of ``shape`` under ``config``.

        Raises:
            SpaceError: configuration and policy do not fit; the message names the field.
        """
        self.shape, self.config = shape, config
        check_shape(shape)
        groups: dict[str, tuple[int, ...]] = {}
        for index, block in enumerate(shape.blocks):
            groups[block.group] = (*groups.get(block.group, ()), index)
        self.groups: Mapping[str, tuple[int, ...]] = groups
        self.depth_choices: Mapping[str, tuple[int, ...]] = depth_choices(shape, groups, config)
        self.elastic_groups = tuple(name for name, blocks in groups.items() if shape.blocks[blocks[0]].elastic)
        self.always_kept: frozenset[int] = blocks_always_kept(groups, self.depth_choices, config.always_kept)
        self.precisions = (*(p for p in Precision if p in config.precisions), Precision.INT)
        self.head_choices = tuple(
            width_counts(config.head_ratios, block.heads, f"heads of {block.name}", "head_ratios", block.elastic)
            for block in shape.blocks
        )
        self.mlp_choices = tuple(
            width_counts(config.mlp_ratios, block.mlp, f"hidden channels of {block.name}", "mlp_ratios", block.elastic)
            for block in shape.blocks
        )
        self.weight_bits: tuple[int, ...] = tuple(sorted(config.weight_bits))
        self.activation_bits: tuple[int, ...] = tuple(sorted(config.activation_bits))
        bits = (len(self.weight_bits), len(self.activation_bits))
        per_block = (
            (2, len(heads), len(mlp), *bits) for heads, mlp in zip(self.head_choices, self.mlp_choices, strict=True)
        )
        self.gene_sizes: tuple[int, ...] = (len(self.precisions), *itertools.chain.from_iterable(per_block))
        # Texts of the widths in uniform names, per block.
        self._head_texts = tuple(
            {count: ratio_text(count, block.heads) for count in counts}
            for block, counts in zip(shape.blocks, self.head_choices, strict=True)
        )
        self._mlp_texts = tuple(
            {count: ratio_text(count, block.dim) for count in counts}
            for block, counts in zip(shape.blocks, self.mlp_choices, strict=True)
        )

    @property
    def least_depths(self) -> dict[str, int]:
        """Fewest blocks of each group that a subnet keeps."""
        return {group: choices[0] for group, choices in self.depth_choices.items()}

    @property
    def shallowest(self) -> tuple[int, ...]:
        """Fewest blocks of each elastic group, as :meth:`uniform` takes them."""
        return tuple(self.depth_choices[group][0] for group in self.elastic_groups)

    def kept_blocks(self, depths: int | Sequence[int]) -> tuple[int, ...]:
        """Indices of the kept blocks where every elastic group keeps some of its own, evenly spread.

        Args:
            depths: number of blocks of each elastic group; a number alone where there is one such group.

        Raises:
            SpaceError: the space does not offer one of them.
        """
        given = (depths,) if isinstance(depths, int) else tuple(depths)
        if len(given) != len(self.elastic_groups):
            raise SpaceError(
                f"depth: expected one number for each of {', '.join(self.elastic_groups) or 'no groups'}, "
                f"got {'+'.join(map(str, given))}"
            )
        counts = {group: len(blocks) for group, blocks in self.groups.items()}
        for group, depth in zip(self.elastic_groups, given, strict=True):
            if depth not in self.depth_choices[group]:
                which = f" of {group}" if len(given) > 1 else ""
                raise SpaceError(f"depth{which}: expected {offered(self.depth_choices[group])} blocks, got {depth}")
            counts[group] = depth
        return evenly_spread(self.groups, counts)

    def _depths(self, subnet: Subnet) -> tuple[int, ...]:
        """Blocks that each elastic group keeps."""
        kept = set(subnet.kept)
        return tuple(sum(block in kept for block in self.groups[group]) for group in self.elastic_groups)

    def check(self, subnet: Subnet) -> None:
        """Return if ``subnet`` is in the space.

        Raises:
            SpaceError: it is not; the message names what the space lacks and what it offers.
        """
        blocks = self.shape.blocks
        if len(subnet.layers) != len(blocks):
            raise SpaceError(f"layers: expected one for each of {len(blocks)} blocks, got {len(subnet.layers)}")
        self._check_choice("precision", subnet.precision, self.precisions)
        bits = FLOAT_BITS.get(subnet.precision)
        weights = self.weight_bits if bits is None else (bits,)
        activations = self.activation_bits if bits is None else (bits,)
        for index, layer in enumerate(subnet.layers):
            name = blocks[index].name
            if layer is None:
                if not blocks[index].elastic:
                    raise SpaceError(f"{name}: its size is fixed, only its bits are chosen; no network skips it")
                if index in self.always_kept:
                    raise SpaceError(f"{name}: no network of this space skips it (space.always_kept)")
                continue
            self._check_choice(f"{name}: heads", layer.heads, self.head_choices[index])
            self._check_choice(f"{name}: hidden channels", layer.mlp, self.mlp_choices[index])
            self._check_choice(f"{name}: weight bits", layer.w, weights)
            self._check_choice(f"{name}: activation bits", layer.a, activations)
        for group, indices in self.groups.items():
            kept = sum(subnet.layers[index] is not None for index in indices)
            choices = self.depth_choices[group]
            if kept not in choices:
                raise SpaceError(
                    f"depth: group {group} keeps {kept} of {len(indices)} blocks; the space asks for {offered(choices)}"
                )

    @staticmethod
    def _check_choice(field: str, value: object, choices: Sequence[object]) -> None:
        if value not in choices:
            raise SpaceError(f"{field}: expected one of {', '.join(str(choice) for choice in choices)}, got {value}")

    def encode(self, subnet: Subnet) -> tuple[int, ...]:
        """Genes of ``subnet``, one value per entry of :attr:`gene_sizes`; equal networks have equal genes.

        Genes of skipped blocks are 0, and so are bit genes unless the precision is ``int``.

        Raises:
            SpaceError: the subnet is not in the space.
        """
        self.check(subnet)
        integer = subnet.precision is Precision.INT
        genes = [self.precisions.index(subnet.precision)]
        for index, layer in enumerate(subnet.layers):
            if layer is None:
                genes.extend((0,) * GENES_PER_BLOCK)
                continue
            genes.append(1)
            genes.append(self.head_choices[index].index(layer.heads))
            genes.append(self.mlp_choices[index].index(layer.mlp))
            genes.append(self.weight_bits.index(layer.w) if integer else 0)
            genes.append(self.activation_bits.index(layer.a) if integer else 0)
        return tuple(genes)

    def decode(self, genes: Iterable[int]) -> Subnet:
        """The subnet of ``genes``; genes that have no effect may take any value in range.

        Raises:
            SpaceError: wrong number of genes, a gene out of range, or a block skipped that the space asks for.
        """
        values = tuple(int(gene) for gene in genes)
        if len(values) != len(self.gene_sizes):
            raise SpaceError(f"genes: expected {len(self.gene_sizes)}, got {len(values)}")
        for place, (value, size) in enumerate(zip(values, self.gene_sizes, strict=True)):
            if not 0 <= value < size:
                raise SpaceError(f"genes[{place}]: expected 0 to {size - 1}, got {value}")
        precision = self.precisions[values[0]]
        layers: list[Layer | None] = []
        for index in range(len(self.shape.blocks)):
            start = 1 + GENES_PER_BLOCK * index
            keep, heads, mlp, w, a = values[start : start + GENES_PER_BLOCK]
            widths = (self.head_choices[index][heads], self.mlp_choices[index][mlp])
            layers.append(make_layer(widths, precision, self.weight_bits[w], self.activation_bits[a]) if keep else None)
        subnet = Subnet(tuple(layers), precision)
        self.check(subnet)
        return subnet

    def largest(self, precision: Precision = Precision.FP32, w: int = 8, a: int = 8) -> Subnet:
        """The whole network; ``w`` and ``a`` count at precision ``int`` only.

        Raises:
            SpaceError: the space lacks that precision or these bits.
        """
        return self.uniform([len(self.groups[group]) for group in self.elastic_groups], 1.0, 1.0, precision, w, a)

    def smallest(self, w: int = 4, a: int = 4) -> Subnet:
        """Fewest blocks, heads and hidden channels, at integer precision.

        Raises:
            SpaceError: the space lacks these bits.
        """
        heads, mlp = min(self.config.head_ratios), min(self.config.mlp_ratios)
        return self.uniform(self.shallowest, heads, mlp, Precision.INT, w, a)

    def uniform(
        self,
        depths: int | Sequence[int],
        heads_ratio: float,
        mlp_ratio: float,
        precision: Precision = Precision.INT,
        w: int = 8,
        a: int = 8,
    ) -> Subnet:
        """The network of evenly spread blocks of one width and precision.

        Args:
            depths: blocks kept of each elastic group; a number alone where there is one such group.
            heads_ratio: share of the heads, one of the configuration's.
            mlp_ratio: share of the hidden channels, one of the configuration's.
            precision: of the whole network.
            w: weight bits at precision ``int``; not used otherwise.
            a: activation bits at precision ``int``; not used otherwise.

        Raises:
            SpaceError: not in the space.
        """
        self._check_choice("head ratio", heads_ratio, sorted(self.config.head_ratios))
        self._check_choice("MLP ratio", mlp_ratio, sorted(self.config.mlp_ratios))
        layers: list[Layer | None] = [None] * len(self.shape.blocks)
        for index in self.kept_blocks(depths):
            block = self.shape.blocks[index]
            widths = (round(heads_ratio * block.heads), round(mlp_ratio * block.mlp))
            layers[index] = make_layer(widths if block.elastic else (block.heads, block.mlp), precision, w, a)
        subnet = Subnet(tuple(layers), precision)
        self.check(subnet)
        return subnet

    def name(self, subnet: Subnet) -> str:
        """Text from which :meth:`parse` restores ``subnet``, of characters that are safe in file names and in a shell.

        A uniform network reads ``d6-h.75-m3-w4a4``: blocks kept (evenly spread; ``d1+4`` of two groups), share of the
        heads, hidden channels as a multiple of the embedding width, bits. Any other is listed block by block, as in
        ``w4a4.4h1024x2.0.3h768``: heads and hidden channels, ``0`` for a skipped block, ``x2`` for two in a row; where
        bits differ it begins with ``int`` and each layer has its own, ``4h1024w4a8``.

        Raises:
            SpaceError: the subnet is not in the space.
        """
        self.check(subnet)
        kept = [layer for layer in subnet.layers if layer is not None]
        bits = {(layer.w, layer.a) for layer in kept}
        common = len(bits) == 1
        if subnet.precision is not Precision.INT:
            suffix = subnet.precision.value
        else:
            suffix = "w{}a{}".format(*next(iter(bits))) if common else subnet.precision.value
        widths = self._uniform_widths(subnet) if common else None
        depths = self._depths(subnet)
        if widths is not None and subnet.kept == self.kept_blocks(depths):
            return f"d{'+'.join(map(str, depths))}-h{widths[0]}-m{widths[1]}-{suffix}"
        parts = [suffix]
        for layer, run in itertools.groupby(subnet.layers):
            text = "0" if layer is None else f"{layer.heads}h{layer.mlp}"
            if layer is not None and not common:
                text += f"w{layer.w}a{layer.a}"
            count = sum(1 for _ in run)
            parts.append(text if count == 1 else f"{text}x{count}")
        return ".".join(parts)

    def _uniform_widths(self, subnet: Subnet) -> tuple[str, str] | None:
        """Texts of head share and MLP multiple if all elastic blocks kept have the same, else None."""
        texts = {
            (self._head_texts[index][layer.heads], self._mlp_texts[index][layer.mlp])
            for index, layer in enumerate(subnet.layers)
            if layer is not None and self.shape.blocks[index].elastic
        }
        return texts.pop() if len(texts) == 1 else None

    def parse(self, text: str) -> Subnet:
        """The subnet that :meth:`name` calls ``text``, or that a short word means.

        Words: ``largest`` (whole network at the widest precision), ``smallest`` (fewest bits), ``fp32``, ``fp16``,
        ``fp8``, ``w8a8``, ``w4a8``, ``w8a4``, ``w4a4`` (whole network at that precision).

        Raises:
            SpaceError: not the name of a subnet of the space.
        """
        try:
            return self._parse(text.strip())
        except SpaceError as error:
            raise SpaceError(f"subnet {text!r}: {error}") from error

    def _parse(self, text: str) -> Subnet:
        if text == "largest":
            return self.largest(self.precisions[0], self.weight_bits[-1], self.activation_bits[-1])
        if text == "smallest":
            return self.smallest(self.weight_bits[0], self.activation_bits[0])
        if match := _UNIFORM.fullmatch(text):
            precision, w, a = _parse_bits(match["bits"])
            layers: list[Layer | None] = [None] * len(self.shape.blocks)
            for index in self.kept_blocks([int(depth) for depth in match["depths"].split("+")]):
                layers[index] = make_layer(self._parse_widths(index, match["heads"], match["mlp"]), precision, w, a)
            subnet = Subnet(tuple(layers), precision)
        else:
            head, *parts = text.split(".")
            if (
                head != "int"
                and head not in {precision.value for precision in FLOAT_BITS}
                and not _BITS.fullmatch(head)
            ):
                raise SpaceError(f"expected {_FORMS}")
            precision, w, a = _parse_bits(head)
            if not parts:
                if head == "int":
                    raise SpaceError(f"int needs its layers; expected {_FORMS}")
                return self.largest(precision, w, a)
            subnet = Subnet(self._parse_layers(parts, precision, w, a), precision)
        self.check(subnet)
        return subnet

    def _parse_widths(self, index: int, heads: str, mlp: str) -> tuple[int, int]:
        """Heads and hidden channels of block ``index`` from the texts of a uniform name."""
        block = self.shape.blocks[index]
        if not block.elastic:
            return block.heads, block.mlp
        found = []
        for field, text, texts in (
            ("head ratio h", heads, self._head_texts[index]),
            ("MLP multiple m", mlp, self._mlp_texts[index]),
        ):
            counts = [count for count, known in texts.items() if float(known) == float(text)]
            if not counts:
                raise SpaceError(f"{field}: expected one of {', '.join(texts.values())} for {block.name}, got {text}")
            found.append(counts[0])
        return found[0], found[1]

    def _parse_layers(self, parts: list[str], precision: Precision, w: int, a: int) -> tuple[Layer | None, ...]:
        layers: list[Layer | None] = []
        own = precision is Precision.INT and w == 0  # every layer has bits of its own
        for part in parts:
            match = _LAYER.fullmatch(part)
            if match is None or (match["heads"] is not None and own != (match["w"] is not None)):
                example = "4h1024w4a8" if own else "4h1024"
                raise SpaceError(
                    f"layer {part!r}: expected heads and hidden channels such as {example}, or 0 (skipped)"
                )
            run = int(match["run"] or 1)
            if len(layers) + run > len(self.shape.blocks):
                raise SpaceError(f"more layers than the {len(self.shape.blocks)} blocks of the policy")
            layer = None
            if match["heads"] is not None:
                bits = (int(match["w"]), int(match["a"])) if own else (w, a)
                layer = make_layer((int(match["heads"]), int(match["mlp"])), precision, *bits)
            layers.extend([layer] * run)
        return tuple(layers)


def _parse_bits(text: str) -> tuple[Precision, int, int]:
    """Precision, weight and activation bits of ``fp8``, ``w4a8`` or ``int`` (bits 0: to be read per layer)."""
    if match := _BITS.fullmatch(text):
        return Precision.INT, int(match[1]), int(match[2])
    return Precision(text), 0, 0
