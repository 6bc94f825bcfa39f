"""Torch on CUDA: an engine for GPUs without TensorRT.

Integer layers multiply int8 codes exactly, FP8 layers FP8 codes, FP16 layers in half; a denoising step is one CUDA
graph per batch and number of tokens. The same program runs on the processor (``device="cpu"``), where it is tested.
**Execution on a GPU has never been exercised by the authors**; ``docs/torch_engine.md`` says what was checked instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.runtime.contract import INPUTS, check_contract, require_roles
from dcqfa_ros.runtime.engine import ROLES, Float32, Int64
from dcqfa_ros.runtime.engines import TORCH_CUDA, runtime_facts
from dcqfa_ros.runtime.errors import EngineError, first_line
from dcqfa_ros.runtime.recent import Recent
from dcqfa_ros.runtime.torch_graph import read_graph
from dcqfa_ros.runtime.torch_nodes import FLOAT, Graph

if TYPE_CHECKING:
    import torch

    from dcqfa_ros.runtime.torch_binding import Binding
    from dcqfa_ros.runtime.torch_program import Network

_CACHED_BINDINGS = 8  # of each graph
Activations = Literal["float16", "float32"]


class TorchCudaEngine:
    """An :class:`~dcqfa_ros.runtime.engine.Engine` on torch.

    Attributes:
        name: ``torch_cuda/<name given>``, or ``torch_cpu/<name given>`` on the processor.
        activations: type of what is not quantized, between layers; layer norms and softmax sum in float32.
        linears: role -> name of a linear layer's weight -> how it is multiplied: ``int8``, ``fp8``, ``float16``,
            ``float32``.
        dims: sizes that the graphs fix, by axis letter of the contract.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        name: str = "gpu",
        device: str = "cuda",
        activations: Activations | None = None,
    ) -> None:
        """Read the three graphs and put them on the device; CUDA graphs are captured when a shape is first run.

        The time-step graph is a table that is read once per number of steps: it always stays in host memory.

        Args:
            files: role ("encoder", "timestep", "denoiser") -> canonical ONNX bytes.
            name: the variant, for reports.
            device: ``cuda``, ``cuda:<number>`` or ``cpu``.
            activations: type of what is not quantized; default float32 on the processor and for variants whose linear
                layers are all in float32, float16 for the others.

        Raises:
            EngineError: torch is missing, was built without CUDA or finds no GPU (the message says what to do), a role
                is missing, a graph holds what the exporter does not write or breaks the contract, or the device cannot
                multiply a layer.
        """
        require_roles(files, name)
        if activations not in (None, "float16", "float32"):
            raise EngineError(f"activations: expected float16 or float32, got {activations!r}")
        self._torch = _import_torch()
        self._device, captured = place_of(device)
        graphs = {role: read_graph(files[role], f"{role}.onnx") for role in ROLES}
        self.dims: dict[str, int] = {}
        for role, graph in graphs.items():
            check_contract(role, graph.inputs, graph.outputs, self.dims)
        self.name = f"{TORCH_CUDA if captured else 'torch_cpu'}/{name}"
        self.activations = activations or ("float16" if captured and _is_reduced(graphs.values()) else "float32")
        self.linears = {role: self._kinds(role, graph) for role, graph in graphs.items()}
        self._bindings: dict[str, Recent[tuple[int, ...], Binding]] = {role: Recent(_CACHED_BINDINGS) for role in ROLES}
        self._networks: dict[str, Network] = {}
        self._stream: torch.cuda.Stream | None = None
        self._closed = False
        try:
            self._load(graphs, captured)
        except RuntimeError as error:  # out of device memory, a broken driver
            self.close()
            raise self._failed("variant", error) from error

    def observation_kv(self, observation: Float32) -> Float32:
        """See :meth:`Engine.observation_kv`.

        Raises:
            EngineError: a shape does not fit, torch failed (the message names the graph), or the engine is closed.
        """
        return self._run("encoder", {"observation": observation})

    def timestep_kv(self, timesteps: Int64) -> Float32:
        """See :meth:`Engine.timestep_kv`.

        Raises:
            EngineError: as :meth:`observation_kv`.
        """
        return self._run("timestep", {"timesteps": timesteps})

    def denoise(
        self, noisy: Float32, timestep_kv: Float32, observation_kv: Float32, out: Float32 | None = None
    ) -> Float32:
        """See :meth:`Engine.denoise`. The first call with a batch and number of tokens captures a CUDA graph.

        Raises:
            EngineError: as :meth:`observation_kv`, or the CUDA graph cannot be captured.
        """
        inputs = {"noisy": noisy, "timestep_kv": timestep_kv, "observation_kv": observation_kv}
        result = self._run("denoiser", inputs)
        if out is None:
            return result
        np.copyto(out, result)
        return out

    def close(self) -> None:
        """Drop CUDA graphs, buffers and weights, and give torch's cached device memory back."""
        if self._closed:
            return
        self._closed = True
        for bindings in self._bindings.values():
            bindings.clear()
        self._networks.clear()
        if self._stream is not None:
            self._stream = None
            self._torch.cuda.empty_cache()

    def _load(self, graphs: Mapping[str, Graph], captured: bool) -> None:
        from dcqfa_ros.runtime.torch_program import Network

        torch = self._torch
        dtype = torch.float16 if self.activations == "float16" else torch.float32
        with torch.inference_mode():
            for role, graph in graphs.items():
                if role == "timestep":
                    self._networks[role] = Network(graph, torch.float32, torch.device("cpu"))
                else:
                    self._networks[role] = Network(graph, dtype, self._device)
            if captured:
                # Sums of half products in half would differ from the float32 ones that layers were trained with.
                torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
                torch.cuda.synchronize(self._device)  # weights went by the default stream, for which ours never waits
                self._stream = torch.cuda.Stream(self._device)

    def _run(self, role: str, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        if self._closed:
            raise EngineError(f"engine {self.name} is closed")
        key = tuple(size for name in inputs for size in inputs[name].shape)
        binding = self._bindings[role].get(key)
        try:
            with self._torch.inference_mode():
                if binding is None:
                    binding = self._bind(role, key, inputs)
                for name, given in inputs.items():
                    np.copyto(binding.arrays[name], given)
                return binding.run()
        except EngineError as error:
            raise EngineError(f"engine {self.name}: {error}") from error
        except (RuntimeError, IndexError, TypeError) as error:
            raise self._failed(f"{role}.onnx", error) from error

    def _bind(self, role: str, key: tuple[int, ...], inputs: Mapping[str, NDArray[Any]]) -> Binding:
        from dcqfa_ros.runtime.torch_binding import CapturedBinding, HostBinding

        sizes = dict(self.dims)
        for name, given in inputs.items():
            axes = INPUTS[role][name][1]
            expected = tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in axes)
            fits = len(expected) == given.ndim and all(
                size == axis if isinstance(axis, int) else size >= 1
                for size, axis in zip(given.shape, expected, strict=True)
            )
            if not fits:
                raise EngineError(f"{name} has shape {given.shape}, expected {expected}")
            sizes.update((a, s) for a, s in zip(axes, given.shape, strict=True) if isinstance(a, str))
        network, shapes = self._networks[role], {name: given.shape for name, given in inputs.items()}
        binding: Binding
        if self._stream is None or role == "timestep":
            binding = HostBinding(network, shapes)
        else:
            binding = CapturedBinding(network, shapes, self._stream)
        self._bindings[role].put(key, binding)
        return binding

    def _kinds(self, role: str, graph: Graph) -> dict[str, str]:
        floats = "float32" if role == "timestep" else self.activations
        return {weight: floats if kind == FLOAT else kind for weight, kind in graph.linears.items()}

    def _failed(self, what: str, error: Exception) -> EngineError:
        return EngineError(f"engine {self.name}: {what} failed: {first_line(error)}")


