"""QVLA: sensitivities against their definition, budget, store, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from test.training.baselines.allocation_policy import calibrated_policy
from training.baselines import BASELINES, BaselineError, Bits
from training.baselines.allocation import CHANNEL_BITS
from training.baselines.allocation_chunks import CalibrationSampler
from training.baselines.calibration import Calibration
from training.baselines.network import linear_names, plain_linears, weight_codes
from training.baselines.qvla import Qvla
from training.baselines.qvla_sensitivity import LOW_BITS, direct_sensitivity, proxy_sensitivity, weight_errors
from training.trained import TrainedPolicy

Case = tuple[TrainedPolicy, Calibration]
LAYERS = ("blocks.0.self_attn.v", "blocks.1.cross_attn.k", "blocks.1.fc2")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A policy and its calibration."""
    return calibrated_policy(tmp_path_factory.mktemp("qvla"))


@pytest.mark.parametrize(("sampler", "prefix"), [("ddim", 0), ("ddpm", 0), ("ddim", 3)])
def test_chunks_with_gradients_are_those_of_the_robots_loop(tmp_path: Path, sampler: str, prefix: int) -> None:
    policy, calibration = calibrated_policy(tmp_path, sampler, prefix)
    chunks = CalibrationSampler(policy, calibration)
    torch.testing.assert_close(chunks(policy.network, torch.arange(8)), chunks.reference, rtol=0, atol=1e-5)
    assert chunks.error(policy.network) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_direct_sensitivity_is_that_of_a_network_with_one_channel_quantized(case: Case, name: str) -> None:
    policy, calibration = case
    chunks = CalibrationSampler(policy, calibration)
    found = direct_sensitivity(policy, calibration, name, [3, 7], together=24)
    assert found.shape == (2, len(CHANNEL_BITS)) and (found[:, 0] == 0).all()
    for row, channel in enumerate((3, 7)):
        for bits in LOW_BITS:
            network = copy.deepcopy(policy.network)
            weight = network.get_submodule(name).weight
            codes, scale = weight_codes(weight, torch.full((len(weight),), bits))
            weight[channel] = codes[channel] * scale[channel]
            off = chunks(network, torch.arange(8)) - chunks(policy.network, torch.arange(8))
            expected = float(off.square().sum((1, 2)).mean())
            assert found[row, CHANNEL_BITS.index(bits)] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_proxy_multiplies_the_norms_of_jacobian_and_output_error(case: Case) -> None:
    policy, calibration = case
    name, channel, rows = "blocks.1.fc1", 5, torch.tensor([2])
    linear = policy.network.get_submodule(name)
    leaves: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def add(_module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inputs.append(arguments[0].detach())
        leaves.append(torch.zeros_like(output, requires_grad=True))
        return output + leaves[-1]

    handle = linear.register_forward_hook(add)
    chunk = CalibrationSampler(policy, calibration)(policy.network, rows)
    handle.remove()
    square = 0.0
    for value in chunk.flatten():
        gradients = torch.autograd.grad(value, leaves, retain_graph=True)
        square += sum(float(gradient[..., channel].square().sum()) for gradient in gradients)
    off = torch.cat(inputs, dim=1)[0] @ weight_errors(linear)[:, channel].t()
    expected = np.sqrt(square) * off.norm(dim=0).numpy()

    one = Calibration(
        tuple(type(c)(c.noisy[rows], c.timesteps[rows], c.observation[rows]) for c in calibration.calls),
        *(tensor[rows] for tensor in (calibration.observation, calibration.noise, calibration.chunk)),
        calibration.first,
        calibration.data_sha256,
        calibration.seed,
    )
    plain = proxy_sensitivity(policy, one, probes=100)[name][channel, 1:]
    np.testing.assert_allclose(plain, expected, rtol=0.25)  # 100 probes
    plain, squared = (proxy_sensitivity(policy, one, probes=2, squared=s)[name] for s in (False, True))
    np.testing.assert_allclose(squared, np.square(plain), rtol=1e-4)


def test_the_proxy_ranks_channels_as_the_direct_sensitivity_does(case: Case) -> None:
    policy, calibration = case
    proxy = proxy_sensitivity(policy, calibration, probes=8)
    name = "blocks.1.fc2"
    ranks = [np.argsort(np.argsort(s[:, 2])) for s in (proxy[name], direct_sensitivity(policy, calibration, name))]
    assert np.corrcoef(*ranks)[0, 1] > 0.5


@pytest.mark.parametrize("sensitivity", ["proxy", "squared_proxy", "direct"])
def test_the_mean_over_all_weights_keeps_within_the_budget(case: Case, sensitivity: str) -> None:
    policy, calibration = case
    options = {"observations": 1} if sensitivity == "direct" else {"probes": 1}
    before = copy.deepcopy(policy.network.state_dict())
    made = Qvla().quantize(policy, Bits(4, 4), calibration, sensitivity=sensitivity, progress=False, **options)
    assert 3.9 < made.report["mean_weight_bits"] <= 4.0
    linears = plain_linears(made.network)
    assert sum(made.report["channels"].values()) == sum(linear.out_features for linear in linears.values())
    assert tuple(linears) and set(linears) == set(linear_names(policy.network))
    assert made.report["label"] == "QVLA weights + RTN activations"
    assert made.report["action_error"] > 0
    for name, value in policy.network.state_dict().items():
        assert torch.equal(value, before[name]), "the policy is left as it is"
    call = calibration.calls[0]
    assert made.network(call.noisy, call.timesteps, call.observation).isfinite().all()


def test_no_budget_leaves_every_weight_in_floating_point(case: Case) -> None:
    policy, calibration = case
    made = Qvla().quantize(policy, Bits(16, 16), calibration, probes=1, progress=False)
    assert made.report["channels"]["16"] == sum(made.report["channels"].values())
    call = calibration.calls[0]
    arguments = (call.noisy, call.timesteps, call.observation)
    torch.testing.assert_close(made.network(*arguments), policy.network(*arguments), rtol=0, atol=2e-2)  # float16


def test_a_direct_sensitivity_goes_on_where_it_was_interrupted(case: Case, tmp_path: Path) -> None:
    policy, calibration = case
    store = tmp_path / "sensitivity.npz"
    options: dict[str, Any] = {"sensitivity": "direct", "observations": 1, "store": store, "progress": False}
    whole = Qvla().quantize(policy, Bits(4, 16), calibration, **options)
    with np.load(store) as stored:
        arrays = {name: stored[name] for name in stored.files}
    removed = [name for name in arrays if name.startswith("blocks.1.fc")]
    np.savez(store, **{name: value for name, value in arrays.items() if name not in removed})
    again = Qvla().quantize(policy, Bits(4, 16), calibration, **options)
    assert again.report["weight_bits"] == whole.report["weight_bits"]
    assert 0 < again.report["policy_calls"] < whole.report["policy_calls"]
    with pytest.raises(BaselineError, match="another observations"):
        Qvla().quantize(policy, Bits(4, 16), calibration, **{**options, "observations": 2})
    store.write_bytes(store.read_bytes()[:100])
    with pytest.raises(BaselineError, match=r"sensitivity\.npz: no file of sensitivities"):
        Qvla().quantize(policy, Bits(4, 16), calibration, **options)


@pytest.mark.parametrize(
    ("bits", "options", "named"),
    [
        (Bits(8, 8, fp8=True), {}, "fp8"),
        (Bits(4, 4), {"sensitivity": "guess"}, "sensitivity"),
        (Bits(4, 4), {"observations": 4}, "observations"),
        (Bits(4, 4), {"sensitivity": "direct", "observations": 9}, "observations"),
        (Bits(4, 4), {"probes": 0}, "probes"),
        (Bits(4, 4), {"probes": "few"}, "probes"),
        (Bits(4, 4), {"store": "x.npz"}, "store"),
        (Bits(4, 4), {"budget": 3}, "budget"),
    ],
)
def test_bad_options_are_refused_by_name(case: Case, bits: Bits, options: dict[str, Any], named: str) -> None:
    with pytest.raises(BaselineError, match=named):
        Qvla().quantize(*case[:1], bits, case[1], **options)


def test_it_is_registered() -> None:
    assert isinstance(BASELINES["qvla"], Qvla) and not BASELINES["qvla"].trains
