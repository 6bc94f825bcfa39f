"""A new chunk continues the previous one as its method says, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.chunking import Continuation, Method, soft_mask
from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.guidance import Guidance, guided_strength, method_refusal, soft_strength
from dcqfa_ros.runtime.normalize import Normalizer
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.ort_pullback import open_pullback
from dcqfa_ros.runtime.policy import PolicyError, PolicyRuntime
from test.runtime.conftest import observation, tiny_files, tiny_spec

FROZEN, HORIZON = 4, 5
STEPS = 8


def spec_with(sampler: str = "ddim", prefix: int = 0) -> BundleSpec:
    diffusion = tiny_spec()[0].diffusion.model_dump()
    return tiny_spec(diffusion=diffusion | {"sampler": sampler, "prefix": prefix, "steps": STEPS})[0]


class WithFlags:
    """The tiny policy's engine as one whose network takes known tokens, and what it was shown."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.engine, self.name = engine, engine.name
        self.shown: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def denoise(self, noisy: np.ndarray, *rest: Any) -> np.ndarray:
        self.shown.append(noisy.copy())
        return self.engine.denoise(np.ascontiguousarray(noisy[..., :-1]), *rest)


class PullbackWithFlags:
    """The tiny policy's derivative, likewise."""

    def __init__(self, pullback: Any) -> None:
        self.pullback = pullback

    def pull(self, noisy: np.ndarray, *rest: Any) -> np.ndarray:
        gradient = self.pullback.pull(np.ascontiguousarray(noisy[..., :-1]), *rest)
        return np.concatenate([gradient, np.full_like(gradient[..., :1], 99.0)], axis=-1)

    def close(self) -> None:
        self.pullback.close()


def make_policy(spec: BundleSpec, quantized: bool = False) -> PolicyRuntime:
    files = tiny_files(quantized)
    engine: Any = OnnxRuntimeEngine(files, name="tiny")
    prefix = spec.diffusion.prefix

    def pullback() -> Any:
        opened = open_pullback("onnxruntime", files["denoiser"], name="tiny")
        return PullbackWithFlags(opened) if prefix else opened

    return PolicyRuntime(spec, WithFlags(engine) if prefix else engine, None if quantized else pullback)


def previous(seed: int = 3, rows: int = 16 - HORIZON) -> np.ndarray:
    return np.random.default_rng(seed).uniform(100, 400, (rows, 2)).astype(np.float32)


def predict(policy: PolicyRuntime, *continuations: Continuation | None, **more: Any) -> np.ndarray:
    batch = len(continuations)
    return policy.predict(
        observation(7, batch), list(range(batch)), [0] * batch, continuations=continuations, actions=15, **more
    )


@pytest.mark.parametrize("method", [Method.SOFT, Method.GUIDED])
def test_guidance_draws_the_chunk_to_the_previous_one(method: Method) -> None:
    policy = make_policy(spec_with())
    before = previous()
    plain = predict(policy, None)[0]
    drawn = predict(policy, Continuation(before, FROZEN, HORIZON, method))[0]
    known = before[1:]  # row 0 is the past token

    def distance(actions: np.ndarray, rows: slice) -> float:
        return float(np.linalg.norm(actions[: len(known)][rows] - known[rows], axis=1).mean())

    frozen, rest = slice(0, FROZEN - 1), slice(FROZEN - 1, len(known))
    shares = [distance(drawn, rows) / distance(plain, rows) for rows in (frozen, rest)]
    if method is Method.SOFT:
        assert shares[0] < 0.3 < shares[1] < 1.0
    else:  # the random network's Jacobian lets only part of it through
        assert max(shares) < 0.8


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("method", [Method.SOFT, Method.GUIDED])
def test_a_continuation_without_weight_changes_nothing(method: Method, quantized: bool) -> None:
    policy = make_policy(spec_with(), quantized)
    weightless = Continuation(previous(rows=3), 0, 16, method)  # 16 actions later nothing overlaps
    assert np.array_equal(predict(policy, None), predict(policy, weightless))


def test_trained_returns_the_known_actions_as_they_were_and_shows_them_to_the_network_at_every_step() -> None:
    spec = spec_with(prefix=8)
    policy = make_policy(spec)
    before = previous()
    drawn = predict(policy, Continuation(before, FROZEN, HORIZON, Method.TRAINED))[0]
    assert np.array_equal(drawn[: FROZEN - 1], before[1:FROZEN])
    shown: list[np.ndarray] = policy.engine.shown  # type: ignore[attr-defined]
    known = Normalizer(spec.action.normalizer, (2,)).normalize(before[:FROZEN])
    assert len(shown) == STEPS
    for noisy in shown:
        assert noisy.shape == (1, 16, 3)
        assert np.array_equal(noisy[0, :FROZEN, :2], known)
        assert noisy[0, :, 2].tolist() == [1.0] * FROZEN + [0.0] * (16 - FROZEN)
    shown.clear()
    assert not np.array_equal(predict(policy, None)[0], drawn)
    assert not any(noisy[..., 2].any() for noisy in shown), "flags of an earlier chunk were left"