def place_of(device: str) -> tuple[torch.device, bool]:
    """Return the device that tensors lie on, and whether steps are captured as CUDA graphs.

    Raises:
        EngineError: not ``cpu`` or a CUDA device, or torch cannot use it; the message says what to do.
    """
    torch = _import_torch()
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise EngineError(f"device {device!r}: expected cuda, cuda:<number> or cpu") from error
    if place.type == "cpu":
        return place, False
    if place.type != "cuda":
        raise EngineError(f"device {device!r}: expected cuda, cuda:<number> or cpu")
    otherwise = "or choose the runtime onnxruntime"
    if torch.version.cuda is None:
        raise EngineError(
            f"device {device!r}: torch {torch.__version__} was built without CUDA: {_install()}, {otherwise}"
        )
    if not torch.cuda.is_available():
        raise EngineError(
            f"device {device!r}: torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU; check the driver "
            f"(nvidia-smi), its version and CUDA_VISIBLE_DEVICES, {otherwise}"
        )
    count = torch.cuda.device_count()
    if place.index is not None and place.index >= count:
        raise EngineError(f"device {device!r}: there are {count} GPUs, numbered from 0")
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index), True


def _is_reduced(graphs: Any) -> bool:
    """Tell whether any linear layer is multiplied in fewer bits than float32."""
    return any(kind != FLOAT for graph in graphs for kind in graph.linears.values())


def _install() -> str:
    return runtime_facts(TORCH_CUDA).install


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise EngineError(f"torch is not installed: {_install()}, or choose the runtime onnxruntime") from error
    return torch
