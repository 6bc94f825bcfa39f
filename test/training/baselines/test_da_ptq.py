"""DA-PTQ: weights of action dimensions, drift, what is kept, and moments of compensated layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcqfa_ros.drivers.kinematics import inovo_kinematics
from test.training.baselines.allocation_policy import calibrated_policy
from training.baselines import BASELINES, BaselineError, Bits
from training.baselines.allocation import AllocationError
from training.baselines.calibration import Calibration
from training.baselines.da_ptq import DaPtq, compensate_layers
from training.baselines.da_ptq_drift import DAMPING, dimension_weights, drift_gradients
from training.baselines.network import linear_names, plain_copy, plain_linears
from training.trained import TrainedPolicy

Case = tuple[TrainedPolicy, Calibration]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A policy and its calibration."""
    return calibrated_policy(tmp_path_factory.mktemp("da_ptq"))


def chain_jacobians(count: int) -> np.ndarray:
    """Jacobians of the six joints of an arm at random poses."""
    arm = inovo_kinematics("long")
    joints = np.random.default_rng(0).uniform(-2.0, 2.0, (count, 6))
    return np.stack([arm.jacobian(pose) for pose in joints])


def test_weights_of_a_chain_are_those_of_its_damped_pseudo_inverse() -> None:
    jacobians = chain_jacobians(20)
    expected = np.zeros(6)
    for jacobian in jacobians:
        left, values, right = np.linalg.svd(jacobian)
        inverse = right.T @ np.diag(values / (values**2 + DAMPING)) @ left.T
        expected += np.abs(inverse) @ [1.8, 1.8, 1.8, 0.15, 0.15, 0.15]
    found = dimension_weights(jacobians)
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-8)
    assert found.mean() == pytest.approx(1.0) and (found > 0).all()
    assert found.max() > 2 * found.min()  # joints of an arm do not move its tool alike


def test_weights_stay_finite_at_a_singular_pose() -> None:
    stretched = inovo_kinematics("long").jacobian(np.zeros(6))
    assert np.linalg.matrix_rank(stretched, tol=1e-6) < 6
    assert np.isfinite(dimension_weights(stretched[None])).all()


def test_dimensions_that_move_the_tool_alike_weigh_alike() -> None:
    jacobian = np.zeros((1, 6, 3))
    jacobian[0, [0, 1, 2], [0, 1, 2]] = 0.7
    np.testing.assert_allclose(dimension_weights(jacobian), np.ones(3))


@pytest.mark.parametrize(
    "jacobians", [np.zeros((2, 6, 3)), np.zeros((6, 3)), np.ones((1, 5, 3)), np.full((1, 6, 2), np.nan)]
)
def test_jacobians_of_no_chain_are_refused(jacobians: np.ndarray) -> None:
    with pytest.raises(AllocationError, match="jacobians"):
        dimension_weights(jacobians)


def test_drift_follows_the_weights_of_the_dimensions(case: Case) -> None:
    policy, calibration = case
    both, first, second = (drift_gradients(policy, calibration, Bits(4, 4), s) for s in ([1, 1], [2, 0], [0, 2]))
    assert set(both) == set(linear_names(policy.network)) and all(value > 0 for value in both.values())
    assert first != second
    doubled = drift_gradients(policy, calibration, Bits(4, 4), [2, 2], together=3)
    for name, value in both.items():
        assert doubled[name] == pytest.approx(2 * value, rel=1e-3)
        assert both[name] <= 0.5 * (first[name] + second[name]) * (1 + 1e-5)  # L is linear in the weights
    with pytest.raises(AllocationError, match="weights"):
        drift_gradients(policy, calibration, Bits(4, 4), [1.0])


def test_drift_is_nothing_where_nothing_is_quantized(case: Case) -> None:
    low = drift_gradients(*case, Bits(4, 4), [1, 1])
    none = drift_gradients(*case, Bits(16, 16), [1, 1])
    assert all(none[name] < 0.01 * low[name] for name in low)  # float16 alone


def outputs(network: nn.Module, name: str, calibration: Calibration) -> np.ndarray:
    """Outputs of a layer in all calls, (tokens, channels)."""
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(
        lambda _module, _arguments, output: seen.append(output.detach().flatten(0, -2))
    )
    calibration.run(network)
    handle.remove()
    return torch.cat(seen).numpy().astype(np.float64)


