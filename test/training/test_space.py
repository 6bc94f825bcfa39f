from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.bundle.document import DocumentError, dump_document, parse_document
from dcqfa_ros.errors import UserError
from training.config import load_config
from training.depths import evenly_kept
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policy_shape import BlockShape, LinearShape, PolicyShape, linear_size
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.subnet import Layer, Precision, SpaceError, Subnet

ROOT = Path(__file__).parents[2]
QUARTERS = (0.25, 0.5, 0.75, 1.0)
CONFIG = SpaceConfig(min_depth={"decoder": 2}, head_ratios=QUARTERS, mlp_ratios=QUARTERS)
SHAPE = diffusion_policy_t_shape(DiffusionPolicyTConfig())
SPACE = SearchSpace(SHAPE, CONFIG)
DOCUMENT = """
min_depth: {decoder: 2}
head_ratios: [0.25, 0.5, 0.75, 1.0]
mlp_ratios: [0.25, 0.5, 0.75, 1.0]
weight_bits: [4, 8]
activation_bits: [4, 8]
precisions: [fp32, fp16, fp8]
"""


def block(index: int, heads: int, mlp: int, group: str = "decoder", elastic: bool = True, dim: int = 24) -> BlockShape:
    """A block of one attention output and an MLP, enough for what the space looks at."""
    width = heads * 4
    linears = (
        LinearShape("o", width, dim, "heads", "full", True, "step", 5),
        LinearShape("fc1", dim, mlp, "full", "mlp", True, "step", 5),
    )
    return BlockShape(f"blocks.{index}", group, group, dim, heads, 4, mlp, 5, 0, linears, 2 * dim, elastic)


# Blocks of unequal width, a group of fixed size, and multiples of the embedding width that are no short decimals.
UNEVEN = SearchSpace(
    PolicyShape(
        "uneven",
        (
            block(0, 8, 64, "tower", elastic=False, dim=16),
            block(1, 8, 64, "tower", elastic=False, dim=16),
            block(2, 6, 32),
            block(3, 3, 16),
            block(4, 6, 32),
            block(5, 6, 32),
        ),
        100,
        0,
        0,
    ),
    SpaceConfig(min_depth={"decoder": 1}, head_ratios=(1 / 3, 1.0), mlp_ratios=(0.5, 1.0, 0.25), weight_bits=(8, 4)),
)
SPACES = st.sampled_from([SPACE, UNEVEN])


@st.composite
def spaces_and_genes(draw: st.DrawFn) -> tuple[SearchSpace, tuple[int, ...]]:
    """A space and genes in range that may keep too few blocks."""
    space = draw(SPACES)
    # Few distinct values make uniform networks and long runs likely.
    bound = draw(st.integers(1, 4))
    return space, tuple(draw(st.integers(0, min(bound, size) - 1)) for size in space.gene_sizes)


@st.composite
def spaces_and_subnets(draw: st.DrawFn) -> tuple[SearchSpace, Subnet]:
    """A space and one of its subnets."""
    space = draw(SPACES)
    genes = [draw(st.integers(0, size - 1)) for size in space.gene_sizes]
    if draw(st.booleans()):  # one width and bit width in all layers
        for gene in range(1, 5):
            shared = min(space.gene_sizes[gene + 1 + 5 * i] for i in range(2, len(space.shape.blocks)))
            genes[1 + gene :: 5] = [min(shared, size) - 1 for size in space.gene_sizes[1 + gene :: 5]]
    depths = [draw(st.sampled_from(space.depth_choices[group])) for group in space.elastic_groups]
    kept = set(space.kept_blocks(depths)) if draw(st.booleans()) else set(range(len(space.shape.blocks)))
    genes[1::5] = [int(index in kept) for index in range(len(space.shape.blocks))]
    return space, space.decode(genes)


