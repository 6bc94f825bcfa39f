from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from training.draws import stratified_subnet
from training.nn.elastic_policy import clone
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig, parameter_count
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.quant.elastic_calibration import calibrate_inputs, calibrate_weights
from training.quant.quantizer import BITS
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.space_counts import parameters
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet

TINY = DiffusionPolicyTConfig(depth=3, heads=4, dim=32, ffn_ratio=2, attention_dropout=0.1)
SPACE_CONFIG = SpaceConfig(
    min_depth={"decoder": 1}, head_ratios=(0.25, 0.5, 0.75, 1.0), mlp_ratios=(0.25, 0.5, 0.75, 1.0)
)
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(config: DiffusionPolicyTConfig = TINY, batch: int = 3, tokens: int = 16, seed: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(batch, tokens, config.action_dim, generator=generator)
    timesteps = torch.randint(100, (batch,), generator=generator)
    return noisy, timesteps, torch.randn(batch, 2, config.observation_dim, generator=generator)


@torch.no_grad()
def calibrated(config: DiffusionPolicyTConfig) -> ElasticDiffusionPolicyT:
    """A supernet with random weights of visible size and fitted quantizers."""
    network = ElasticDiffusionPolicyT(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if not name.endswith("log_step"):
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) / config.dim**0.5)
    calibrate_weights(network)
    calibrate_inputs(network, [inputs(config, 4)])
    return network


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as these only lose time on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SUPERNET = calibrated(TINY)
SPACE = SearchSpace(SUPERNET.shape, SPACE_CONFIG)
LARGEST = SPACE.largest()


@st.composite
def subnets(draw: st.DrawFn, space: SearchSpace = SPACE) -> Subnet:
    """Any subnet: every precision, bits and widths of their own in every layer, blocks skipped."""
    precision = draw(st.sampled_from(space.precisions))
    layers: list[Layer | None] = []
    for heads, mlp in zip(space.head_choices, space.mlp_choices, strict=True):
        if precision in FLOAT_BITS:
            w = a = FLOAT_BITS[precision]
        else:
            w, a = draw(st.sampled_from(space.weight_bits)), draw(st.sampled_from(space.activation_bits))
        layer = Layer(draw(st.sampled_from(heads)), draw(st.sampled_from(mlp)), w, a)
        layers.append(draw(st.sampled_from([layer, layer, None])))
    if not any(layers):
        layers[0] = layer
    return Subnet(tuple(layers), precision)


def parts(network: ElasticDiffusionPolicyT, noisy: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
    """The network as the robot runs it: keys and values ahead, then a denoising step."""
    return network.denoise(noisy, network.timestep_keys_values(timestep), network.observation_keys_values(observation))


def assert_extracted_is_the_same(network: ElasticDiffusionPolicyT, subnet: Subnet, arguments: Inputs) -> None:
    noisy, timesteps, observation = arguments
    alone = network.extract(subnet)
    network.activate(subnet)
    whole, stepwise = network(*arguments), parts(network, noisy, timesteps[:1], observation)
    for _ in range(2):
        assert torch.equal(alone(*arguments), whole)
        assert torch.equal(parts(alone, noisy, timesteps[:1], observation), stepwise)
        alone.freeze()  # in the second round


# Extraction ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@settings(deadline=None, max_examples=60)
@given(subnet=subnets(), batch=st.sampled_from([1, 2, 5]), tokens=st.sampled_from([1, 9, 16]), seed=st.integers(0, 99))
def test_an_extracted_network_gives_the_bits_of_the_supernet_with_it_active(
    subnet: Subnet, batch: int, tokens: int, seed: int
) -> None:
    assert_extracted_is_the_same(SUPERNET, subnet, inputs(batch=batch, tokens=tokens, seed=seed))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 9, 16])
