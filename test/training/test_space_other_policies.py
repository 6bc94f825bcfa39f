"""Other backbones need nothing but their declaration: MDT-V, a 7B Llama-based policy, and one with vision towers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.cost import cost, cost_tensors
from training.depths import evenly_spread
from training.draws import Phase, stratified_subnet
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.policy_shape import BlockShape, LinearShape, PolicyShape
from training.sandwich import smallest_of
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.space_counts import flops, mean_bits, paper_bytes, parameters, real_bytes
from training.subnet import Layer, Precision, SpaceError, Subnet
from training.synthetic_tables import synthetic_tensors

Stage = Literal["chunk", "step"]


def attention(
    name: str, dim: int, bias: bool, stages: tuple[Stage, Stage], tokens: tuple[int, int]
) -> list[LinearShape]:
    """q, k, v, o; keys and values have a stage and tokens of their own (the second of each pair)."""
    q, kv = zip(stages, tokens, strict=True)
    return [
        LinearShape(f"{name}.q", dim, dim, "full", "heads", bias, *q),
        LinearShape(f"{name}.k", dim, dim, "full", "heads", bias, *kv),
        LinearShape(f"{name}.v", dim, dim, "full", "heads", bias, *kv),
        LinearShape(f"{name}.o", dim, dim, "heads", "full", bias, *q),
    ]


def mdt_v() -> PolicyShape:
    """MDT-V's denoiser: the encoder does not depend on the noise level and runs once per chunk."""
    dim, mlp, context, actions = 384, 1536, 4, 10
    blocks = []
    for index in range(8):
        encoder = index < 4
        stage: Stage = "chunk" if encoder else "step"
        tokens = context if encoder else actions
        linears = attention("attn", dim, True, (stage, stage), (tokens, tokens))
        if not encoder:
            linears += attention("cross_attn", dim, True, ("step", "chunk"), (tokens, context))
        linears += [
            LinearShape("mlp.fc1", dim, mlp, "full", "mlp", False, stage, tokens),
            LinearShape("mlp.fc2", mlp, dim, "mlp", "full", False, stage, tokens),
        ]
        kind, memory, norms = ("encoder", 0, 2) if encoder else ("decoder", context, 3)
        name = f"{kind}.blocks.{index % 4}"
        blocks.append(BlockShape(name, kind, kind, dim, 8, 48, mlp, tokens, memory, tuple(linears), norms * 2 * dim))
    return PolicyShape("mdt_v", tuple(blocks), 6_000_000, 1_000_000, 2_000_000)


def llama_block(index: int) -> BlockShape:
    """A block of Llama-2 7B: RMS norms, no biases, gated MLP."""
    dim, mlp, tokens = 4096, 11008, 600
    linears = attention("self_attn", dim, False, ("step", "step"), (tokens, tokens))
    linears += [
        LinearShape("mlp.gate_proj", dim, mlp, "full", "mlp", False, "step", tokens),
        LinearShape("mlp.up_proj", dim, mlp, "full", "mlp", False, "step", tokens),
        LinearShape("mlp.down_proj", mlp, dim, "mlp", "full", False, "step", tokens),
    ]
    return BlockShape(f"layers.{index}", "llama", "llama", dim, 32, 128, mlp, tokens, 0, tuple(linears), 2 * dim)


def tower_block(index: int) -> BlockShape:
    """A block of a vision tower: its bits are chosen, its size is not."""
    dim, mlp, tokens = 1024, 4096, 257
    linears = attention("attn", dim, True, ("step", "step"), (tokens, tokens))
    linears += [
        LinearShape("mlp.fc1", dim, mlp, "full", "mlp", True, "step", tokens),
        LinearShape("mlp.fc2", mlp, dim, "mlp", "full", True, "step", tokens),
    ]
    name = f"tower.{index}"
    return BlockShape(name, "vit", "tower", dim, 16, 64, mlp, tokens, 0, tuple(linears), 6 * dim, elastic=False)


MDT_CONFIG = SpaceConfig(
    min_depth={"encoder": 1, "decoder": 1},
    head_ratios=tuple(i / 8 for i in range(1, 9)),
    mlp_ratios=(0.125, 0.25, 0.5, 1.0),
)
LLAMA_CONFIG = SpaceConfig(depths={"llama": (32, 24, 28)}, head_ratios=(0.75, 1.0), mlp_ratios=(0.5, 0.75, 1.0))
MDT = SearchSpace(mdt_v(), MDT_CONFIG)
LLAMA = SearchSpace(
    PolicyShape("llama", tuple(llama_block(i) for i in range(32)), 262_000_000, 0, 0, fixed_bits=16), LLAMA_CONFIG
)
OPENVLA = SearchSpace(
    PolicyShape(
        "openvla",
        (*(tower_block(i) for i in range(24)), *(llama_block(i) for i in range(32))),
        262_000_000,
        0,
        0,
        fixed_bits=16,
    ),
    LLAMA_CONFIG,
)
SPACES = st.sampled_from([MDT, LLAMA, OPENVLA])