@given(blocks=st.integers(1, 40), data=st.data())
def test_kept_blocks_spread_evenly_and_hold_the_ends(blocks: int, data: st.DataObject) -> None:
    depth = data.draw(st.integers(0, blocks))
    kept = evenly_kept(blocks, depth)
    assert len(set(kept)) == depth and list(kept) == sorted(kept) and set(kept) <= set(range(blocks))
    if depth >= 2:
        gaps = {b - a for a, b in itertools.pairwise(kept)}
        assert (kept[0], kept[-1]) == (0, blocks - 1) and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("blocks", "depth"), [(4, 5), (4, -1)])
def test_a_depth_that_no_pattern_has_is_refused(blocks: int, depth: int) -> None:
    with pytest.raises(ValueError, match=f"expected 0 to 4, got {depth}"):
        evenly_kept(blocks, depth)


def test_the_space_of_diffusion_policy_t_is_that_of_the_paper() -> None:
    assert SPACE.head_choices == ((1, 2, 3, 4),) * 8
    assert SPACE.mlp_choices == ((256, 512, 768, 1024),) * 8
    assert (SPACE.weight_bits, SPACE.activation_bits) == ((4, 8), (4, 8))
    assert SPACE.precisions == (Precision.FP32, Precision.FP16, Precision.FP8, Precision.INT)
    assert SPACE.gene_sizes == (4, *(2, 4, 4, 2, 2) * 8)
    assert (SPACE.groups, SPACE.least_depths, SPACE.shallowest) == ({"decoder": tuple(range(8))}, {"decoder": 2}, (2,))


def test_the_shipped_space_is_recognised_by_the_hash_that_searches_of_earlier_versions_have() -> None:
    config = load_config(ROOT / "config/training/pusht_keypoints_supernet.yaml")
    assert config.supernet is not None
    space = config.supernet.space
    assert space.sha256() == "a7370613c8d6c1cc6259b93f0614fc6fbb24870fecc0d63c0a6025242e6ec55d"
    listed = space.model_copy(update={"depths": {"decoder": (2, 8)}})
    assert listed.sha256() != space.sha256()


def test_the_order_of_a_list_of_depths_means_nothing() -> None:
    one, other = (
        SpaceConfig(depths={"decoder": depths}, head_ratios=(1.0,), mlp_ratios=(1.0,)) for depths in ((8, 2), (2, 8))
    )
    assert one == other and one.sha256() == other.sha256()


