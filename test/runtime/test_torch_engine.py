"""The torch engine computes what ONNX Runtime computes from the same bytes, and refuses the rest by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch

from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.torch_engine import TorchCudaEngine
from test.runtime.torch_variants import (
    ACTED,
    CONFIG,
    HISTORY,
    KINDS,
    OBSERVED,
    VARIANTS,
    denoiser_inputs,
    on_one_thread,
    random,
    variant,
)

SHAPES = [(1, 1), (1, 9), (1, 16), (3, 9), (5, 16)]
# Half sums its products in float32 but rounds every result; ONNX Runtime multiplies the rounded operands in float32.
HALF_RMS = 2e-3
CODES_RMS = 0.005  # as the exporter allows between two executions of the same codes (training.export)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from on_one_thread()


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("name", VARIANTS)
def test_it_computes_what_onnxruntime_computes(name: str) -> None:
    files = variant(name)
    engine, reference = TorchCudaEngine(files, name, device="cpu"), OnnxRuntimeEngine(files)
    assert isinstance(engine, Engine)
    assert engine.name == f"torch_cpu/{name}"
    times = np.array([0, 7, 19])
    np.testing.assert_allclose(engine.timestep_kv(times), reference.timestep_kv(times), rtol=1e-6, atol=1e-6)
    allowed = {"fp32": 1e-6, "fp16": HALF_RMS}.get(name, CODES_RMS)
    for batch, tokens in SHAPES:
        noisy, time_kv, observed = denoiser_inputs(reference, batch, tokens)
        assert relative_rms(engine.observation_kv(random(0, batch, HISTORY, OBSERVED)), observed) <= allowed
        expected = reference.denoise(noisy, time_kv, observed)
        assert expected.std() > 0.1
        found = engine.denoise(noisy, time_kv, observed)
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert relative_rms(found, expected) <= allowed
        if name == "fp32":
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_says_how_every_layer_is_multiplied(name: str) -> None:
    engine = TorchCudaEngine(variant(name), device="cpu")
    assert set(engine.linears) == {"encoder", "timestep", "denoiser"}
    weights = {t.name for t in onnx.load_from_string(variant(name)["denoiser"]).graph.initializer if len(t.dims) == 2}
    blocks = {w: kind for w, kind in engine.linears["denoiser"].items() if w.startswith("blocks.")}
    assert set(blocks) == {w for w in weights if w.startswith("blocks.") and w.endswith(".weight")}
    assert set(blocks.values()) == {KINDS.get(name, "int8")}
    assert engine.linears["denoiser"]["head.weight"] == "float32"
    assert engine.linears["encoder"]["memory_fc1.weight"] == "float32"  # however it is stored


@pytest.mark.parametrize("name", ["fp32", "fp16", "w8a8", "fp8"])
def test_activations_in_half_change_little(name: str) -> None:
    files = variant(name)
    engine, reference = TorchCudaEngine(files, device="cpu", activations="float16"), OnnxRuntimeEngine(files)
    assert engine.activations == "float16"
    inputs = denoiser_inputs(reference, 2, 9)
    expected, found = reference.denoise(*inputs), engine.denoise(*inputs)
    assert found.dtype == np.float32
    # A result of half, and single codes moved by a step where quantizers follow.
    assert 0 < relative_rms(found, expected) < (0.05 if name in ("w8a8", "fp8") else 0.005)


def test_rows_of_a_batch_and_fewer_tokens_give_the_same() -> None:
    engine = TorchCudaEngine(variant("w8a8"), device="cpu")
    noisy, time_kv, observed = denoiser_inputs(engine, 4, 16)
    whole = engine.denoise(noisy, time_kv, observed).copy()
    for row in range(4):
        alone = engine.denoise(noisy[row : row + 1, :9], time_kv, observed[row : row + 1])
        np.testing.assert_allclose(alone[0], whole[row, :9], atol=1e-5)


def test_out_receives_the_result_and_buffers_are_reused() -> None:
    engine = TorchCudaEngine(variant("w8a8"), device="cpu")
    inputs = denoiser_inputs(engine, 1, 9)
    out = np.empty((1, 9, ACTED), np.float32)
    assert engine.denoise(*inputs, out) is out
    np.testing.assert_array_equal(engine.denoise(*inputs), out)
    assert engine.denoise(*inputs) is engine.denoise(*inputs)  # its own buffer


def test_more_shapes_than_are_kept_work() -> None:
    engine = TorchCudaEngine(variant("fp32"), device="cpu")
    reference = OnnxRuntimeEngine(variant("fp32"))
    for tokens in (*range(1, 12), 1):
        inputs = denoiser_inputs(reference, 1, tokens)
        np.testing.assert_allclose(engine.denoise(*inputs), reference.denoise(*inputs), atol=1e-5)


def test_wrong_shapes_are_refused_instead_of_broadcast() -> None:
    engine = TorchCudaEngine(variant("w8a8"), "w8a8", device="cpu")
    noisy, time_kv, observed = denoiser_inputs(engine, 1, 9)
    with pytest.raises(EngineError, match=r"torch_cpu/w8a8: observation_kv has shape \(1, .*expected \(2, "):
        engine.denoise(random(1, 2, 9, ACTED), time_kv, observed)
    with pytest.raises(EngineError, match=r"timestep_kv has shape \(2, .*expected \(1, "):
        engine.denoise(noisy, np.repeat(time_kv, 2, axis=0), observed)
    with pytest.raises(EngineError, match="observation has shape"):
        engine.observation_kv(random(1, 1, HISTORY, OBSERVED + 1))
    with pytest.raises(EngineError, match="noisy has shape"):
        engine.denoise(noisy[:0], time_kv, observed[:0])
    with pytest.raises(EngineError, match=r"denoiser.onnx: .* cannot take noisy \(1, 17, 2\)"):
        engine.denoise(random(1, 1, CONFIG.horizon + 1, ACTED), time_kv, observed)


@pytest.mark.parametrize("time", [-1, 20])
def test_a_time_step_outside_the_table_is_refused(time: int) -> None:
    engine = TorchCudaEngine(variant("fp32"), device="cpu")
    with pytest.raises(EngineError, match=r"timestep\.onnx failed: .*out of range"):
        engine.timestep_kv(np.array([0, time]))


def test_closed_engine_is_refused() -> None:
    engine = TorchCudaEngine(variant("fp32"), device="cpu")
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.timestep_kv(np.array([1]))


def test_missing_role_and_broken_contract_are_refused() -> None:
    files = dict(variant("fp32"))
    with pytest.raises(EngineError, match="files lack timestep"):
        TorchCudaEngine({r: d for r, d in files.items() if r != "timestep"}, device="cpu")
    with pytest.raises(
        EngineError, match=r"denoiser\.onnx: expected input noisy, timestep_kv, observation_kv, got obs"
    ):
        TorchCudaEngine(files | {"denoiser": files["encoder"]}, device="cpu")
    model = onnx.load_from_string(files["denoiser"])
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9
    with pytest.raises(EngineError, match=r"input 'noisy' is float \('B', 9, 2\); expected .* symbolic B, T"):
        TorchCudaEngine(files | {"denoiser": model.SerializeToString()}, device="cpu")
    with pytest.raises(EngineError, match=r"\.onnx: .*_kv' is float .*expected"):  # another number of rows
        TorchCudaEngine(files | {"encoder": variant("mixed")["encoder"]}, device="cpu")


def test_activations_of_another_type_are_refused() -> None:
    with pytest.raises(EngineError, match="activations: expected float16 or float32, got 'bfloat16'"):
        TorchCudaEngine(variant("fp32"), device="cpu", activations="bfloat16")  # type: ignore[arg-type]


def test_a_missing_torch_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r"torch is not installed: install a build of torch with CUDA .* onnxruntime"):
        TorchCudaEngine(variant("fp32"))


def test_a_torch_that_cannot_use_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(EngineError, match=r"device 'cuda': torch .* was built without CUDA: install"):
        TorchCudaEngine(variant("fp32"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"\(CUDA 13\.0\) finds no GPU; check the driver"):
        TorchCudaEngine(variant("fp32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EngineError, match="device 'cuda:3': there are 1 GPUs, numbered from 0"):
        TorchCudaEngine(variant("fp32"), device="cuda:3")
    for device in ("mps", "nonsense"):
        with pytest.raises(EngineError, match=f"device '{device}': expected cuda, cuda:<number> or cpu"):
            TorchCudaEngine(variant("fp32"), device=device)


def test_not_onnx_is_refused() -> None:
    with pytest.raises(EngineError, match=r"encoder\.onnx: not an ONNX file"):
        TorchCudaEngine(dict(variant("fp32")) | {"encoder": b"\xff\xff"}, device="cpu")


def test_a_scale_of_zero_is_refused() -> None:
    model = onnx.load_from_string(variant("w8a8")["denoiser"])
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    scale = next(t for t in model.graph.initializer if t.name == node.input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.0), scale.name))
    with pytest.raises(EngineError, match=r"denoiser\.onnx: QuantizeLinear '.*': expected finite scales above 0"):
        TorchCudaEngine(dict(variant("w8a8")) | {"denoiser": model.SerializeToString()}, device="cpu")
