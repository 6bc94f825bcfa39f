"""OpenVINO on the CPU: an optional second engine for processors that multiply 8-bit integers well.

It takes the canonical graphs as they are: int8 activations need no shift to uint8. Shapes are fixed before compilation,
one compiled graph per batch and number of tokens, which takes about a second the first time (let a warm-up do it).

Measured on OpenVINO 2026.4.1 and what follows from it:

- weights of 4 bits are multiplied in floating point, after activations were quantized a second time in groups of 32:
  results are off by several steps. Their codes are stored as int8 instead, without loss, and that second quantization
  is turned off;
- conversion to 8-bit floats rounds twice, by way of float16: one of about 150 values differs from ONNX's definition. A
  graph with 8-bit floats is refused;
- a conversion to float16 and back is left out: what float16 variants round away is kept, results differ from ONNX
  Runtime's by about 1e-3 of their size;
- worker threads sleep between calls: an idle engine leaves the cores to the control tick.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, numpy_helper

from dcqfa_ros.runtime.contract import DTYPES, INPUTS, OUTPUTS, check_contract, declared, require_roles
from dcqfa_ros.runtime.engine import ROLES, Float32, Int64
from dcqfa_ros.runtime.engines import OPENVINO, runtime_facts
from dcqfa_ros.runtime.errors import EngineError, first_line
from dcqfa_ros.runtime.lowering import parse_model, quantizes_to_integers, serialize
from dcqfa_ros.runtime.lowering_weights import FOUR_BITS, eight_bit_codes
from dcqfa_ros.runtime.processor import openvino_refusal, this_processor
from dcqfa_ros.runtime.recent import Recent

_CACHED_SHAPES = 4  # of each graph: every one holds weights of its own
_FLOAT8 = frozenset(
    {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ}
)
_INTEGERS = frozenset({"i8", "u8"})


def openvino_version() -> str:
    """Version of the installed OpenVINO.

    Raises:
        EngineError: it is not installed; the message says how to install it.
    """
    return str(_openvino().__version__)


def lower_for_openvino(model: ModelProto, label: str) -> int:
    """Store 4-bit codes of a canonical graph as 8-bit ones, in place and without loss.

    Args:
        model: a canonical graph.
        label: what to call the file in errors.

    Returns:
        Number of tensors changed.

    Raises:
        EngineError: the graph holds 8-bit floats.
    """
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    kinds |= {a.i for node in model.graph.node for a in node.attribute if a.name in ("to", "output_dtype")}
    if kinds & _FLOAT8:
        raise EngineError(
            f"{label}: it holds 8-bit floats, which OpenVINO rounds differently from ONNX; run this variant with "
            "onnxruntime, or take an integer, float16 or float32 variant"
        )
    changed = 0
    for tensor in model.graph.initializer:
        if tensor.data_type in FOUR_BITS:
            codes = eight_bit_codes(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
            changed += 1
    return changed


def integer_weights(data: bytes, label: str) -> set[str]:
    """Names of the weights of a canonical graph that OpenVINO multiplies on integer kernels.

    They are read from the graph it runs, compiled with every free size 1.

    Raises:
        EngineError: OpenVINO is not installed or cannot load the graph.
    """
    graph = _Graph(data, label, 1, "f32")
    free = {value.name: [d.dim_value or 1 for d in value.type.tensor_type.shape.dim] for value in graph.inputs}
    found = set()
    for node in graph.compile(free).get_runtime_model().get_ops():
        # Not runtimePrecision: it is i8 too where 8-bit weights are only stored so and multiplied in floating point.
        kernel = _fact(node, "primitiveType").rpartition("_")[2]
        if _fact(node, "layerType") == "FullyConnected" and kernel in _INTEGERS:
            source = node.input_value(1).get_node()
            while _fact(source, "layerType") != "Const" and source.get_input_size():  # transposed while compiling
                source = source.input_value(0).get_node()
            found.add(source.get_friendly_name())
    return found


class OpenVinoEngine:
    """An :class:`~dcqfa_ros.runtime.engine.Engine` on OpenVINO's CPU plugin.

    Attributes:
        name: ``openvino/<name given>``.
        threads: threads of one operator.
        dims: sizes that the graphs fix, by axis letter.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        threads: int = 1,
        name: str = "cpu",
        *,
        precision: Literal["f32", "bf16"] = "f32",
    ) -> None:
        """Read and lower the three graphs; each is compiled when its first shape is known.

        Args:
            files: role ("encoder", "timestep", "denoiser") -> canonical ONNX bytes.
            threads: threads of one operator, at least 1 and at most the processor's.
            name: the variant, for reports.
            precision: of what is not quantized. bfloat16 is faster and changes results, so it must be asked for.

        Raises:
            EngineError: OpenVINO is not installed, a role is missing, a graph cannot be parsed, lowered or read, its
                inputs and outputs are not those of the contract, it quantizes to 8-bit integers, which OpenVINO does
                not multiply exactly on this processor, or the processor has no bfloat16.
        """
        if threads < 1:
            raise EngineError(f"threads: expected at least 1, got {threads}")
        require_roles(files, name)
        self.name = f"{OPENVINO}/{name}"
        self.threads = threads
        self.dims: dict[str, int] = {}
        graphs = {role: _Graph(files[role], f"{role}.onnx", threads, precision) for role in ROLES}
        refusal = openvino_refusal(this_processor())
        for role, graph in graphs.items():
            check_contract(role, declared(graph.inputs), declared(graph.outputs), self.dims)
            if refusal and graph.multiplies_integers:
                raise EngineError(
                    f"{role}.onnx: {refusal}; choose a variant in floating point, or the runtime onnxruntime"
                )
        self._graphs = graphs
        self._requests: dict[str, Recent[tuple[int, ...], _Request]] = {role: Recent(_CACHED_SHAPES) for role in ROLES}
        self._closed = False

    def observation_kv(self, observation: Float32) -> Float32:
        """See :meth:`Engine.observation_kv`.

        Raises:
            EngineError: a shape does not fit, OpenVINO failed, or the engine is closed.
        """
        return self._run("encoder", {"observation": observation}, {"B": len(observation)})

    def timestep_kv(self, timesteps: Int64) -> Float32:
        """See :meth:`Engine.timestep_kv`.

        Raises:
            EngineError: as :meth:`observation_kv`.
        """
        return self._run("timestep", {"timesteps": timesteps}, {"S": len(timesteps)})

    def denoise(
        self, noisy: Float32, timestep_kv: Float32, observation_kv: Float32, out: Float32 | None = None
    ) -> Float32:
        """See :meth:`Engine.denoise`. The inputs are copied to bound buffers.

        Raises:
            EngineError: as :meth:`observation_kv`.
        """
        inputs = {"noisy": noisy, "timestep_kv": timestep_kv, "observation_kv": observation_kv}
        result = self._run("denoiser", inputs, {"B": noisy.shape[0], "T": noisy.shape[1]})
        if out is None:
            return result
        np.copyto(out, result)
        return out

    def close(self) -> None:
        """Drop compiled graphs and buffers."""
        self._closed = True
        self._graphs.clear()
        self._requests.clear()

    def _run(self, role: str, inputs: Mapping[str, NDArray[Any]], free: Mapping[str, int]) -> Float32:
        if self._closed:
            raise EngineError(f"engine {self.name} is closed")
        key = tuple(free.values())
        request = self._requests[role].get(key)
        if request is None:
            request = self._bind(role, key, {**self.dims, **free})
        for label, given in inputs.items():
            bound = request.arrays[label]
            if given.shape != bound.shape:
                raise EngineError(f"engine {self.name}: {label} has shape {given.shape}, expected {bound.shape}")
            if given is bound:  # the encoder writes where the denoiser reads
                continue
            if label in request.shared:  # somebody else's keys and values: leave the encoder its result
                bound = request.unshare(label)
            np.copyto(bound, given)
        try:
            return request.run()
        except Exception as error:  # OpenVINO raises RuntimeError, and others for numbers it cannot convert
            raise EngineError(f"engine {self.name}: {role}.onnx failed: {first_line(error)}") from error

    def _bind(self, role: str, key: tuple[int, ...], sizes: Mapping[str, int]) -> _Request:
        def shape(axes: tuple[str | int, ...]) -> tuple[int, ...]:
            return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)

        inputs = {name: (element, shape(axes)) for name, (element, axes) in INPUTS[role].items()}
        outputs = {name: (element, shape(axes)) for name, (element, axes) in OUTPUTS[role].items()}
        compiled = self._graphs[role].compile({name: list(size) for name, (_, size) in inputs.items()})
        encoder = self._requests["encoder"].get((sizes["B"],)) if role == "denoiser" else None
        shared = {} if encoder is None else {"observation_kv": encoder.arrays["observation_kv"]}
        request = _Request(compiled, inputs, outputs, shared)
        self._requests[role].put(key, request)
        return request


