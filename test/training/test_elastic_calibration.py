from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.quant.elastic_calibration import calibrate_inputs, calibrate_weights
from training.quant.fp8 import E4M3_MAX
from training.quant.lsq import lsq_codes, weight_range
from training.quant.quantizer import BITS, code_range
from training.quant.ranges import Method, RangeError
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet

CONFIG = DiffusionPolicyTConfig(depth=2, heads=2, dim=32, ffn_ratio=2, attention_dropout=0.0)
Call = tuple[Tensor, Tensor, Tensor]


def subnet(precision: Precision, w: int = 8, a: int = 8) -> Subnet:
    w, a = (FLOAT_BITS[precision],) * 2 if precision in FLOAT_BITS else (w, a)
    return Subnet((Layer(2, 64, w, a),) * 2, precision)


def calls() -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 16, 2, generator=generator),
            torch.full((8,), level),
            torch.randn(8, 2, 20, generator=generator),
        )
        for level in (0, 50, 99)
    ]


@pytest.fixture
def network() -> ElasticDiffusionPolicyT:
    network = ElasticDiffusionPolicyT(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith("log_step"):
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return network


@torch.no_grad()
def calibrate(network: ElasticDiffusionPolicyT) -> None:
    calibrate_weights(network)
    calibrate_inputs(network, calls())


@torch.no_grad()
def error(network: ElasticDiffusionPolicyT, active: Subnet) -> float:
    """Relative root mean squared distance to the full-precision output, over all calls."""
    outputs = {}
    for which in (subnet(Precision.FP32), active):
        network.activate(which)
        outputs[which] = torch.cat([network(*call) for call in calls()])
    whole, quantized = outputs[subnet(Precision.FP32)], outputs[active]
    return float((quantized - whole).square().mean().sqrt() / whole.square().mean().sqrt())


@torch.no_grad()
def test_a_calibrated_network_is_near_the_full_precision_one_at_every_bit_width(
    network: ElasticDiffusionPolicyT,
) -> None:
    assert error(network, subnet(Precision.INT)) > 0.3  # steps of 1
    calibrate(network)
    errors = {
        name: error(network, subnet(*choice))
        for name, choice in {
            "fp16": (Precision.FP16,),
            "fp8": (Precision.FP8,),
            "w8a8": (Precision.INT, 8, 8),
            "w4a8": (Precision.INT, 4, 8),
            "w8a4": (Precision.INT, 8, 4),
            "w4a4": (Precision.INT, 4, 4),
        }.items()
    }
    assert errors["fp16"] < 2e-3
    assert errors["w8a8"] < 0.03
    assert errors["fp8"] < 0.12
    assert errors["w8a8"] < min(errors["w4a8"], errors["w8a4"]) and max(errors["w4a8"], errors["w8a4"]) < 0.4
    assert errors["w4a4"] < 0.5


@torch.no_grad()
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_row_has_the_step_of_least_error(network: ElasticDiffusionPolicyT, bits: int) -> None:
    calibrate_weights(network)
    low, high = weight_range(bits)

    def squared(weight: Tensor, log_step: Tensor) -> Tensor:
        codes = lsq_codes(weight, log_step[:, None], low, high)
        return (codes * log_step.exp()[:, None] - weight).square().mean(dim=1)

    for name, linear in network.elastic_linears().items():
        chosen = linear.log_step[BITS.index(bits)]
        assert bool(torch.isfinite(chosen).all()), name
        reach = (linear.weight.abs().amax(dim=1) / high).log()
        for other in (chosen - 0.2, chosen + 0.2, reach):
            best = squared(linear.weight, chosen)
            assert float(best.mean()) <= float(squared(linear.weight, other).mean()) * 1.0001, name


@torch.no_grad()
def test_only_steps_and_ranges_change_and_no_hook_stays(network: ElasticDiffusionPolicyT) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    calibrate(network)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert {name.rpartition(".")[2] for name in changed} <= {"log_step", "low", "high", "fp8_scale"}
    assert {name.rpartition(".log_step")[0] for name in changed if name.endswith("log_step")} == (
        network.elastic_linears().keys() | network.input_quantizers().keys()
    )
    assert not any(module._forward_pre_hooks for module in network.modules())


@torch.no_grad()
def test_inputs_after_gelu_get_sixteen_levels_that_lie_mostly_above_zero(network: ElasticDiffusionPolicyT) -> None:
    calibrate(network)
    four, eight = BITS.index(4), BITS.index(8)
    for name, quantizer in network.input_quantizers().items():
        low, high = (values.tolist() for values in (quantizer.low, quantizer.high))
        assert (low[eight], high[eight]) == code_range(8), name
        assert high[four] - low[four] == 15, name
        if name.endswith("fc2_input"):
            assert -3 <= low[four] <= 0, name
        assert low[four] <= 0 <= high[four], name  # zero stays exact
    assert {name.rpartition(".")[2] for name in network.input_quantizers()} == {
        "self_input", "cross_input", "memory_input", "fc1_input", "fc2_input", "output_input"
    }  # fmt: skip


@torch.no_grad()
def test_the_fp8_scale_reaches_the_greatest_input_of_all_calls(network: ElasticDiffusionPolicyT) -> None:
    greatest = 0.0
    network.activate(subnet(Precision.FP32))

    def watch(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal greatest
        greatest = max(greatest, float(args[0].abs().max()))

    quantizer = network.elastic_blocks()[1].fc1_input
    handle = quantizer.register_forward_pre_hook(watch)
    for call in calls():
        network(*call)
    handle.remove()
    calibrate_inputs(network, calls())
    assert math.isclose(float(quantizer.fp8_scale), greatest / E4M3_MAX, rel_tol=1e-6)


@torch.no_grad()
def test_observations_that_are_not_numbers_are_refused_and_no_hook_stays(network: ElasticDiffusionPolicyT) -> None:
    noisy, timesteps, observation = calls()[0]
    with pytest.raises(RangeError, match="NaN or infinity"):
        calibrate_inputs(network, [(noisy, timesteps, observation * math.nan)])
    assert not any(module._forward_pre_hooks for module in network.modules())


@torch.no_grad()
def test_ranges_come_from_the_method_that_is_asked_for_and_from_least_squared_error_otherwise(
    network: ElasticDiffusionPolicyT,
) -> None:
    network.activate(subnet(Precision.FP32))
    seen: dict[str, list[Tensor]] = {name: [] for name in network.input_quantizers()}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten()))
        for name, module in network.input_quantizers().items()
    ]
    for call in calls():
        network(*call)
    for handle in handles:
        handle.remove()
    steps: dict[Method | None, dict[str, Tensor]] = {}
    methods: tuple[Method | None, ...] = (None, "mse", "min_max", "percentile")
    for method in methods:
        given = () if method is None else (method,)
        calibrate_weights(network, *given)
        calibrate_inputs(network, calls(), *given)
        steps[method] = {name: p.detach().exp() for name, p in network.named_parameters() if name.endswith("log_step")}
    assert all(torch.equal(steps[None][name], step) for name, step in steps["mse"].items())
    for name, linear in network.elastic_linears().items():
        full = linear.weight.abs().amax(1)[None] / torch.tensor([[code_range(bits)[1]] for bits in BITS])
        for method in ("min_max", "percentile"):
            torch.testing.assert_close(steps[method][f"{name}.log_step"].reshape(full.shape), full)
        assert (steps["mse"][f"{name}.log_step"].reshape(full.shape) < 0.9 * full).any()
    for name, values in seen.items():
        top, width = torch.cat(values).abs().amax(), len(torch.cat(values))
        whole, most = (steps[method][f"{name}.log_step"][BITS.index(8)] for method in ("min_max", "percentile"))
        assert float(whole) == pytest.approx(float(top) / 127, rel=1e-5)
        assert float(most) <= float(whole) and width > 1000
    assert any((steps["percentile"][f"{n}.log_step"] < steps["min_max"][f"{n}.log_step"]).all() for n in seen)