def test_the_configuration_is_read_from_yaml_and_written_back() -> None:
    assert parse_document(DOCUMENT.encode(), SpaceConfig) == CONFIG
    assert parse_document(dump_document(CONFIG), SpaceConfig) == CONFIG


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("head_ratios", [0.5, 0.75], "full size 1.0 is missing"),
        ("mlp_ratios", [], "mlp_ratios"),
        ("mlp_ratios", [0.0, 1.0], r"mlp_ratios\[0\]: Input should be greater than 0"),
        ("mlp_ratios", [1.0, 1.5], r"mlp_ratios\[1\]: Input should be less than or equal to 1"),
        ("weight_bits", [4, 6], r"weight_bits\[1\]: Input should be 4 or 8"),
        ("activation_bits", [8, 8], "activation_bits: a choice stands twice"),
        ("precisions", ["fp32", "int"], "precisions: int is always in the space"),
        ("precisions", ["fp64"], "fp64"),
        ("min_depth", {"decoder": 0}, "min_depth.decoder: Input should be greater than or equal to 1"),
        ("min_depth", {"decoder": [6, 8]}, "min_depth.decoder: Input should be a valid integer"),
        ("depths", {"decoder": [6, 8]}, "group decoder stands in min_depth and in depths; keep one"),
        ("depths", {"other": [8, 8]}, "depths: other: a choice stands twice in 8, 8; keep one"),
        ("depths", {"other": []}, "depths.other: Tuple should have at least 1 item"),
        ("depths", {"other": [0, 8]}, r"depths.other\[0\]: Input should be greater than or equal to 1"),
        ("always_kept", {"decoder": "last"}, "always_kept.decoder: Input should be 'first' or 'ends'"),
        ("depth", 4, "depth: unknown field"),
    ],
)
def test_a_configuration_that_spans_no_space_is_refused_by_field(field: str, value: Any, message: str) -> None:
    document = yaml.safe_load(DOCUMENT) | {field: value}
    with pytest.raises(DocumentError, match=message):
        parse_document(yaml.safe_dump(document).encode(), SpaceConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_depth": {"decoder": 9}}, "space.min_depth.decoder: expected 1 to 8 blocks, got 9"),
        ({"min_depth": {"decoder": 2, "encoder": 1}}, "space.min_depth.encoder: policy .* no such group; .* decoder"),
        ({"min_depth": {}}, "space.min_depth.decoder: this field is missing; give 1 to 8"),
        ({"always_kept": {"encoder": "first"}}, "space.always_kept.encoder: the policy has no such group; .* decoder"),
        (
            {"min_depth": {"decoder": 1}, "always_kept": {"decoder": "ends"}},
            r"space.always_kept.decoder: ends are 2 blocks, but a network may keep 1; give at least 2 \(space",
        ),
        ({"min_depth": {}, "depths": {"decoder": (2, 9)}}, "space.depths.decoder: expected 1 to 8 blocks, got 9"),
        ({"min_depth": {}, "depths": {"decoder": (2, 4)}}, r"space.depths.decoder: .*; add the whole group, 8"),
        ({"depths": {"encoder": (8,)}}, "space.depths.encoder: policy .* no such group; it has decoder"),
        ({"head_ratios": (0.3, 1.0)}, r"space.head_ratios: 0.3 of the 4 heads of blocks.0 is no whole number"),
        ({"mlp_ratios": (0.0001, 1.0)}, r"space.mlp_ratios: 0.0001 of the 1024 hidden channels of blocks.0"),
        ({"mlp_ratios": (0.5, 0.50000001, 1.0)}, "space.mlp_ratios: two shares .* keep one"),
    ],
)
def test_a_configuration_that_does_not_fit_the_policy_is_refused_by_field(changes: dict, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace(SHAPE, CONFIG.model_copy(update=changes))


def test_a_policy_whose_layers_cannot_be_sliced_is_refused_by_name() -> None:
    with pytest.raises(SpaceError, match="uneven: expected at least one elastic block"):
        SearchSpace(PolicyShape("uneven", (), 0, 0, 0), CONFIG)
    odd = dataclasses.replace(block(0, 4, 32), linears=(LinearShape("o", 7, 24, "heads", "full", True, "step", 1),))
    with pytest.raises(SpaceError, match=r"blocks.0.o: 7 features are sliced by heads, but are no multiple of 4"):
        SearchSpace(PolicyShape("odd", (odd,), 0, 0, 0), CONFIG)
    mixed = (block(0, 4, 32), block(1, 4, 32, elastic=False))
    with pytest.raises(SpaceError, match="group decoder mixes elastic blocks and blocks of fixed size"):
        SearchSpace(PolicyShape("mixed", mixed, 0, 0, 0), CONFIG)


@pytest.mark.parametrize(("which", "kept"), [("first", {0}), ("ends", {0, 7})])
def test_a_block_that_is_always_kept_is_in_every_network_of_the_space(which: str, kept: set[int]) -> None:
    space = SearchSpace(SHAPE, CONFIG.model_copy(update={"always_kept": {"decoder": which}}))
    assert space.always_kept == kept
    for depth in range(2, 9):
        space.check(space.uniform(depth, 1.0, 1.0))
    whole = space.largest(Precision.INT)
    for index in range(8):
        layers = tuple(None if place == index else layer for place, layer in enumerate(whole.layers))
        if index not in kept:
            assert space.parse(space.name(Subnet(layers, Precision.INT))) == Subnet(layers, Precision.INT)
            continue
        with pytest.raises(SpaceError, match=rf"blocks.{index}: no network of this space skips it"):
            space.check(Subnet(layers, Precision.INT))
        genes = list(space.encode(whole))
        genes[1 + 5 * index] = 0
        with pytest.raises(SpaceError, match=rf"blocks.{index}: no network of this space skips it"):
            space.decode(genes)


def test_errors_are_for_the_user() -> None:
    assert issubclass(SpaceError, UserError) and issubclass(SpaceError, ValueError)


@settings(deadline=None)
@given(spaces_and_subnets())
def test_genes_and_names_restore_every_subnet(case: tuple[SearchSpace, Subnet]) -> None:
    space, subnet = case
    assert space.decode(space.encode(subnet)) == subnet
    assert hash(space.decode(space.encode(subnet))) == hash(subnet)
    name = space.name(subnet)
    assert space.parse(name) == subnet
    assert re.fullmatch(r"[a-z][a-z0-9.-]*", name)  # safe in a shell, in a file name, and no option


@settings(deadline=None)
@given(spaces_and_genes(), st.randoms())
def test_genes_without_effect_do_not_tell_networks_apart(
    case: tuple[SearchSpace, tuple[int, ...]], random: Any
) -> None:
    space, genes = case
    kept = {group: sum(genes[1 + 5 * i] for i in blocks) for group, blocks in space.groups.items()}
    if any(kept[group] < least for group, least in space.least_depths.items()):
        with pytest.raises(SpaceError, match=r"depth: group .* keeps|its size is fixed"):
            space.decode(genes)
        return
    subnet = space.decode(genes)
    canonical = space.encode(subnet)
    assert len(canonical) == len(space.gene_sizes)
    idle = [0, 0, 0, 0, 0]
    for index, layer in enumerate(subnet.layers):
        own = canonical[1 + 5 * index : 6 + 5 * index]
        assert own == tuple(idle) if layer is None else own[0] == 1
        assert subnet.precision is Precision.INT or own[3:] == (0, 0)
    # Whatever stands in genes that have no effect, the network and so its canonical genes are the same.
    noisy = list(genes)
    for place, size in enumerate(space.gene_sizes[1:]):
        layer, kind = subnet.layers[place // 5], place % 5
        if kind and (layer is None or (kind >= 3 and subnet.precision is not Precision.INT)):
            noisy[1 + place] = random.randrange(size)
    assert space.encode(space.decode(noisy)) == canonical


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(0, 4, r"genes\[0\]: expected 0 to 3, got 4"), (2, -1, r"genes\[2\]: expected 0 to 3, got -1")],
)
def test_a_gene_out_of_range_is_named(place: int, value: int, message: str) -> None:
    genes = list(SPACE.encode(SPACE.largest()))
    genes[place] = value
    with pytest.raises(SpaceError, match=message):
        SPACE.decode(genes)


