"""ONNX Runtime on the CPU: the default engine.

Measured on ONNX Runtime 1.23.2 and 1.31.1: fixing batch and tokens by ``add_free_dimension_override_by_name`` gains
nothing over symbolic dimensions, nor does switching the memory pattern off, so one session serves every shape.
Spinning is off because an idle engine must leave the cores to the control tick. So is the memory arena: it doubles
what it takes from the system each time, and an engine without it holds up to 30 % less and is as fast on single
observations (``docs/profile.md``); only large batches want one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from dcqfa_ros.runtime.contract import INPUTS, OUTPUTS, check_contract, declared, require_roles
from dcqfa_ros.runtime.engine import ROLES, Float32, Int64
from dcqfa_ros.runtime.errors import EngineError, first_line
from dcqfa_ros.runtime.fusion import fuse_for_onnxruntime_cpu
from dcqfa_ros.runtime.lowering import (
    is_quantized,
    lower_for_onnxruntime_cpu,
    parse_model,
    quantizes_to_integers,
    serialize,
)
from dcqfa_ros.runtime.processor import adds_products_in_16_bits, onnxruntime_refusal, this_processor
from dcqfa_ros.runtime.recent import Recent

# MatMulAddFusion makes Gemm of MatMul and bias before Q/DQ fusion looks for MatMul: integer products would be float.
_DISABLED_IF_QUANTIZED = ("MatMulAddFusion",)
_CACHED_BINDINGS = 8


def session_options(threads: int = 1, arena: bool = False) -> ort.SessionOptions:
    """Return the options every session of this software has, so that a report on a graph is about what the robot runs.

    Args:
        threads: intra-operator threads, at least 1.
        arena: keep memory in an arena between operators.
    """
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = arena
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # warnings about folded initializers are not for users
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if adds_products_in_16_bits(this_processor()):
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def open_session(model: onnx.ModelProto, options: ort.SessionOptions) -> ort.InferenceSession:
    """Open a lowered graph on ONNX Runtime's CPU provider, without the optimizers that undo integer products."""
    disabled = list(_DISABLED_IF_QUANTIZED) if is_quantized(model) else []
    return ort.InferenceSession(
        serialize(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


class _DenoiserBinding:
    """Static buffers of one (batch, tokens) shape, bound to the denoiser's inputs and output once."""

    def __init__(self, session: ort.InferenceSession, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._session = session
        self._binding = session.io_binding()
        for name, array in self.arrays.items():
            bind = self._binding.bind_output if name == "noise" else self._binding.bind_input
            bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


class OnnxRuntimeEngine:
    """An :class:`~dcqfa_ros.runtime.engine.Engine` on ONNX Runtime's CPU provider.

    Loading holds the interpreter lock for tens to hundreds of milliseconds: a real-time process loads engines in a
    worker (``dcqfa_ros.runtime.worker``).

    Attributes:
        name: ``onnxruntime/<name given>``.
        threads: threads of one operator.
        quantizers: activation quantizers lowered to uint8, by role; all 0 in a floating-point variant.
    """

    def __init__(
        self, files: Mapping[str, bytes], threads: int = 1, name: str = "cpu", *, large_batches: bool = False
    ) -> None:
        """Lower and load the three graphs.

        Args:
            files: role ("encoder", "timestep", "denoiser") -> canonical ONNX bytes.
            threads: intra-operator threads, at least 1; 1 is best for small networks.
            name: the variant, for reports.
            large_batches: hundreds of observations are denoised together: take more memory, and take it once.

        Raises:
            EngineError: a role is missing, a graph cannot be parsed, lowered or loaded, its inputs and outputs are not
                those of the contract (:mod:`dcqfa_ros.runtime.contract`), or it quantizes to 8-bit integers, which
                this processor does not multiply exactly; the message names the file.
        """
        if threads < 1:
            raise EngineError(f"threads: expected at least 1, got {threads}")
        require_roles(files, name)
        self.name = f"onnxruntime/{name}"
        self.threads = threads
        self._options = session_options(threads, arena=large_batches)
        self.quantizers: dict[str, int] = {}
        sessions: dict[str, ort.InferenceSession] = {}
        self.dims: dict[str, int] = {}  # fixed sizes by axis letter
        for role in ROLES:
            sessions[role] = self._load(role, files[role])
        self._sessions = sessions
        self._bindings: Recent[tuple[int, int], _DenoiserBinding] = Recent(_CACHED_BINDINGS)
        self._closed = False

    def observation_kv(self, observation: Float32) -> Float32:
        """See :meth:`Engine.observation_kv`."""
        return self._run("encoder", {"observation": observation})

    def timestep_kv(self, timesteps: Int64) -> Float32:
        """See :meth:`Engine.timestep_kv`."""
        return self._run("timestep", {"timesteps": timesteps})

    def denoise(
        self, noisy: Float32, timestep_kv: Float32, observation_kv: Float32, out: Float32 | None = None
    ) -> Float32:
        """See :meth:`Engine.denoise`. The inputs are copied to bound buffers (48 kB at batch 1, microseconds).

        Raises:
            EngineError: a shape does not fit, ONNX Runtime failed, or the engine is closed.
        """
        batch, tokens = noisy.shape[:2]
        binding = self._bindings.get((batch, tokens))
        if binding is None:
            binding = self._bind(batch, tokens)
        arrays = binding.arrays
        for label, given in (("noisy", noisy), ("timestep_kv", timestep_kv), ("observation_kv", observation_kv)):
            bound = arrays[label]
            if given.shape != bound.shape:
                raise EngineError(f"engine {self.name}: {label} has shape {given.shape}, expected {bound.shape}")
            np.copyto(bound, given)
        try:
            binding.run()
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise self._failed("denoiser", error) from error
        result = arrays["noise"]
        if out is None:
            return result
        np.copyto(out, result)
        return out

    def close(self) -> None:
        """Drop sessions and buffers."""
        self._closed = True
        self._bindings.clear()
        self._sessions.clear()

    def _load(self, role: str, data: bytes) -> ort.InferenceSession:
        label = f"{role}.onnx"
        model = parse_model(data, label)
        check_contract(role, declared(model.graph.input), declared(model.graph.output), self.dims)
        refusal = onnxruntime_refusal(this_processor()) if quantizes_to_integers(model) else None
        if refusal:
            raise EngineError(f"{label}: {refusal}; choose a variant in floating point")
        self.quantizers[role] = lower_for_onnxruntime_cpu(model, label)
        if self.quantizers[role]:
            fuse_for_onnxruntime_cpu(model)
        try:
            return open_session(model, self._options)
        except Exception as error:  # as above
            raise EngineError(f"{label}: ONNX Runtime {ort.__version__} cannot load it: {first_line(error)}") from error

    def _bind(self, batch: int, tokens: int) -> _DenoiserBinding:
        self._require_open()
        sizes = {**self.dims, "B": batch, "T": tokens}
        shapes = {
            name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
            for name, (_, axes) in (*INPUTS["denoiser"].items(), *OUTPUTS["denoiser"].items())
        }
        binding = _DenoiserBinding(self._sessions["denoiser"], shapes)
        self._bindings.put((batch, tokens), binding)
        return binding

    def _run(self, role: str, feeds: dict[str, NDArray[Any]]) -> Float32:
        self._require_open()
        try:
            result: Float32 = self._sessions[role].run(None, feeds)[0]
        except Exception as error:  # as above
            raise self._failed(role, error) from error
        return result

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError(f"engine {self.name} is closed")

    def _failed(self, role: str, error: Exception) -> EngineError:
        return EngineError(f"engine {self.name}: {role}.onnx failed: {first_line(error)}")