@pytest.mark.parametrize("sampler", ["ddpm", "consistency"])
def test_trained_follows_with_every_sampler(sampler: str) -> None:
    before = previous()
    drawn = predict(make_policy(spec_with(sampler, prefix=8)), Continuation(before, 3, HORIZON, Method.TRAINED))
    assert np.array_equal(drawn[0, :2], before[1:3])


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.sampled_from([None, Method.SOFT, Method.GUIDED, Method.TRAINED]), min_size=1, max_size=5),
    st.integers(0, 100),
)
def test_rows_of_a_batch_continue_independently(methods: list[Method | None], seed: int) -> None:
    policy = make_policy(spec_with(prefix=8))
    entries = [
        None if m is None else Continuation(previous(seed + i), FROZEN, HORIZON, m) for i, m in enumerate(methods)
    ]
    batch, seen = len(entries), observation(seed, len(entries))
    together = policy.predict(seen, list(range(batch)), [1] * batch, continuations=entries, actions=15)
    for row, entry in enumerate(entries):
        alone = {key: value[row : row + 1] for key, value in seen.items()}
        actions = policy.predict(alone, [row], [1], continuations=[entry], actions=15)
        assert np.abs(actions[0] - together[row]).max() < 0.05  # px
        if entry is None:
            plain = policy.predict(alone, [row], [1], actions=15)
            assert np.array_equal(plain, actions)


def test_fewer_tokens_give_the_same_soft_continuation() -> None:
    policy = make_policy(spec_with())
    entry = Continuation(previous(), FROZEN, HORIZON, Method.SOFT)
    few = policy.predict(observation(), [1], [0], continuations=[entry], actions=8)
    many = policy.predict(observation(), [1], [0], continuations=[entry], actions=15)
    assert few.shape == (1, 8, 2) and np.abs(few - many[:, :8]).max() < 0.05  # px


class Linear:
    """A network ``eps = x M^T`` whose Jacobian is M, at every noise level."""

    name = "linear"

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix.astype(np.float32)  # over the flattened tokens and dimensions

    def denoise(self, noisy: np.ndarray, _: Any, __: Any, out: np.ndarray) -> np.ndarray:
        out[...] = (noisy.reshape(len(noisy), -1) @ self.matrix.T).reshape(noisy.shape)
        return out

    def pull(self, noisy: np.ndarray, _: Any, __: Any, cotangent: np.ndarray) -> np.ndarray:
        return (cotangent.reshape(len(noisy), -1) @ self.matrix).reshape(noisy.shape)


@pytest.mark.parametrize("method", [Method.SOFT, Method.GUIDED])
def test_every_step_is_the_published_formula(method: Method) -> None:
    spec = spec_with()
    generator = np.random.default_rng(0)
    matrix = np.eye(32) * 0.9 + 0.02 * generator.standard_normal((32, 32))
    network: Any = Linear(matrix)
    before = previous()
    normalizer = Normalizer(spec.action.normalizer, (2,))
    guidance = Guidance.of([Continuation(before, FROZEN, HORIZON, method)], spec, 16, normalizer)
    assert guidance is not None
    loop = DenoisingLoop(spec.diffusion.model_copy(update={"clip_sample": 50.0}), 16, 2)
    x = generator.standard_normal((1, 16, 2))
    got = loop.run(network, x.astype(np.float32), np.zeros((STEPS, 1, 1, 1), np.float32), None, None, guidance, network)  # type: ignore[arg-type]
    target = np.zeros((16, 2))
    target[: len(before)] = normalizer.normalize(before)
    weight = soft_mask(16, FROZEN, HORIZON, len(before))[:, None]
    c = loop.coefficients
    for step in range(STEPS):
        abar = 1.0 / np.float64(c.from_sample[step]) ** 2
        sigma = np.sqrt((1 - abar) / abar)
        eps = (matrix @ x.ravel()).reshape(x.shape)
        clean = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
        error = weight * (target - clean)
        if method is Method.SOFT:
            clean = clean + min(1, 5 * sigma / (1 + sigma), (1 + sigma**2) / (1 + sigma)) * error
        else:
            jacobian = (np.eye(32) - np.sqrt(1 - abar) * matrix) / np.sqrt(abar)
            gradient = (jacobian.T @ error.ravel()).reshape(x.shape)
            clean = clean + min(5 * sigma, 1 + sigma**2) * np.sqrt(abar) * gradient
        eps = (x - np.sqrt(abar) * clean) / np.sqrt(1 - abar)  # computed anew
        following = np.float64(c.to_clean[step])
        x = following * clean + np.sqrt(max(0.0, 1 - following**2)) * eps
    np.testing.assert_allclose(got, x, rtol=2e-3, atol=2e-3)


def test_strengths_fade_with_the_noise_and_never_pass_the_target() -> None:
    sigmas = np.geomspace(1e-4, 50, 200)
    soft = [soft_strength(s) for s in sigmas]
    assert max(soft) == 1.0 and soft[0] == pytest.approx(5e-4, rel=1e-3)
    assert all(guided_strength(s) == pytest.approx(min(5 * s, 1 + s * s)) for s in sigmas)


