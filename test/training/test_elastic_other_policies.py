"""Other backbones need nothing but a declaration of their blocks: from quantizers to a search, no part knows them."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from test.training.other_policies import (
    ACTIONS,
    DIM,
    HEADS,
    INPUTS,
    MLP,
    TOKENS,
    Kept,
    Sizes,
    TinyLlama,
    TinyMdt,
    arguments,
    calibrated,
)
from training.conditions import Conditions
from training.cost import cost_tensors
from training.draws import stratified_subnet
from training.importance import apply_order, importance_order, order_by_importance
from training.modelled_tables import ORIN_NX_16GB, modelled_table
from training.nn.elastic import Arithmetic, ElasticLinear, integer_bits
from training.nn.elastic_policy import ElasticPolicy, clone
from training.policy_shape import LinearShape, PolicyShape
from training.search.cache import DistanceCache
from training.search.distance import SubnetDistance
from training.search.executors import LocalExecutor
from training.search.nsga import Genetics
from training.search.run import DeviceSearch, Plan
from training.search.session import KnownDistances
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.subnet import Precision, Subnet

LLAMA_CONFIG = SpaceConfig(depths={"llama": (2, 4)}, head_ratios=(0.75, 1.0), mlp_ratios=(0.5, 0.75, 1.0))
MDT_CONFIG = SpaceConfig(
    min_depth={"encoder": 1, "decoder": 1}, head_ratios=(0.25, 0.5, 1.0), mlp_ratios=(0.25, 0.5, 1.0)
)
LLAMA, MDT = calibrated(TinyLlama()), calibrated(TinyMdt())
POLICIES = {
    "llama": (LLAMA, SearchSpace(LLAMA.shape, LLAMA_CONFIG)),
    "mdt": (MDT, SearchSpace(MDT.shape, MDT_CONFIG)),
}
of_both = pytest.mark.parametrize("kind", sorted(POLICIES))


def drawn(space: SearchSpace, seed: int, precision: Precision | None = None) -> Subnet:
    """A stratified draw, as integers or at the precision of a whole network."""
    subnet = stratified_subnet(space, torch.Generator().manual_seed(seed), whole_network=False)
    if precision in (None, Precision.INT):
        return subnet
    genes = (space.precisions.index(precision), *space.encode(subnet)[1:])
    return space.decode(genes)


@torch.no_grad()
@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 9999),
    precision=st.sampled_from(list(Precision)),
    batch=st.integers(1, 5),
)
def test_an_extracted_network_gives_the_bits_of_the_supernet_with_it_active(
    kind: str, seed: int, precision: Precision, batch: int
) -> None:
    policy, space = POLICIES[kind]
    subnet, given_ = drawn(space, seed, precision), arguments(policy, batch, seed)
    alone = policy.extract(subnet)
    policy.activate(subnet)
    whole = policy(*given_)
    assert torch.equal(alone(*given_), whole)
    assert torch.equal(copy.deepcopy(alone)(*given_), whole)
    again = alone.extract(alone.active)  # FP8 scales of full rows are kept twice over
    assert torch.equal(again(*given_), whole)
    alone.freeze()
    assert torch.equal(alone(*given_), whole)
    assert sum(p.numel() for p in alone.parameters()) <= sum(p.numel() for p in policy.parameters())


@torch.no_grad()
@of_both
def test_fitted_quantizers_lose_more_at_fewer_bits(kind: str) -> None:
    policy, space = POLICIES[kind]
    given_ = arguments(policy, 32, 9)

    def answer(name: str) -> torch.Tensor:
        policy.activate(space.parse(name))
        return policy(*given_)

    exact = answer("fp32")
    lost = {name: float((answer(name) - exact).norm() / exact.norm()) for name in ("fp16", "w8a8", "fp8", "w4a4")}
    assert lost["fp16"] < 2e-3 < lost["w8a8"] < 0.05 and lost["w8a8"] < lost["fp8"] < lost["w4a4"] < 0.6, lost


@of_both
def test_order_of_units_changes_nothing_at_full_width_and_keeps_the_most_important_first(kind: str) -> None:
    policy, space = POLICIES[kind]
    ordered = copy.deepcopy(policy)
    given_ = arguments(policy)
    for block in ordered.elastic_blocks():
        order_by_importance(block)
        assert all(torch.equal(order, torch.arange(len(order))) for order in importance_order(block).values())
    for name in ("fp32", "w4a4"):
        subnet = space.parse(name)
        policy.activate(subnet)
        ordered.activate(subnet)
        with torch.no_grad():
            torch.testing.assert_close(ordered(*given_), policy(*given_), rtol=1e-4, atol=1e-5)
    block = ordered.elastic_blocks()[0]
    order = importance_order(block)
    del order["heads"]
    with pytest.raises(ValueError, match="order: expected heads, channels, got channels"):
        apply_order(block, order)


@pytest.mark.parametrize("arithmetic", [Arithmetic.FLOAT, Arithmetic.HALF, Arithmetic.FP8, Arithmetic.INTEGER])
def test_a_layer_without_bias_computes_and_learns_as_one_whose_bias_is_zero(arithmetic: Arithmetic) -> None:
    torch.manual_seed(0)
    without = ElasticLinear(DIM, DIM, bias=False)
    zero = ElasticLinear(DIM, DIM)
    nn.init.zeros_(zero.bias)
    with torch.no_grad():
        for linear in (without, zero):
            linear.weight.copy_(without.weight)
            linear.log_step.fill_(-3.0)
    x = torch.randint(-8, 8, (2, 3, 12)).float()
    scale = None if arithmetic in (Arithmetic.FLOAT, Arithmetic.HALF) else torch.tensor(0.1)
    outputs = [layer.apply_to(x, scale, arithmetic, integer_bits(4, 8), 10, 12) for layer in (without, zero)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(without.weight.grad, zero.weight.grad)
    if arithmetic is Arithmetic.INTEGER:
        torch.testing.assert_close(without.log_step.grad, zero.log_step.grad)
    assert zero.bias.grad is not None and "bias" not in dict(without.named_parameters())


@torch.no_grad()
def test_parameters_that_share_a_tensor_go_on_sharing_it_in_copies_and_parts() -> None:
    class Tied(TinyLlama):
        """With one weight for two layers outside the blocks."""

        def __init__(self, towers: Sizes = ((HEADS, MLP),) * 2, layers: Sizes = ((HEADS, MLP),) * 4) -> None:
            super().__init__(towers, layers)
            self.other = nn.Linear(INPUTS, DIM)
            self.other.weight = self.embedding.weight

        def blueprint(self, kept: Kept) -> Callable[[], Tied]:
            towers, layers = ([s for i, s in kept if (i < self.counts[0]) is tower] for tower in (True, False))
            return lambda: Tied(towers, layers)

    tied, space = calibrated(Tied()), POLICIES["llama"][1]
    for network in (copy.deepcopy(tied), tied.extract(space.smallest()), clone(tied)):
        assert isinstance(network, Tied) and isinstance(tied, Tied)
        assert network.other.weight is network.embedding.weight
        assert torch.equal(network.other.weight, tied.embedding.weight)
    tied.activate(space.smallest())
    assert torch.equal(tied.extract(space.smallest())(*arguments(tied)), tied(*arguments(tied)))


@torch.no_grad()
def test_a_copy_of_a_policy_of_other_types_computes_the_same_bits() -> None:
    policy, space = POLICIES["llama"]
    double = copy.deepcopy(policy).double()
    double.activate(space.largest())
    given_ = tuple(value.double() for value in arguments(policy))
    for network in (copy.deepcopy(double), double.extract(space.largest())):
        assert torch.equal(network(*given_), double(*given_))


def test_codes_of_a_frozen_layer_move_with_it() -> None:
    alone = LLAMA.extract(POLICIES["llama"][1].smallest())
    alone.freeze()
    moved = alone.to("meta")
    frozen = [part for module in moved.elastic_linears().values() for part in module.frozen or ()]
    assert len(frozen) == 2 * len(moved.elastic_linears()) and {part.device.type for part in frozen} == {"meta"}


def redeclared(change: Callable[[PolicyShape], PolicyShape]) -> type[TinyMdt]:
    """The small encoder and decoder, which declares itself otherwise."""

    class Redeclared(TinyMdt):
        @property
        def shape(self) -> PolicyShape:
            return change(super().shape)

    return Redeclared


def last_block(**fields: object) -> Callable[[PolicyShape], PolicyShape]:
    """A change of the last block's declaration."""
    return lambda shape: replace(shape, blocks=(*shape.blocks[:-1], replace(shape.blocks[-1], **fields)))