def test_the_parts_that_the_robot_runs_compose_to_the_whole_network(tokens: int) -> None:
    subnet = Subnet((Layer(2, 16, 32, 32), None, Layer(3, 64, 32, 32)), Precision.FP32)
    noisy, timesteps, observation = inputs(batch=4)
    for network in (SUPERNET, SUPERNET.extract(subnet)):
        network.activate(subnet if network is SUPERNET else network.active)
        whole = network(noisy, timesteps[:1].expand(4), observation)
        stepwise = parts(network, noisy[:, :tokens], timesteps[:1], observation)
        torch.testing.assert_close(stepwise, whole[:, :tokens], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_published_network_extracts_bit_for_bit_too() -> None:
    network = calibrated(DiffusionPolicyTConfig(depth=4))  # matrix products of full size, half the depth
    space = SearchSpace(network.shape, SPACE_CONFIG)
    generator = torch.Generator().manual_seed(3)
    for precision in space.precisions:
        drawn = stratified_subnet(space, generator, whole_network=False)
        if precision is not Precision.INT:
            bits = FLOAT_BITS[precision]
            layers = (None if layer is None else Layer(layer.heads, layer.mlp, bits, bits) for layer in drawn.layers)
            drawn = Subnet(tuple(layers), precision)
        assert_extracted_is_the_same(network, drawn, inputs(network.config, batch=2, tokens=9))


@torch.no_grad()
@settings(deadline=None, max_examples=20)
@given(subnet=subnets())
def test_an_extracted_network_holds_what_the_subnet_counts_and_shares_nothing(subnet: Subnet) -> None:
    alone = SUPERNET.extract(subnet)
    steps = sum(value.numel() for name, value in alone.named_parameters() if name.endswith("log_step"))
    assert parameter_count(alone) - steps == parameters(SPACE.shape, subnet)
    mine = {value.untyped_storage().data_ptr() for value in SUPERNET.state_dict().values()}
    assert not mine & {value.untyped_storage().data_ptr() for value in alone.state_dict().values()}


@torch.no_grad()
def test_a_network_extracted_from_an_extracted_one_is_the_same() -> None:
    wide = Subnet((Layer(3, 48, 8, 8), None, Layer(4, 64, 8, 8)), Precision.FP8)
    narrow = Subnet((Layer(1, 16, 8, 8), None, Layer(2, 32, 8, 8)), Precision.FP8)
    twice = SUPERNET.extract(wide).extract(Subnet((narrow.layers[0], narrow.layers[2]), Precision.FP8))
    SUPERNET.activate(narrow)
    assert torch.equal(twice(*inputs()), SUPERNET(*inputs()))


@torch.no_grad()
def test_an_extracted_network_can_be_stored_and_copied() -> None:
    subnet = Subnet((Layer(2, 16, 8, 8), None, Layer(4, 48, 8, 8)), Precision.FP8)
    alone = SUPERNET.extract(subnet)
    expected = alone(*inputs())
    for twin in (copy.deepcopy(alone), clone(alone)):
        assert torch.equal(twin(*inputs()), expected)


@torch.no_grad()
@pytest.mark.parametrize("w", BITS)
@pytest.mark.parametrize("a", BITS)
def test_frozen_weights_are_integers_of_their_bit_width(w: int, a: int) -> None:
    alone = SUPERNET.extract(Subnet((Layer(3, 48, w, a), None, Layer(4, 64, w, a)), Precision.INT))
    inputs_of_products: dict[str, Tensor] = {}
    for name, quantizer in alone.input_quantizers().items():
        quantizer.register_forward_hook(lambda _m, _i, out, name=name: inputs_of_products.update({name: out[0]}))
    alone.freeze()
    alone(*inputs())
    for name, linear in alone.elastic_linears().items():
        assert linear.frozen is not None, name
        codes, _ = linear.frozen
        assert codes.dtype == torch.int8 and codes.shape == linear.weight.t().shape
        assert max(len(row.unique()) for row in codes.t()) <= 2**w - 1, name
        assert int(codes.abs().max()) <= 2 ** (w - 1) - 1, name
    assert inputs_of_products.keys() == alone.input_quantizers().keys()
    for name, codes in inputs_of_products.items():
        assert torch.equal(codes, codes.to(torch.int8).float()), name
        assert len(codes.unique()) <= 2**a, name


@torch.no_grad()
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.FP8])
def test_freezing_leaves_other_precisions_alone(precision: Precision) -> None:
    bits = FLOAT_BITS[precision]
    alone = SUPERNET.extract(Subnet((Layer(4, 64, bits, bits),) * 3, precision))
    alone.freeze()
    assert all(linear.frozen is None for linear in alone.elastic_linears().values())


# The whole network ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_full_width_supernet_is_the_plain_policy_bit_for_bit() -> None:
    plain = DiffusionPolicyT(TINY).eval()
    state = SUPERNET.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    SUPERNET.activate(LARGEST)
    for batch, tokens in ((1, 16), (4, 9), (64, 16)):
        noisy, timesteps, observation = inputs(batch=batch, tokens=tokens)
        assert torch.equal(SUPERNET(noisy, timesteps, observation), plain(noisy, timesteps, observation))
        kv = plain.timestep_keys_values(timesteps[:1]), plain.observation_keys_values(observation)
        torch.testing.assert_close(
            parts(SUPERNET, noisy, timesteps[:1], observation), plain.denoise(noisy, *kv), rtol=1e-6, atol=1e-6
        )


