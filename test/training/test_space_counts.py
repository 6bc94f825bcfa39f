from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.space_counts import flops, mean_bits, paper_bytes, parameters, real_bytes
from training.subnet import Layer, Precision, Subnet

QUARTERS = (0.25, 0.5, 0.75, 1.0)
SHAPE = diffusion_policy_t_shape(DiffusionPolicyTConfig())
SPACE = SearchSpace(SHAPE, SpaceConfig(min_depth={"decoder": 2}, head_ratios=QUARTERS, mlp_ratios=QUARTERS))
TOTAL = 8_965_122
WEIGHTS = 8 * (8 * 256 * 256 + 2 * 256 * 1024)  # of the linear layers in the blocks
ROWS = 8 * (8 * 256 + 1024 + 256)  # as many scales, and biases
FIXED = TOTAL - WEIGHTS - ROWS - 8 * 6 * 256


@st.composite
def subnets(draw: st.DrawFn) -> Subnet:
    """Any subnet of the space."""
    genes = [draw(st.integers(0, size - 1)) for size in SPACE.gene_sizes]
    genes[1] = genes[-5] = 1
    return SPACE.decode(genes)


def test_a_narrow_block_counts_what_it_keeps() -> None:
    narrow = Subnet((Layer(3, 512, 8, 8), *[None] * 7), Precision.INT)
    heads = 3 * 64
    attention = 2 * (3 * (256 * heads + heads) + heads * 256 + 256)
    mlp = 256 * 512 + 512 + 512 * 256 + 256
    assert parameters(SHAPE, narrow) == SHAPE.fixed_parameters + attention + mlp + 6 * 256
    assert SHAPE.fixed_parameters == FIXED


@settings(deadline=None)
@given(subnets(), st.integers(0, 7))
def test_whatever_is_left_out_makes_a_subnet_smaller(subnet: Subnet, index: int) -> None:
    layer = subnet.layers[index]
    if layer is None:
        return

    def replaced(new: Layer | None) -> Subnet:
        return dataclasses.replace(subnet, layers=(*subnet.layers[:index], new, *subnet.layers[index + 1 :]))

    smaller = [replaced(None)]
    if layer.heads > 1:
        smaller.append(replaced(dataclasses.replace(layer, heads=layer.heads - 1)))
    if layer.mlp > 256:
        smaller.append(replaced(dataclasses.replace(layer, mlp=layer.mlp - 256)))
    for other in smaller:
        for count in (parameters, paper_bytes, real_bytes, lambda *of: flops(*of)[1]):
            assert count(SHAPE, other) < count(SHAPE, subnet)
        assert flops(SHAPE, other)[0] <= flops(SHAPE, subnet)[0]


@settings(deadline=None)
@given(subnets())
def test_kept_blocks_add_up(subnet: Subnet) -> None:
    empty = Subnet((None,) * 8, subnet.precision)
    for count in (parameters, real_bytes, paper_bytes):
        alone = [
            count(
                SHAPE,
                dataclasses.replace(empty, layers=tuple(x if j == i else None for j, x in enumerate(subnet.layers))),
            )
            for i in subnet.kept
        ]
        assert count(SHAPE, subnet) == count(SHAPE, empty) + sum(part - count(SHAPE, empty) for part in alone)


@settings(deadline=None)
@given(subnets())
def test_mean_bits_lie_between_those_of_the_layers(subnet: Subnet) -> None:
    bits = [layer.w for layer in subnet.layers if layer is not None]
    assert min(bits) <= mean_bits(SHAPE, subnet) <= max(bits)


def test_mean_bits_weigh_layers_by_their_parameters() -> None:
    layers = [None] * 6 + [Layer(4, 1024, 4, 8), Layer(1, 256, 8, 4)]
    large, small = 8 * 256 * 256 + 2 * 256 * 1024, 8 * 256 * 64 + 2 * 256 * 256
    expected = (4 * large + 8 * small) / (large + small)
    assert mean_bits(SHAPE, Subnet(tuple(layers), Precision.INT)) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="without blocks"):
        mean_bits(SHAPE, Subnet((None,) * 8, Precision.INT))


@pytest.mark.parametrize(("name", "bits"), [("fp32", 32), ("fp16", 16), ("fp8", 8), ("w8a8", 8), ("w8a4", 8)])
def test_the_papers_size_is_parameters_times_bits(name: str, bits: int) -> None:
    subnet = SPACE.parse(name)
    assert paper_bytes(SHAPE, subnet) == TOTAL * bits // 8
    assert mean_bits(SHAPE, subnet) == bits


def test_the_papers_size_at_four_bits_keeps_eight_outside_the_blocks() -> None:
    for name in ("w4a4", "w4a8"):
        assert paper_bytes(SHAPE, SPACE.parse(name)) == (TOTAL - FIXED) // 2 + FIXED


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", 4 * TOTAL),
        ("fp16", 2 * TOTAL),
        ("fp8", WEIGHTS + 4 * (TOTAL - WEIGHTS) + 4 * ROWS),
        ("w8a4", WEIGHTS + 4 * (TOTAL - WEIGHTS) + 4 * ROWS),
        ("w4a4", WEIGHTS // 2 + 4 * (TOTAL - WEIGHTS) + 4 * ROWS),
    ],
)
def test_real_bytes_hold_codes_scales_and_floats(name: str, expected: int) -> None:
    assert real_bytes(SHAPE, SPACE.parse(name)) == expected


def test_what_lies_outside_the_blocks_may_be_stored_at_fewer_bits() -> None:
    half = dataclasses.replace(SHAPE, fixed_bits=16)
    saved = real_bytes(SHAPE, SPACE.parse("w4a4")) - real_bytes(half, SPACE.parse("w4a4"))
    assert saved == 2 * FIXED
    assert real_bytes(half, SPACE.parse("fp32")) == 4 * TOTAL


def test_rows_of_an_odd_number_of_four_bit_codes_are_padded() -> None:
    block = SHAPE.blocks[0]
    linear = dataclasses.replace(block.linears[0], in_features=7, out_features=4, bias=False)
    shape = dataclasses.replace(
        SHAPE, blocks=(dataclasses.replace(block, linears=(linear,), float_parameters=0),), fixed_parameters=0
    )
    assert real_bytes(shape, Subnet((Layer(4, 1024, 4, 4),), Precision.INT)) == 4 * (4 + 4)


def test_a_network_of_other_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        parameters(SHAPE, Subnet((None,) * 7, Precision.INT))