def last_linear(**fields: object) -> Callable[[PolicyShape], PolicyShape]:
    """A change of the last linear layer of the last block."""

    def changed(shape: PolicyShape) -> PolicyShape:
        linears = shape.blocks[-1].linears
        return last_block(linears=(*linears[:-1], replace(linears[-1], **fields)))(shape)

    return changed


def more_linears(quantized: bool) -> Callable[[PolicyShape], PolicyShape]:
    """A layer that is declared and not there."""
    ghost = LinearShape("ghost", 7, 9, "full", "full", True, "step", TOKENS, quantized)
    return lambda shape: last_block(linears=(*shape.blocks[-1].linears, ghost))(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (last_block(name="decoder.9"), r"decoder\.9: declared as a block, but the policy has no such module"),
        (last_block(name="decoder.0"), r"decoder\.0: declared as two blocks"),
        (last_block(name="head"), "head: declared as a block, but is a Linear, no ElasticBlock"),
        (last_block(head_dim=8), r"decoder\.2: units 'self_heads': 4 channels each, declared with head_dim 8"),
        (lambda shape: replace(shape, blocks=shape.blocks[:-1]), "sizes: expected one for each of 4 .* blocks, got 5"),
        (last_linear(name="norm3"), r"decoder\.2\.fc2: an ElasticLinear that is not declared as a quantized layer"),
        (last_linear(quantized=False, in_slice="full"), r"decoder\.2\.fc2: an ElasticLinear that is not declared"),
        (last_linear(bias=False), r"decoder\.2\.fc2: declared with inputs, outputs and bias \(32, 16, False\), is"),
        (last_linear(in_features=64), r"decoder\.2\.fc2: declared with inputs, outputs and bias \(64, 16, True\), is"),
        (last_linear(in_slice="full"), r"decoder\.2: units 'channels': .* by heads or by mlp, got \['full', 'mlp'\]"),
        (last_linear(in_slice="heads"), r"decoder\.2: units 'channels': .* by heads or by mlp, got \['heads', 'mlp'\]"),
        (more_linears(quantized=True), r"decoder\.2\.ghost: declared as a quantized layer, but is no ElasticLinear"),
        (more_linears(quantized=False), r"decoder\.2\.ghost: declared as a linear layer, but is none"),
    ],
)
def test_blocks_that_are_not_as_declared_are_refused_by_name(
    change: Callable[[PolicyShape], PolicyShape], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        redeclared(change)()


@torch.no_grad()
@of_both
def test_a_copy_is_of_the_same_types_and_use(kind: str) -> None:
    policy, space = POLICIES[kind]
    policy.activate(drawn(space, 3))
    twin = copy.deepcopy(policy)
    assert twin.active == policy.active and not twin.training
    next(twin.parameters()).requires_grad_(False)
    again = copy.deepcopy(twin)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in twin.parameters()]
    assert all(p.requires_grad for p in twin.extract(space.smallest()).parameters())
    half = copy.deepcopy(policy).to(torch.bfloat16)
    assert {p.dtype for p in copy.deepcopy(half).parameters()} == {torch.bfloat16}
    live = copy.deepcopy(policy)
    live.use_batch_ranges(live=True)
    batches = [quantizer.batch for quantizer in copy.deepcopy(live).input_quantizers().values()]
    assert all(batch is not None and batch.live for batch in batches)
    averaged = [quantizer.batch for quantizer in clone(live).input_quantizers().values()]
    assert all(batch is not None and not batch.live for batch in averaged)
    frozen = policy.extract(drawn(space, 3))
    frozen.freeze()
    assert copy.deepcopy(frozen).frozen
    assert torch.equal(copy.deepcopy(frozen)(*arguments(policy)), frozen(*arguments(policy)))
    with pytest.raises(ValueError, match="only a stand-alone network can be frozen; extract the active subnet first"):
        copy.deepcopy(policy).freeze()