@st.composite
def spaces_and_subnets(draw: st.DrawFn) -> tuple[SearchSpace, Subnet]:
    """A space and a subnet that keeps an evenly spread or a random set of blocks."""
    space = draw(SPACES)
    random = draw(st.randoms(use_true_random=False))
    genes = [random.randrange(size) for size in space.gene_sizes]
    depths = {group: random.choice(choices) for group, choices in space.depth_choices.items()}
    kept = set(evenly_spread(space.groups, depths))
    if random.random() < 0.5:
        kept = {i for group, members in space.groups.items() for i in random.sample(members, depths[group])}
    genes[1::5] = [int(i in kept) for i in range(len(space.shape.blocks))]
    return space, space.decode(genes)


@settings(deadline=None, max_examples=60)
@given(spaces_and_subnets())
def test_genes_and_names_restore_every_subnet(case: tuple[SearchSpace, Subnet]) -> None:
    space, subnet = case
    assert space.decode(space.encode(subnet)) == subnet
    assert space.parse(space.name(subnet)) == subnet
    counts = parameters(space.shape, subnet), paper_bytes(space.shape, subnet), real_bytes(space.shape, subnet)
    assert min(counts) > 0 and 4 <= mean_bits(space.shape, subnet) <= 32


def test_both_groups_of_mdt_v_keep_their_least_depth() -> None:
    assert MDT.depth_choices == {"encoder": (1, 2, 3, 4), "decoder": (1, 2, 3, 4)}
    assert MDT.smallest().kept == (0, 4)
    patterns = [MDT.kept_blocks(depths) for depths in ((2, 1), (2, 2), (4, 3), (1, 4))]
    assert patterns == [(0, 3, 4), (0, 3, 4, 7), (0, 1, 2, 3, 4, 6, 7), (0, 4, 5, 6, 7)]
    with pytest.raises(SpaceError, match="depth: expected one number for each of encoder, decoder, got 5"):
        MDT.kept_blocks(5)
    with pytest.raises(SpaceError, match=r"subnet 'd1\+5-h1-m4-w4a4': depth of decoder: expected 1 to 4 blocks, got 5"):
        MDT.parse("d1+5-h1-m4-w4a4")
    lone = MDT.encode(MDT.smallest())
    genes = list(lone)
    genes[1 + 5 * 4] = 0
    genes[1 + 5 * 1] = 1  # two blocks, but none of the decoder
    with pytest.raises(SpaceError, match="group decoder keeps 0 of 4 blocks; the space asks for 1 to 4"):
        MDT.decode(genes)


@pytest.mark.parametrize(
    ("space", "subnet", "name"),
    [
        (MDT, MDT.largest(), "d4+4-h1-m4-fp32"),
        (MDT, MDT.smallest(), "d1+1-h.125-m.5-w4a4"),
        (MDT, MDT.uniform((1, 4), 0.625, 0.25, w=8, a=8), "d1+4-h.625-m1-w8a8"),
        (LLAMA, LLAMA.largest(Precision.FP16), "d32-h1-m2.6875-fp16"),
        (LLAMA, LLAMA.smallest(), "d24-h.75-m1.34375-w4a4"),
        (LLAMA, LLAMA.uniform(28, 1.0, 0.75, w=4, a=8), "d28-h1-m2.015625-w4a8"),
        (OPENVLA, OPENVLA.smallest(), "d24-h.75-m1.34375-w4a4"),
    ],
)
def test_uniform_networks_have_short_names(space: SearchSpace, subnet: Subnet, name: str) -> None:
    assert space.name(subnet) == name
    assert space.parse(name) == subnet


def test_depths_of_llama_come_from_its_list() -> None:
    assert LLAMA.depth_choices == {"llama": (24, 28, 32)}
    assert OPENVLA.depth_choices == {"tower": (24,), "llama": (24, 28, 32)}
    assert [len(LLAMA.kept_blocks(depth)) for depth in (24, 28, 32)] == [24, 28, 32]
    assert OPENVLA.elastic_groups == ("llama",) and OPENVLA.kept_blocks(28)[:24] == tuple(range(24))
    for depth in (23, 26, 31, 33):
        with pytest.raises(SpaceError, match=f"depth: expected 24, 28 or 32 blocks, got {depth}"):
            LLAMA.kept_blocks(depth)
    with pytest.raises(SpaceError, match=r"subnet 'd26-h1-m2\.6875-fp16': depth: expected 24, 28 or 32 blocks, got 26"):
        LLAMA.parse("d26-h1-m2.6875-fp16")
    lone = list(LLAMA.encode(LLAMA.largest()))
    lone[1] = 0
    with pytest.raises(SpaceError, match="group llama keeps 31 of 32 blocks; the space asks for 24, 28 or 32"):
        LLAMA.decode(lone)