class _Graph:
    """A lowered graph that can be compiled for fixed shapes."""

    def __init__(self, data: bytes, label: str, threads: int, precision: str) -> None:
        self._label, self._threads, self._precision = label, threads, precision
        module = _openvino()
        model = parse_model(data, label)
        lower_for_openvino(model, label)
        self.multiplies_integers = quantizes_to_integers(model)
        self.inputs: list[ValueInfoProto] = list(model.graph.input)
        self.outputs: list[ValueInfoProto] = list(model.graph.output)
        self._core = module.Core()
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError("precision: this processor has no bfloat16 products; take f32")
        try:
            self._model = self._core.read_model(serialize(model))
        except Exception as error:  # as above
            raise self._refused(error) from error

    def compile(self, shapes: Mapping[str, list[int]]) -> Any:
        """Compile for inputs of ``shapes``.

        Raises:
            EngineError: OpenVINO refuses, or does not take as many threads.
        """
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": self._precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # activations are quantized where training did and nowhere else
            "ENABLE_CPU_PINNING": False,  # cores belong to whoever is scheduled, the control tick above all
        }
        try:
            model = self._model.clone()
            model.reshape(dict(shapes))
            compiled = self._core.compile_model(model, "CPU", options)
            taken = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        except Exception as error:  # as above
            raise self._refused(error) from error
        if taken != self._threads:
            raise EngineError(f"threads: OpenVINO takes {taken} on this processor, not {self._threads}")
        return compiled

    def _refused(self, error: Exception) -> EngineError:
        version = openvino_version()
        return EngineError(f"{self._label}: OpenVINO {version} cannot load it: {first_line(error)}")