def distance_of(policy: ElasticPolicy, space: SearchSpace) -> SubnetDistance:
    """Distance to the policy's own full precision."""
    given_ = arguments(policy, 4, 11)
    policy.activate(space.largest())
    with torch.no_grad():
        target = policy(*given_)[:, 1:].contiguous()
    return SubnetDistance(copy.deepcopy(policy).requires_grad_(False).eval(), given_, target, first=1)


@of_both
def test_distances_are_the_same_in_other_processes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other processes cannot import what lies in the folder of tests by the name that it has here.
    monkeypatch.syspath_prepend(Path(__file__).parent)
    there = importlib.import_module("other_policies")
    _, space = POLICIES[kind]
    distance = distance_of(there.calibrated(there.TinyLlama() if kind == "llama" else there.TinyMdt()), space)
    subnets = [drawn(space, seed) for seed in range(6)]
    here = list(distance(subnets))
    assert distance.distance(space.largest()) == 0.0 and min(here) > 0.0
    with LocalExecutor(2).measuring(distance) as (measure, workers):
        assert workers == 2 and list(measure(subnets)) == here


@of_both
@pytest.mark.parametrize("batch_ranges", [False, True])
def test_a_parcel_holds_networks_that_were_cut_out_or_quantize_by_batch(kind: str, batch_ranges: bool) -> None:
    policy, space = POLICIES[kind]
    used = copy.deepcopy(policy)
    if batch_ranges:
        used.use_batch_ranges()
    alone = used.extract(drawn(space, 1))
    if batch_ranges:
        alone.use_batch_ranges(live=True)  # no range was estimated
    distance = SubnetDistance(alone.eval(), arguments(policy), torch.zeros(3, TOKENS, ACTIONS))
    again = pickle.loads(pickle.dumps(distance.parcel())).unpacked()
    assert all((q.batch is not None) is batch_ranges for q in again.network.input_quantizers().values())
    assert again.distance(alone.active) == distance.distance(alone.active)


@of_both
def test_a_search_finds_networks_of_the_space_within_the_budgets_of_a_device(kind: str, tmp_path: Path) -> None:
    policy, space = POLICIES[kind]
    conditions = Conditions(space, {"orin": cost_tensors(modelled_table(ORIN_NX_16GB, space), space, 1)}, [])
    condition = conditions.between("orin", 0.6)
    cache = DistanceCache(tmp_path, {"test": kind})
    try:
        known = KnownDistances(space, cache, distance_of(policy, space))
        outcome = DeviceSearch(space, condition, known).run(Plan(Genetics(16, 6, 0)))
    finally:
        cache.close()
    assert len(outcome.front) > 1
    for point in outcome.front:
        subnet = space.parse(point.subnet)
        assert condition.fits(subnet)
        for group, members in space.groups.items():
            assert sum(subnet.layers[index] is not None for index in members) in space.depth_choices[group]