def test_a_name_means_the_same_network_whatever_other_depths_the_space_offers() -> None:
    narrow = MDT_CONFIG.model_copy(update={"min_depth": {}, "depths": {"encoder": (1, 4), "decoder": (1, 2, 4)}})
    space, generator = SearchSpace(mdt_v(), narrow), torch.Generator().manual_seed(2)
    for depths in ((1, 1), (4, 2), (1, 4)):
        subnet = space.uniform(depths, 0.5, 0.5)
        assert MDT.parse(space.name(subnet)) == subnet and MDT.name(subnet) == space.name(subnet)
    for _ in range(50):
        subnet = stratified_subnet(space, generator)
        assert MDT.name(subnet) == space.name(subnet)


def test_blocks_of_fixed_size_are_never_skipped() -> None:
    genes = list(OPENVLA.encode(OPENVLA.largest()))
    genes[1] = 0
    with pytest.raises(SpaceError, match=r"tower\.0: its size is fixed, only its bits are chosen; no network skips it"):
        OPENVLA.decode(genes)
    config = LLAMA_CONFIG.model_copy(update={"depths": {**LLAMA_CONFIG.depths, "tower": (12, 24)}})
    with pytest.raises(SpaceError, match=r"space\.depths\.tower: its 24 blocks are of fixed size .*, got 12; leave"):
        SearchSpace(OPENVLA.shape, config)


def test_the_modulation_of_an_adaptive_norm_counts_at_8_bits_or_more_and_is_never_sliced() -> None:
    plain = mdt_v()
    size = 6 * 384
    extra = LinearShape("modulation", 384, size, "full", "full", True, "step", 1, quantized=False)
    decoder = tuple(replace(block, linears=(*block.linears, extra)) for block in plain.blocks[4:])
    modulated = replace(plain, blocks=(*plain.blocks[:4], *decoder), fixed_bits=16)
    space, before = SearchSpace(modulated, MDT_CONFIG), SearchSpace(replace(plain, fixed_bits=16), MDT_CONFIG)
    smallest, added = space.smallest(), 384 * size + size
    assert parameters(modulated, smallest) == parameters(plain, smallest) + added
    assert paper_bytes(modulated, smallest) == paper_bytes(plain, smallest) + added
    assert paper_bytes(modulated, space.largest()) == paper_bytes(plain, space.largest()) + 4 * 4 * added
    assert real_bytes(modulated, smallest) == real_bytes(before.shape, smallest) + 2 * added
    assert flops(modulated, smallest)[1] == flops(plain, smallest)[1] + 2 * 384 * size
    assert mean_bits(modulated, smallest) == 4.0
    slower, faster = (cost_tensors(modelled_table(ORIN_NX_16GB, made), made, 1) for made in (space, before))
    more = (slower.latency - faster.latency)[4:]
    assert (more > 0.0).all()
    torch.testing.assert_close(more, more[:, :1, :1, :1, :1].expand_as(more), rtol=1e-3, atol=0.0)  # at any width, bits
    slower_too, faster_too = (synthetic_tensors(m, torch.Generator().manual_seed(0), 1, 1)[0] for m in (space, before))
    assert (slower_too.latency[4:] > faster_too.latency[4:]).all()
    for one, other in ((slower, faster), (slower_too, faster_too)):
        assert ((one.memory - other.memory)[4:] == 2 * added).all()


def test_a_layer_that_is_not_quantized_takes_as_long_in_a_network_of_integers_as_in_one_of_float16() -> None:
    plain = replace(mdt_v(), fixed_bits=16)
    extra = LinearShape("modulation", 384, 384, "full", "full", False, "step", 100_000, quantized=False)
    blocks = tuple(replace(block, linears=(*block.linears, extra)) for block in plain.blocks[4:])
    more = replace(plain, blocks=(*plain.blocks[:4], *blocks))  # products weigh more than weights do
    added = {}
    for precision in (Precision.FP16, Precision.INT):
        times = []
        for shape in (more, plain):
            space = SearchSpace(shape, MDT_CONFIG)
            table = modelled_table(ORIN_NX_16GB, space)
            times.append(cost(table, shape, space.largest(precision, 4, 4), 1).latency_ms)
        added[precision] = times[0] - times[1]
    floating = ORIN_NX_16GB.floating
    computing = 4 * 2e3 * 384 * 384 * 100_000 / (floating.operations * ORIN_NX_16GB.compute_share)
    launches = 4e3 * ORIN_NX_16GB.launch_seconds
    assert added[Precision.INT] == pytest.approx(added[Precision.FP16], rel=1e-4)
    assert added[Precision.INT] == pytest.approx(computing + launches, rel=1e-3)