class _Request:
    """One infer request with static buffers, bound once."""

    def __init__(
        self,
        compiled: Any,
        inputs: Mapping[str, tuple[int, tuple[int, ...]]],
        outputs: Mapping[str, tuple[int, tuple[int, ...]]],
        shared: Mapping[str, NDArray[Any]],
    ) -> None:
        module = _openvino()
        self._request = compiled.create_infer_request()
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.zeros(shape, DTYPES[element]) for name, (element, shape) in (*inputs.items(), *outputs.items())
        }
        self.arrays.update(shared)
        self.shared = set(shared)
        for name, array in self.arrays.items():
            self._request.set_tensor(name, module.Tensor(array, shared_memory=True))
        self._result = self.arrays[next(iter(outputs))]

    def unshare(self, name: str) -> NDArray[Any]:
        """Bind ``name`` to an array of its own."""
        self.shared.discard(name)
        array = self.arrays[name] = np.zeros_like(self.arrays[name])
        self._request.set_tensor(name, _openvino().Tensor(array, shared_memory=True))
        return array

    def run(self) -> Float32:
        self._request.infer(share_outputs=True)  # they lie in the bound arrays: the wrapper need not copy them as well
        return self._result


def _fact(node: Any, key: str) -> str:
    """What the running graph says of a node: an attribute, or nothing."""
    found = node.get_rt_info()
    return str(found[key].value) if key in found else ""


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            f"openvino is not installed: {runtime_facts(OPENVINO).install}, or choose the runtime onnxruntime"
        ) from error
    return openvino