def test_genes_of_another_space_are_refused() -> None:
    with pytest.raises(SpaceError, match="genes: expected 41, got 40"):
        SPACE.decode(SPACE.encode(SPACE.largest())[:-1])


@pytest.mark.parametrize(
    ("subnet", "name"),
    [
        (SPACE.largest(), "d8-h1-m4-fp32"),
        (SPACE.largest(Precision.FP8), "d8-h1-m4-fp8"),
        (SPACE.largest(Precision.INT, 4, 8), "d8-h1-m4-w4a8"),
        (SPACE.smallest(), "d2-h.25-m1-w4a4"),
        (SPACE.uniform(6, 0.75, 0.75, Precision.INT, 4, 4), "d6-h.75-m3-w4a4"),
        (UNEVEN.largest(Precision.FP16), "fp16.8h64x2.6h32.3h16.6h32x2"),
        (UNEVEN.uniform(3, 1 / 3, 0.5, w=8, a=4), "d3-h.33-m.67-w8a4"),  # blocks of fixed size are not told
    ],
)
def test_subnets_have_short_names(subnet: Subnet, name: str) -> None:
    space = SPACE if len(subnet.layers) == 8 else UNEVEN
    assert space.name(subnet) == name
    assert space.parse(name) == subnet


def test_subnets_that_are_not_uniform_are_listed_block_by_block() -> None:
    whole = SPACE.largest(Precision.INT, 4, 4)
    narrow = dataclasses.replace(whole, layers=(*whole.layers[:6], None, Layer(3, 768, 4, 4)))
    assert SPACE.name(narrow) == "w4a4.4h1024x6.0.3h768"
    mixed = dataclasses.replace(whole, layers=(*whole.layers[:7], Layer(3, 768, 4, 8)))
    assert SPACE.name(mixed) == "int.4h1024w4a4x7.3h768w4a8"
    uneven_depth = dataclasses.replace(whole, layers=(*whole.layers[:7], None))
    assert SPACE.name(uneven_depth) == "w4a4.4h1024x7.0"
    assert all(SPACE.parse(SPACE.name(subnet)) == subnet for subnet in (narrow, mixed, uneven_depth))