def test_at_full_width_it_trains_as_the_plain_policy_does() -> None:
    plain, elastic = DiffusionPolicyT(TINY).train(), copy.deepcopy(SUPERNET).train()
    state = elastic.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    elastic.activate(LARGEST)
    losses = []
    for network in (plain, elastic):
        torch.manual_seed(5)  # dropout
        loss = network(*inputs()).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    elastic_parameters = dict(elastic.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(elastic_parameters[name].grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert all(p.grad is None for name, p in elastic_parameters.items() if name.endswith("log_step"))


def test_its_parameters_are_those_of_the_plain_policy_and_quantizer_steps() -> None:
    plain = dict(DiffusionPolicyT(TINY).named_parameters())
    elastic = dict(SUPERNET.named_parameters())
    assert {name for name in elastic if not name.endswith("log_step")} == plain.keys()
    assert all(elastic[name].shape == value.shape for name, value in plain.items())
    assert SUPERNET.shape.blocks[0].heads == 4


# Activation ----------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Records every tensor operation with the storages it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        read, written = ([t for t in leaves(tree) if isinstance(t, Tensor)] for tree in (args, result))
        self.calls.append((str(func), read, written))
        return result


@torch.no_grad()
def test_activation_runs_no_tensor_operation_and_moves_no_parameter() -> None:
    network = copy.deepcopy(SUPERNET)
    places = {name: value.data_ptr() for name, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    drawn = [stratified_subnet(SPACE, generator) for _ in range(50)]
    for subnet in drawn:  # selectors of the four pairs of bit widths, a few numbers each, are made at first use
        network.activate(subnet)
    with Operations() as operations:
        for subnet in drawn:
            network.activate(subnet)
    assert operations.calls == []
    network(*inputs())
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == places


@torch.no_grad()
def test_the_selectors_that_activation_makes_are_a_few_numbers() -> None:
    network = copy.deepcopy(SUPERNET)
    with Operations() as operations:
        network.activate(SPACE.parse("w4a4"))
        network.activate(SPACE.parse("w8a4"))
    assert operations.calls
    assert max(t.numel() for _, _, written in operations.calls for t in written) <= len(BITS) ** 2


@torch.no_grad()
def test_float_products_read_views_of_the_parameters() -> None:
    network = SUPERNET
    network.activate(SPACE.parse("d2-h.5-m1-fp32"))
    weights = {
        value.untyped_storage().data_ptr() for name, value in network.named_parameters() if name.endswith("weight")
    }
    with Operations() as operations:
        network(*inputs())
    products = [read for name, read, _ in operations.calls if name.startswith(("aten.addmm", "aten.mm"))]
    assert len(products) >= 2 * 10  # ten linears in each of two blocks, and those outside
    for read in products:
        assert any(t.untyped_storage().data_ptr() in weights for t in read)


def test_the_active_subnet_decides_which_parameters_learn() -> None:
    network = copy.deepcopy(SUPERNET).train()
    network.activate(Subnet((Layer(2, 32, 4, 8), None, Layer(1, 16, 8, 4)), Precision.INT))
    network(*inputs()).square().mean().backward()
    first, skipped, last = network.elastic_blocks()
    assert all(parameter.grad is None for parameter in skipped.parameters())
    for block, heads, mlp, used in ((first, 2, 32, BITS.index(4)), (last, 1, 16, BITS.index(8))):
        rows = heads * 8
        for weight in (block.self_attn.q.weight, block.cross_attn.v.weight):
            assert bool(weight.grad[:rows].any()) and not bool(weight.grad[rows:].any())
        assert bool(block.fc2.weight.grad[:, :mlp].any()) and not bool(block.fc2.weight.grad[:, mlp:].any())
        assert bool(block.fc1.log_step.grad[used, :mlp].any()) and not bool(block.fc1.log_step.grad[1 - used].any())
    assert [float(g) != 0.0 for g in first.fc2_input.log_step.grad] == [False, True]
    assert [float(g) != 0.0 for g in last.fc2_input.log_step.grad] == [True, False]


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (Subnet((Layer(4, 64, 8, 8),) * 2, Precision.INT), "2 layers, expected 3"),
        (Subnet((Layer(5, 64, 8, 8),) * 3, Precision.INT), "layer 0: .* does not fit into 4 heads and 64"),
        (Subnet((None, None, Layer(4, 65, 8, 8)), Precision.INT), "layer 2: .* does not fit"),
        (Subnet((Layer(0, 64, 8, 8),) * 3, Precision.INT), "does not fit"),
        (Subnet((Layer(4, 64, 3, 8),) * 3, Precision.INT), "w3a8: .* one of"),
    ],
)
def test_a_subnet_that_is_none_of_this_network_is_refused_and_the_active_one_stays(
    subnet: Subnet, message: str
) -> None:
    SUPERNET.activate(LARGEST)
    with pytest.raises(ValueError, match=message):
        SUPERNET.activate(subnet)
    assert SUPERNET.active == LARGEST
    with torch.no_grad():
        assert SUPERNET(*inputs()).shape == (3, 16, 2)


@torch.no_grad()
def test_a_copy_has_weights_of_its_own_and_runs_the_same_subnet() -> None:
    active = Subnet((Layer(2, 16, 4, 4), None, Layer(3, 48, 8, 4)), Precision.INT)
    SUPERNET.activate(active)
    twin = clone(SUPERNET)
    assert twin.active == active and not twin.training
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert torch.equal(twin(*inputs()), SUPERNET(*inputs()))
    twin.blocks[0].fc1.weight.zero_()
    assert bool(SUPERNET.blocks[0].fc1.weight.any())