GOOD = {"previous": previous(), "frozen": FROZEN, "horizon": HORIZON, "method": Method.SOFT}


@pytest.mark.parametrize(
    ("changes", "spec", "text"),
    [
        ({"method": Method.ENSEMBLE}, {}, "expected method soft, guided or trained, got ensemble"),
        ({"previous": np.zeros((3, 3), np.float32)}, {}, r"shape \('n', 2\), n from 1 to 16, got \(3, 3\)"),
        ({"previous": np.zeros((17, 2), np.float32)}, {}, "n from 1 to 16"),
        ({"previous": np.zeros((0, 2), np.float32), "frozen": 0}, {}, "n from 1 to 16"),
        ({"previous": np.full((5, 2), np.nan, np.float32)}, {}, "previous action 0 is nan in 'x'"),
        ({"frozen": 12}, {}, "frozen from 0 to 11 .* got frozen 12"),
        ({"frozen": -1}, {}, "got frozen -1"),
        ({"horizon": -1}, {}, "horizon -1"),
        ({"method": Method.TRAINED}, {}, "diffusion.prefix above 1"),
        ({"method": Method.TRAINED}, {"prefix": 3}, "frozen 4 exceeds diffusion.prefix 3"),
        ({}, {"sampler": "ddpm"}, "soft is defined for sampler ddim, bundle 'tiny' has ddpm"),
        ({"method": Method.GUIDED}, {"sampler": "consistency"}, "use trained, ensemble or asynchronous"),
    ],
)
def test_a_continuation_that_cannot_be_followed_is_refused_by_row(
    changes: dict[str, Any], spec: dict[str, Any], text: str
) -> None:
    entry = Continuation(**(GOOD | changes))
    with pytest.raises(PolicyError, match=f"continuation of batch row 1: .*{text}"):
        predict(make_policy(spec_with(**spec)), None, entry)


def test_counts_out_of_range_are_refused() -> None:
    policy = make_policy(spec_with())
    with pytest.raises(PolicyError, match="continuations: expected 1 entries"):
        policy.predict(observation(), [1], [0], continuations=[None, None])
    for actions in (0, 16):
        with pytest.raises(PolicyError, match=f"actions: expected 1 to 15, got {actions}"):
            policy.predict(observation(), [1], [0], actions=actions)
    with pytest.raises(PolicyError, match="tokens: expected 13 to 16, got 12"):
        policy.predict(observation(), [1], [0], actions=12, tokens=12)


def test_guided_is_refused_by_name_where_there_is_no_derivative() -> None:
    spec = spec_with()
    entry = Continuation(previous(), FROZEN, HORIZON, Method.GUIDED)
    files = tiny_files(quantized=True)
    bare = PolicyRuntime(spec, OnnxRuntimeEngine(tiny_files(), name="tiny"))
    with pytest.raises(PolicyError, match=r"without the denoiser's derivative.*use chunking soft or trained"):
        predict(bare, entry)
    integer = PolicyRuntime(
        spec, OnnxRuntimeEngine(files), lambda: open_pullback("onnxruntime", files["denoiser"], name="w8")
    )
    with pytest.raises(PolicyError, match=r"denoiser.onnx: DequantizeLinear .* choose a variant in floating point"):
        predict(integer, entry)
    for runtime in ("openvino", "tensorrt", "torch_cuda"):
        with pytest.raises(PolicyError, match=f"runtime {runtime} does not give: use runtime onnxruntime"):
            open_pullback(runtime, files["denoiser"], name="fp32")


@pytest.mark.parametrize(
    ("method", "variant", "runtime", "spec", "text"),
    [
        (Method.GUIDED, "fp32", "onnxruntime", {}, None),
        (Method.GUIDED, "w8a8", "onnxruntime", {}, "'w8a8' rounds activations to int8"),
        (Method.GUIDED, "fp32", "openvino", {}, "runtime openvino does not give"),
        (Method.GUIDED, "", "onnxruntime", {}, None),
        (Method.SOFT, "w8a8", "openvino", {}, None),
        (Method.SOFT, "w8a8", "onnxruntime", {"sampler": "consistency"}, "sampler ddim"),
        (Method.TRAINED, "w8a8", "onnxruntime", {}, "has 0: use soft, ensemble or asynchronous"),
        (Method.TRAINED, "w8a8", "openvino", {"prefix": 8}, None),
        (Method.ENSEMBLE, "w8a8", "openvino", {"sampler": "ddpm"}, None),
        (Method.SYNCHRONOUS, "w8a8", "openvino", {"sampler": "ddpm"}, None),
    ],
)
def test_what_a_variant_cannot_do_is_said_before_it_is_tried(
    method: Method, variant: str, runtime: str, spec: dict[str, Any], text: str | None
) -> None:
    reason = method_refusal(method, spec_with(**spec), variant, runtime)
    assert (reason is None) if text is None else (reason is not None and text in reason)
