from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.importance import Scores, l1_scores, order_by_importance, taylor_scores
from training.nn.elastic import ElasticAttention, ElasticDecoderBlock
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet

CONFIG = DiffusionPolicyTConfig(depth=2, heads=4, dim=32, ffn_ratio=2, attention_dropout=0.0)
BOTH = pytest.mark.parametrize("scores", [l1_scores, taylor_scores])
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(batch: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(batch, CONFIG.horizon, 2, generator=generator)
    return noisy, torch.randint(100, (batch,), generator=generator), torch.randn(batch, 2, 20, generator=generator)


@pytest.fixture
def network() -> ElasticDiffusionPolicyT:
    """Random weights, scaled so that importance differs between heads and between channels; gradients of a loss."""
    network = ElasticDiffusionPolicyT(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("log_step"):
                parameter.sub_(3.0)
        for block in network.elastic_blocks():
            for attention in (block.self_attn, block.cross_attn):
                size = torch.rand(4, generator=generator) + 0.2
                attention.o.weight.mul_(size.repeat_interleave(attention.head_dim))
            block.fc1.weight.mul_(torch.rand(64, 1, generator=generator) + 0.1)
    network(*inputs()).square().mean().backward()
    return network


def copy_gradients(network: ElasticDiffusionPolicyT, twin: ElasticDiffusionPolicyT) -> None:
    for mine, other in zip(network.parameters(), twin.parameters(), strict=True):
        other.grad = None if mine.grad is None else mine.grad.clone()


def subnet(heads: int, mlp: int, precision: Precision, w: int = 8, a: int = 8) -> Subnet:
    w, a = (FLOAT_BITS[precision],) * 2 if precision in FLOAT_BITS else (w, a)
    return Subnet((Layer(heads, mlp, w, a),) * 2, precision)


def head_scores(attention: ElasticAttention, scores: Scores) -> Tensor:
    rows = sum((scores(m.weight).sum(1) for m in (attention.q, attention.k, attention.v)), torch.zeros(32))
    return (rows + scores(attention.o.weight).sum(0)).unflatten(0, (-1, attention.head_dim)).sum(1)


def channel_scores(block: ElasticDecoderBlock, scores: Scores) -> Tensor:
    return scores(block.fc1.weight).sum(1) + scores(block.fc2.weight).sum(0)


def permute_gradients(network: ElasticDiffusionPolicyT) -> None:
    """Gradients of the permuted weights: those of the same loss computed again."""
    network.zero_grad()
    network(*inputs()).square().mean().backward()


@BOTH
@pytest.mark.parametrize(
    ("precision", "w", "a"),
    [
        (Precision.FP32, 8, 8),
        (Precision.FP16, 8, 8),
        (Precision.FP8, 8, 8),
        (Precision.INT, 8, 8),
        (Precision.INT, 4, 4),
    ],
)
@torch.no_grad()
def test_ordering_leaves_the_full_width_network_unchanged(
    network: ElasticDiffusionPolicyT, scores: Scores, precision: Precision, w: int, a: int
) -> None:
    network.activate(subnet(4, 64, precision, w, a))
    before = network(*inputs())
    unordered = {name: value.clone() for name, value in network.state_dict().items()}
    for block in network.elastic_blocks():
        order_by_importance(block, scores)
    assert not torch.equal(network.state_dict()["blocks.0.fc1.weight"], unordered["blocks.0.fc1.weight"])
    torch.testing.assert_close(network(*inputs()), before, rtol=1e-5, atol=1e-5)


@BOTH
def test_the_most_important_come_first(network: ElasticDiffusionPolicyT, scores: Scores) -> None:
    blocks = network.elastic_blocks()
    channels = [channel_scores(block, scores) for block in blocks]
    heads = [head_scores(a, scores) for block in blocks for a in (block.self_attn, block.cross_attn)]
    assert any(not torch.equal(values, values.sort(descending=True).values) for values in [*channels, *heads])
    for block in blocks:
        order_by_importance(block, scores)
    permute_gradients(network)
    after = [channel_scores(block, scores) for block in blocks]
    after += [head_scores(a, scores) for block in blocks for a in (block.self_attn, block.cross_attn)]
    for ordered, values in zip(after, [*channels, *heads], strict=True):
        torch.testing.assert_close(ordered, values.sort(descending=True).values, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_the_order_of_an_ordered_block_stays(network: ElasticDiffusionPolicyT) -> None:
    block = network.elastic_blocks()[0]
    order_by_importance(block)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    order_by_importance(block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@torch.no_grad()
def test_a_narrow_network_loses_less_with_the_most_important_than_with_the_least(
    network: ElasticDiffusionPolicyT,
) -> None:
    whole, narrow = subnet(4, 64, Precision.FP32), subnet(2, 32, Precision.FP32)
    network.activate(whole)
    full = network(*inputs())
    errors = []
    for scores in (taylor_scores, lambda parameter: -taylor_scores(parameter)):
        twin = ElasticDiffusionPolicyT(CONFIG).eval()
        twin.load_state_dict(network.state_dict())
        copy_gradients(network, twin)
        for block in twin.elastic_blocks():
            order_by_importance(block, scores)
        twin.activate(narrow)
        errors.append(float((twin(*inputs()) - full).square().mean()))
    assert errors[0] < errors[1]


def test_taylor_importance_asks_for_gradients(network: ElasticDiffusionPolicyT) -> None:
    network.zero_grad(set_to_none=True)
    with pytest.raises(ValueError, match="run the loss backward"):
        order_by_importance(network.elastic_blocks()[0], taylor_scores)