def test_a_layer_that_is_not_quantized_cannot_be_sliced() -> None:
    plain = mdt_v()
    first = replace(plain.blocks[0], linears=(replace(plain.blocks[0].linears[0], quantized=False),))
    with pytest.raises(SpaceError, match=r"encoder\.blocks\.0\.attn\.q is not quantized, so it cannot be sliced"):
        SearchSpace(replace(plain, blocks=(first, *plain.blocks[1:])), MDT_CONFIG)


def test_stratified_draws_take_every_depth_of_the_list_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    depths = Counter(stratified_subnet(OPENVLA, generator).depth - 24 for _ in range(900))
    assert sorted(depths) == [24, 28, 32] and min(depths.values()) > 240
    assert stratified_subnet(OPENVLA, generator, Phase(depth=False)).depth == 56


def test_choices_are_whole_heads_and_channels() -> None:
    assert MDT.head_choices == (tuple(range(1, 9)),) * 8
    assert MDT.mlp_choices == ((192, 384, 768, 1536),) * 8
    assert LLAMA.head_choices[0] == (24, 32) and LLAMA.mlp_choices[0] == (5504, 8256, 11008)
    assert OPENVLA.gene_sizes[1:6] == (2, 1, 1, 2, 2) and OPENVLA.gene_sizes[-5:] == (2, 2, 3, 2, 2)


def test_a_block_of_llama_has_the_published_parameters() -> None:
    fixed = LLAMA.shape.fixed_parameters
    assert parameters(LLAMA.shape, LLAMA.largest()) == fixed + 32 * 202_383_360
    narrow = Layer(24, 5504, 4, 4)
    expected = 4 * 4096 * 24 * 128 + 3 * 4096 * 5504 + 2 * 4096
    alone = Subnet((narrow, *[None] * 31), Precision.INT)
    assert parameters(LLAMA.shape, alone) == fixed + expected
    packed = 4 * 4096 * 24 * 128 // 2 + 3 * 4096 * 5504 // 2
    scales = 4 * (3 * 24 * 128 + 4096 + 2 * 5504 + 4096)
    assert real_bytes(LLAMA.shape, alone) == 2 * fixed + packed + scales + 4 * 2 * 4096


def test_an_encoder_runs_once_per_chunk() -> None:
    whole = MDT.largest()
    without_encoder = Subnet((None,) * 4 + whole.layers[4:], Precision.FP32)
    (chunk, step), (other_chunk, other_step) = flops(MDT.shape, whole), flops(MDT.shape, without_encoder)
    assert step == other_step
    per_block = 2 * 4 * (4 * 384 * 384 + 2 * 384 * 1536) + 4 * 4 * 4 * 384  # linear layers, attention products
    assert chunk - other_chunk == 4 * per_block
    assert other_chunk == 1_000_000 + 4 * 2 * 4 * 2 * 384 * 384  # keys and values of the decoder's memory


def test_vision_towers_change_in_bits_only() -> None:
    subnet = OPENVLA.smallest()
    assert set(subnet.layers[:24]) == {Layer(16, 4096, 4, 4)}
    assert OPENVLA.smallest().depth == 48 and OPENVLA.largest().depth == 56
    mixed = Subnet((*[Layer(16, 4096, 8, 8)] * 24, *subnet.layers[24:]), Precision.INT)
    assert OPENVLA.decode(OPENVLA.encode(mixed)) == mixed
    assert mean_bits(OPENVLA.shape, mixed) > mean_bits(OPENVLA.shape, subnet) == 4


@pytest.mark.parametrize("space", [MDT, LLAMA, OPENVLA], ids=lambda space: space.shape.backbone)
def test_the_smallest_of_every_phase_has_the_least_that_each_block_offers(space: SearchSpace) -> None:
    whole, thin, smallest = (
        smallest_of(space, Phase(True, *rest)) for rest in ((False, False), (True, False), (True, True))
    )
    for subnet in (whole, thin, smallest):
        space.check(subnet)
        assert {(layer.w, layer.a) for layer in subnet.layers if layer is not None} == {(4, 4)}
    assert whole == space.largest(Precision.INT, 4, 4) and smallest == space.smallest()
    assert [(layer.heads, layer.mlp) for layer in thin.layers if layer is not None] == [
        (heads[0], mlp[0]) for heads, mlp in zip(space.head_choices, space.mlp_choices, strict=True)
    ]
    for kept, layer in zip(smallest.layers, thin.layers, strict=True):
        assert kept in (None, layer)