def test_compensated_layers_have_the_moments_of_full_precision(case: Case) -> None:
    policy, calibration = case
    network = plain_copy(policy.network)
    float_layer = "blocks.1.fc2"
    for name, linear in plain_linears(network).items():
        if name != float_layer:
            linear.quantize_weight(4)
    codes = {name: linear.codes.clone() for name, linear in plain_linears(network).items()}
    found = compensate_layers(policy.network, network, calibration, rank=16, gains=(1e-3, 1e3))
    assert set(found) == {*linear_names(policy.network), "head"}
    for name in found:
        exact, mine = outputs(policy.network, name, calibration), outputs(network, name, calibration)
        np.testing.assert_allclose(mine.mean(0), exact.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(mine.std(0), exact.std(0), rtol=1e-3, atol=1e-4)
        if name in (float_layer, "head"):
            np.testing.assert_allclose(np.cov(mine.T), np.cov(exact.T), rtol=1e-2, atol=1e-3)
        else:
            assert torch.equal(network.get_submodule(name).codes, codes[name])  # type: ignore[arg-type]
            assert found[name].u.shape[1] == 0


@pytest.mark.parametrize("options", [{"share": 1.0}, {}])
def test_nothing_quantized_is_the_policy_itself(case: Case, options: dict[str, Any]) -> None:
    policy, calibration = case
    bits = Bits(4, 4) if options else Bits(16, 16)
    made = DaPtq().quantize(policy, bits, calibration, progress=False, **options)
    call = calibration.calls[0]
    arguments = (call.noisy, call.timesteps, call.observation)
    torch.testing.assert_close(made.network(*arguments), policy.network(*arguments), rtol=0, atol=2e-2)  # float16
    assert made.report["compensated"] == []


def test_the_layers_that_drift_most_keep_16_bits_and_the_rest_get_those_asked_for(case: Case) -> None:
    policy, calibration = case
    before = copy.deepcopy(policy.network.state_dict())
    made = DaPtq().quantize(policy, Bits(4, 4), calibration, progress=False)
    stays, slopes = set(made.report["kept_layers"]), made.report["drift_gradient"]
    assert len(stays) == 6  # 30 % of 20
    assert min(slopes[name] for name in stays) >= max(slopes[name] for name in slopes if name not in stays)
    for name, linear in plain_linears(made.network).items():
        assert linear.row_bits.unique().tolist() == [16 if name in stays else 4]
        assert linear.activation.kind == ("float" if name in stays else "per_token")
    report = made.report
    assert report["executes_as"].startswith("6 of 20 linears as FP16 products")
    assert report["mean_weight_bits"] > 4 and report["compensation_rank"] == 16
    assert report["compensation_gains"] == [0.5, 2.0]
    assert report["dimension_weights"] == [1.0, 1.0] and report["kinematic_chain"].startswith("none")
    for name, value in policy.network.state_dict().items():
        assert torch.equal(value, before[name]), "the policy is left as it is"


def test_a_chain_weighs_the_drift(case: Case, tmp_path: Path) -> None:
    chain = tmp_path / "chain.npy"
    np.save(chain, chain_jacobians(5)[:, :, :2])
    made = DaPtq().quantize(*case[:1], Bits(4, 16), case[1], jacobians=str(chain), compensate=False, progress=False)
    assert made.report["kinematic_chain"] == "given"
    assert made.report["dimension_weights"] == dimension_weights(chain_jacobians(5)[:, :, :2]).tolist()
    assert made.report["compensated"] == []


@pytest.mark.parametrize(
    ("bits", "options", "named"),
    [
        (Bits(8, 8, fp8=True), {}, "integers"),
        (Bits(4, 4), {"share": 1.2}, "share"),
        (Bits(4, 4), {"rank": -1}, "rank"),
        (Bits(4, 4), {"rank": "many"}, "rank"),
        (Bits(4, 4), {"gain": 0.5}, "gain"),
        (Bits(4, 4), {"compensate": 2}, "compensate"),
        (Bits(4, 4), {"jacobians": "missing.npy"}, r"missing\.npy: expected an \.npy file"),
        (Bits(4, 4), {"jacobians": np.ones((1, 6, 5))}, "jacobians: expected .N, 6, 2."),
        (Bits(4, 4), {"damp": 1}, "damp"),
    ],
)
def test_bad_options_are_refused_by_name(case: Case, bits: Bits, options: dict[str, Any], named: str) -> None:
    with pytest.raises((BaselineError, ValueError), match=named):
        DaPtq().quantize(*case[:1], bits, case[1], progress=False, **options)


def test_it_is_registered() -> None:
    assert isinstance(BASELINES["da_ptq"], DaPtq) and not BASELINES["da_ptq"].trains
