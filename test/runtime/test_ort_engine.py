"""The ONNX Runtime engine runs what the contract says and refuses the rest by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import reference

from dcqfa_ros.runtime import ort_engine
from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.processor import Processor
from test.runtime.conftest import ACTED, HISTORY, OBSERVED, denoiser_model, encoder_model, tiny_files


def evaluate(data: bytes, **inputs: np.ndarray) -> np.ndarray:
    """Run a graph by ONNX' own definition of its operators."""
    result: np.ndarray = reference.ReferenceEvaluator(onnx.load_model_from_string(data)).run(None, inputs)[0]
    return result


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 9), (1, 1), (3, 16)])
def test_engine_equals_the_onnx_reference(quantized: bool, batch: int, tokens: int) -> None:
    files = tiny_files(quantized)
    engine = OnnxRuntimeEngine(files, name="tiny")
    assert isinstance(engine, Engine)
    observation, noisy = random(1, batch, HISTORY, OBSERVED), random(2, batch, tokens, ACTED)
    timesteps = np.array([90, 45, 0])
    observation_kv = engine.observation_kv(observation)
    timestep_kv = engine.timestep_kv(timesteps)
    assert np.allclose(observation_kv, evaluate(files["encoder"], observation=observation), atol=1e-5)
    assert np.allclose(timestep_kv, evaluate(files["timestep"], timesteps=timesteps), atol=1e-5)
    for index in range(3):
        inputs = {"noisy": noisy, "timestep_kv": timestep_kv[index : index + 1], "observation_kv": observation_kv}
        noise = engine.denoise(**inputs)
        assert noise.shape == noisy.shape
        assert np.allclose(noise, evaluate(files["denoiser"], **inputs), atol=1e-5)


def test_result_goes_to_out_and_inputs_stay() -> None:
    engine = OnnxRuntimeEngine(tiny_files())
    noisy, kv = random(1, 2, 9, ACTED), engine.observation_kv(random(2, 2, HISTORY, OBSERVED))
    time, before, out = engine.timestep_kv(np.array([3])), noisy.copy(), np.empty_like(noisy)
    assert engine.denoise(noisy, time, kv, out) is out
    assert np.array_equal(noisy, before)
    assert np.array_equal(out, engine.denoise(noisy, time, kv))


def test_many_shapes_in_turn_do_not_disturb_each_other() -> None:
    engine = OnnxRuntimeEngine(tiny_files())
    time = engine.timestep_kv(np.array([3]))
    cases = [
        (random(b, b, t, ACTED), engine.observation_kv(random(b, b, HISTORY, OBSERVED)))
        for b in range(1, 13)
        for t in (1, 9)
    ]
    first = [engine.denoise(noisy, time, kv).copy() for noisy, kv in cases]
    for (noisy, kv), expected in zip(cases, first, strict=True):
        assert np.array_equal(engine.denoise(noisy, time, kv), expected)


def test_memory_is_kept_in_an_arena_for_large_batches_only_and_changes_no_bit() -> None:
    results = []
    for large in (False, True):
        engine = OnnxRuntimeEngine(tiny_files(), large_batches=large)
        arenas = {session.get_session_options().enable_cpu_mem_arena for session in engine._sessions.values()}
        assert arenas == {large}
        time, kv = engine.timestep_kv(np.array([3])), engine.observation_kv(random(2, 64, HISTORY, OBSERVED))
        results.append(engine.denoise(random(1, 64, 9, ACTED), time, kv).copy())
    np.testing.assert_array_equal(*results)


def test_quantized_activations_are_lowered() -> None:
    assert OnnxRuntimeEngine(tiny_files(quantized=True)).quantizers == {"encoder": 0, "timestep": 0, "denoiser": 2}
    assert not any(OnnxRuntimeEngine(tiny_files()).quantizers.values())


def test_name_says_runtime_and_variant() -> None:
    assert OnnxRuntimeEngine(tiny_files(), name="w8a8").name == "onnxruntime/w8a8"


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"encoder": b""}, "timestep, denoiser"),
        (tiny_files() | {"denoiser": b"damaged"}, "denoiser.onnx: "),
        (tiny_files() | {"encoder": tiny_files()["denoiser"]}, "encoder.onnx: expected input observation, got noisy"),
        (tiny_files() | {"denoiser": denoiser_model(False, noisy="sample")}, "denoiser.onnx: expected input noisy"),
        (
            tiny_files() | {"denoiser": denoiser_model(False, noise="eps")},
            "denoiser.onnx: expected output noise, got eps",
        ),
        (tiny_files() | {"encoder": encoder_model()[:-7]}, "encoder.onnx: "),
    ],
)
def test_files_that_break_the_contract_are_refused_by_name(files: dict[str, bytes], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        OnnxRuntimeEngine(files)


def test_fixed_batch_is_refused() -> None:
    model = onnx.load_model_from_string(denoiser_model(False))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(EngineError, match=r"input 'noisy' is float .1, 'T', 2.; expected .* symbolic B, T"):
        OnnxRuntimeEngine(tiny_files() | {"denoiser": model.SerializeToString()})


def test_wrong_shape_is_refused_instead_of_broadcast() -> None:
    engine = OnnxRuntimeEngine(tiny_files())
    kv, time = engine.observation_kv(random(1, 1, HISTORY, OBSERVED)), engine.timestep_kv(np.array([3, 2]))
    with pytest.raises(EngineError, match="observation_kv has shape"):
        engine.denoise(random(1, 2, 9, ACTED), time[:1], kv)
    with pytest.raises(EngineError, match="timestep_kv has shape"):
        engine.denoise(random(1, 1, 9, ACTED), time, kv)
    with pytest.raises(EngineError, match=r"encoder\.onnx failed"):
        engine.observation_kv(random(1, 1, HISTORY, OBSERVED + 1))


def test_closed_engine_is_refused() -> None:
    engine = OnnxRuntimeEngine(tiny_files())
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.timestep_kv(np.array([1]))


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(EngineError, match="threads"):
        OnnxRuntimeEngine(tiny_files(), threads=0)


def test_integers_on_x86_without_exact_products_are_refused_and_floats_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_engine, "this_processor", lambda: Processor("old", "x86_64", 2, ()))
    with pytest.raises(EngineError, match=r"denoiser\.onnx: .*neither VNNI nor AVX2.*floating point"):
        OnnxRuntimeEngine(tiny_files(quantized=True))
    OnnxRuntimeEngine(tiny_files()).close()
    for other in (Processor("old", "x86_64", 2, (), avx2=True), Processor("arm", "aarch64", 2, ())):
        monkeypatch.setattr(ort_engine, "this_processor", lambda other=other: other)
        OnnxRuntimeEngine(tiny_files(quantized=True)).close()