def test_a_share_that_is_no_short_decimal_is_written_as_far_as_needed() -> None:
    shape = PolicyShape("thirds", (block(0, 6, 32), block(1, 6, 32)), 0, 0, 0)
    space = SearchSpace(shape, SpaceConfig(min_depth={"decoder": 1}, head_ratios=(1 / 3, 1.0), mlp_ratios=(1.0,)))
    subnet = space.uniform(2, 1 / 3, 1.0)
    assert space.name(subnet) == "d2-h.33-m1.33-w8a8"
    assert space.parse("d2-h.33-m1.33-w8a8") == subnet


@pytest.mark.parametrize(
    ("text", "subnet"),
    [
        ("largest", SPACE.largest()),
        ("smallest", SPACE.smallest()),
        ("fp32", SPACE.largest()),
        ("fp16", SPACE.largest(Precision.FP16)),
        ("fp8", SPACE.largest(Precision.FP8)),
        ("w8a8", SPACE.largest(Precision.INT)),
        ("w4a8", SPACE.largest(Precision.INT, 4, 8)),
        ("w8a4", SPACE.largest(Precision.INT, 8, 4)),
        ("w4a4", SPACE.largest(Precision.INT, 4, 4)),
        (" d6-h0.75-m3.0-w4a4\n", SPACE.uniform(6, 0.75, 0.75, Precision.INT, 4, 4)),
    ],
)
def test_words_and_other_spellings_are_understood(text: str, subnet: Subnet) -> None:
    assert SPACE.parse(text) == subnet


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a uniform network such as d6-h.75-m3-w4a4"),
        ("tiny", "expected a uniform network such as"),
        ("int", "int needs its layers"),
        ("w4a6", "activation bits: expected one of 4, 8, got 6"),
        ("d9-h1-m4-w8a8", "depth: expected 2 to 8 blocks, got 9"),
        ("d1-h1-m4-w8a8", "depth: expected 2 to 8 blocks, got 1"),
        ("d6-h.8-m3-w4a4", r"head ratio h: expected one of \.25, \.5, \.75, 1 for blocks.0, got \.8"),
        ("d6-h.75-m5-w4a4", "MLP multiple m: expected one of 1, 2, 3, 4 for blocks.0, got 5"),
        ("d6-h.75-m3-int", "expected a uniform network"),
        ("w4a4.4h1024x7", "layers: expected one for each of 8 blocks, got 7"),
        ("w4a4.4h1024x9", "more layers than the 8 blocks"),
        ("w4a4.4h1024x9999999", "expected heads and hidden channels such as 4h1024, or 0"),
        ("w4a4.4h1000x8", "blocks.0: hidden channels: expected one of 256, 512, 768, 1024, got 1000"),
        ("w4a4.5h1024x8", "blocks.0: heads: expected one of 1, 2, 3, 4, got 5"),
        ("w4a4.4h1024w4a4x8", "layer '4h1024w4a4x8': expected heads and hidden channels such as 4h1024"),
        ("int.4h1024x8", "layer '4h1024x8': expected heads and hidden channels such as 4h1024w4a8"),
        ("fp8.4h1024.0x7", "depth: group decoder keeps 1 of 8 blocks; the space asks for 2 to 8"),
    ],
)
def test_what_is_no_name_is_refused_with_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=f"subnet {re.escape(repr(text))}: .*{message}"):
        SPACE.parse(text)


@given(st.text(st.sampled_from("dhmwafpxint0123456789.-")))
def test_any_text_is_a_subnet_or_refused_for_the_user(text: str) -> None:
    try:
        subnet = SPACE.parse(text)
    except SpaceError:
        return
    SPACE.check(subnet)


