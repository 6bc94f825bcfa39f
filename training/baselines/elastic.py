"""From a subnet of a trained supernet to plain linears: what fixed-bit training and BatchQuant supernets end in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.baselines.bits import BaselineError, Bits
from training.baselines.calibration import Calibration
from training.baselines.network import PlainLinear, plain_copy, plain_linears
from training.baselines.parts import Part, PerTensor, PerTensorFp8
from training.nn.elastic import ElasticLinear, InputQuantizer
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.quant.lsq import lsq_codes, weight_range
from training.quant.quantizer import BITS, code_range
from training.subnet import Precision
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.trained import TrainedPolicy
from training.warm_start import policy_beside, read_policy_weights, state_sha256

SAME_SAMPLES = 8
SAME_TOLERANCE = 1e-3  # of predicted noise, for sums in another order

QUANTIZERS = {
    "self_attn.q": "self_input",
    "self_attn.k": "self_input",
    "self_attn.v": "self_input",
    "self_attn.o": "self_attn.output_input",
    "cross_attn.q": "cross_input",
    "cross_attn.k": "memory_input",
    "cross_attn.v": "memory_input",
    "cross_attn.o": "cross_attn.output_input",
    "fc1": "fc1_input",
    "fc2": "fc2_input",
}
"""The input quantizer of every linear of a block."""


def trained_supernet(
    method: str, trained: Path | None, policy: TrainedPolicy, calibration: Calibration
) -> TrainedSupernet:
    """The run that a method needs, of the same teacher as ``policy`` and the same data as ``calibration``.

    Raises:
        BaselineError: none was given, or it is of another teacher, other data or another architecture.
        CheckpointError: it cannot be read.
    """
    if trained is None:
        raise BaselineError(f"{method}: trained: it trains; give a run of its own (docs/baselines.md)")
    supernet = load_supernet(Path(trained), batch_ranges=True)
    if supernet.meaning.config.policy != policy.config.policy:
        raise BaselineError(f"{method}: {supernet.path} is of another architecture than {policy.path}")
    if not same_teacher(supernet, policy):
        raise BaselineError(f"{method}: {supernet.path} was trained with another teacher than {policy.path}")
    if supernet.meaning.data_sha256 not in (None, calibration.data_sha256):  # a bundle's policy may not tell its own
        raise BaselineError(f"{method}: {supernet.path} was trained on other data than {policy.path}")
    return supernet


@torch.no_grad()
def same_teacher(supernet: TrainedSupernet, policy: TrainedPolicy) -> bool:
    """Whether a supernet was trained from ``policy``, or from a bundle that computes the same.

    A bundle's graphs hold sums of biases and positions, so its weights are others and its function is the same.

    Raises:
        UserError: the supernet's teacher is another one and cannot be read.
    """
    if supernet.teacher_sha256 in (None, state_sha256(policy.network.state_dict())):
        return True
    config = supernet.meaning.config
    assert config.supernet is not None
    weights = read_policy_weights(policy_beside(supernet.path, config.supernet.warm_start), config.policy)
    if weights.sha256 != supernet.teacher_sha256:
        return False
    teacher = DiffusionPolicyT(config.policy)
    teacher.load_state_dict(weights.state)
    generator = torch.Generator().manual_seed(0)
    sizes = config.policy
    noisy = torch.randn(SAME_SAMPLES, sizes.horizon, sizes.noisy_dim, generator=generator)
    observation = torch.rand(SAME_SAMPLES, sizes.observation_horizon, sizes.input_dim, generator=generator) * 2.0 - 1.0
    timesteps = torch.linspace(0, config.diffusion.train_timesteps - 1, SAME_SAMPLES).long()
    one, other = (network(noisy, timesteps, observation) for network in (teacher.eval(), policy.network))
    return torch.allclose(one, other, atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE)


def integer_widths(method: str, bits: Bits) -> None:
    """Refuse bits that no supernet is trained in.

    Raises:
        BaselineError: neither FP8 nor 4 or 8 bits.
    """
    if not bits.fp8 and not {bits.weights, bits.activations} <= set(BITS):
        raise BaselineError(f"{method}: bits {bits}: it trains 4 and 8 bits of both and FP8; expected such as w4a4")


def extracted(supernet: TrainedSupernet, name: str) -> ElasticDiffusionPolicyT:
    """The stand-alone network of the full-size subnet ``name``.

    Raises:
        SpaceError: the name is not one of the space.
        BaselineError: it is narrower or shallower than the policy, or of a floating-point precision.
    """
    subnet, network = supernet.subnet(name)
    config = supernet.meaning.config.policy
    full = (config.heads, config.ffn_ratio * config.dim)
    if any(layer is None or (layer.heads, layer.mlp) != full for layer in subnet.layers):
        raise BaselineError(f"subnet {name}: is not of full size; baselines are networks of the policy's own size")
    if subnet.precision not in (Precision.INT, Precision.FP8):
        raise BaselineError(f"subnet {name}: computes in {subnet.precision}; expected integers or fp8")
    return network


@torch.no_grad()
def plain_from_elastic(alone: ElasticDiffusionPolicyT) -> DiffusionPolicyT:
    """Plain linears that compute what a stand-alone, full-size subnet computes.

    Under BatchQuant its ranges have to be estimated.
    """
    network = DiffusionPolicyT(alone.config)
    network.load_state_dict(alone.state_dict(), strict=False)  # codes and quantizers are set below
    plain = plain_copy(network)
    linears = plain_linears(plain)
    fp8 = alone.active.precision is Precision.FP8
    blocks = alone.elastic_blocks()
    for index, layer in enumerate(alone.active.layers):
        assert layer is not None
        for path, source in QUANTIZERS.items():
            elastic, quantizer = blocks[index].get_submodule(path), blocks[index].get_submodule(source)
            assert isinstance(elastic, ElasticLinear)
            assert isinstance(quantizer, InputQuantizer)
            linear = linears[f"blocks.{index}.{path}"]
            if fp8:
                _take_fp8(linear, elastic)
                linear.activation = PerTensorFp8(quantizer.fp8_scale)
            else:
                _take_codes(linear, elastic, layer.w)
                linear.activation = _activation(quantizer, layer.a)
    return plain


def _take_codes(linear: PlainLinear, elastic: ElasticLinear, bits: int) -> None:
    log_step = elastic.log_step[BITS.index(bits)]
    low, high = weight_range(bits)
    codes = lsq_codes(elastic.weight, log_step[:, None], low, high)
    linear.set_codes(codes, torch.exp(log_step), torch.full((len(codes),), bits))


def _take_fp8(linear: PlainLinear, elastic: ElasticLinear) -> None:
    linear.quantize_weight_fp8()
    steps = elastic.fp8_row_steps(elastic.out_features)
    assert torch.allclose(linear.weight_scale, steps)  # the full row's scale is that of the row


def _activation(quantizer: InputQuantizer, bits: int) -> Part:
    place = BITS.index(bits)
    if quantizer.batch is None:
        step: Tensor = quantizer.log_step[place].exp()
        return PerTensor(bits, step, quantizer.low[place], quantizer.high[place])
    codes = quantizer.batch.quantize(torch.zeros(1), bits)
    low, high = code_range(bits)
    return PerTensor(bits, codes.step, torch.tensor(float(low)), torch.tensor(float(high)), codes.offset)