def test_a_precision_that_the_space_lacks_is_refused() -> None:
    space = SearchSpace(SHAPE, CONFIG.model_copy(update={"precisions": (Precision.FP16,)}))
    assert space.precisions == (Precision.FP16, Precision.INT)
    assert space.parse("largest") == space.largest(Precision.FP16)
    with pytest.raises(SpaceError, match="precision: expected one of fp16, int, got fp32"):
        space.largest()
    with pytest.raises(SpaceError, match="precision: expected one of fp16, int, got fp8"):
        space.parse("fp8")


def test_a_space_of_integers_alone_has_a_largest_network() -> None:
    space = SearchSpace(SHAPE, CONFIG.model_copy(update={"precisions": ()}))
    assert space.name(space.parse("largest")) == "d8-h1-m4-w8a8"


def test_bits_of_a_whole_network_precision_cannot_differ() -> None:
    layers = (*SPACE.largest().layers[:7], Layer(4, 1024, 8, 8))
    with pytest.raises(SpaceError, match=r"blocks.7: weight bits: expected one of 32, got 8"):
        SPACE.check(Subnet(layers, Precision.FP32))


def test_bits_that_the_space_lacks_are_refused() -> None:
    space = SearchSpace(SHAPE, CONFIG.model_copy(update={"weight_bits": (8,), "activation_bits": (8,)}))
    assert space.parse("smallest") == space.smallest(8, 8)
    with pytest.raises(SpaceError, match="weight bits: expected one of 8, got 4"):
        space.smallest()


def test_ratios_that_the_space_lacks_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"head ratio: expected one of 0.25, 0.5, 0.75, 1.0, got 0.3"):
        SPACE.uniform(4, 0.3, 1.0)
    with pytest.raises(SpaceError, match=r"MLP ratio: expected one of 0.25, 0.5, 0.75, 1.0, got 2.0"):
        SPACE.uniform(4, 1.0, 2.0)


def test_blocks_of_fixed_size_are_never_skipped_nor_narrowed() -> None:
    assert UNEVEN.head_choices[0] == (8,) and UNEVEN.mlp_choices[0] == (64,)
    assert UNEVEN.least_depths == {"tower": 2, "decoder": 1}
    smallest = UNEVEN.smallest()
    assert smallest.kept == (0, 1, 2) and smallest.layers[0] == Layer(8, 64, 4, 4)
    with pytest.raises(SpaceError, match=r"blocks\.0: its size is fixed, only its bits are chosen; no network"):
        UNEVEN.check(dataclasses.replace(smallest, layers=(None, *smallest.layers[1:])))
    with pytest.raises(SpaceError, match=r"min_depth.tower: expected 2 to 2 blocks, got 1"):
        SearchSpace(UNEVEN.shape, UNEVEN.config.model_copy(update={"min_depth": {"tower": 1, "decoder": 1}}))


def test_a_linear_is_sliced_by_what_it_declares() -> None:
    first = SHAPE.blocks[0]
    sizes = {linear.name: linear_size(first, linear, Layer(3, 512, 4, 4)) for linear in first.linears}
    assert sizes["self_attn.q"] == sizes["cross_attn.k"] == (256, 192)
    assert sizes["self_attn.o"] == (192, 256)
    assert (sizes["fc1"], sizes["fc2"]) == ((256, 512), (512, 256))


def test_subnets_and_spaces_travel_between_processes() -> None:
    space = pickle.loads(pickle.dumps(SPACE))
    assert space.parse("smallest") == pickle.loads(pickle.dumps(SPACE.smallest())) == copy.deepcopy(SPACE.smallest())
    with pytest.raises(dataclasses.FrozenInstanceError):
        space.largest().precision = Precision.FP8


def test_depth_counts_the_blocks_kept() -> None:
    subnet = SPACE.uniform(3, 1.0, 1.0)
    assert (subnet.depth, subnet.kept) == (3, (0, 4, 7))
