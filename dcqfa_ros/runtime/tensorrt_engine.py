"""TensorRT and TensorRT-RTX on an NVIDIA GPU.

Every graph is built for the exact shapes that are asked for (batch, action tokens, noise levels), at their first use or
by :meth:`TensorRtEngine.prepare`, and kept in a cache on disk (:mod:`dcqfa_ros.runtime.tensorrt_cache`). Building takes
seconds to minutes: it belongs into start and warm-up. Lowering, parsing and building are exercised without a GPU by
TensorRT-RTX; execution on a GPU has not been exercised by the authors (``docs/tensorrt.md``).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.runtime.contract import DTYPES, INPUTS, OUTPUTS, check_contract, declared, require_roles
from dcqfa_ros.runtime.cudart import CudaError, CudaRuntime
from dcqfa_ros.runtime.engine import ROLES, Float32, Int64
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.lowering import parse_model
from dcqfa_ros.runtime.lowering_tensorrt import fix_sizes, lower_for_tensorrt, wants_half
from dcqfa_ros.runtime.recent import Recent
from dcqfa_ros.runtime.tensorrt_build import (
    RefusedPlanError,
    build_engine,
    build_flags,
    build_target,
    dotted,
    load_flavour,
    require_capability,
)
from dcqfa_ros.runtime.tensorrt_cache import EngineCache, EngineKey
from dcqfa_ros.runtime.tensorrt_plan import StaticPlan

_KEPT_SHAPES = 8  # per graph


class TensorRtEngine:
    """An :class:`~dcqfa_ros.runtime.engine.Engine` on TensorRT or TensorRT-RTX.

    It belongs to the thread that made it: execution contexts and the choice of the device do. Only :meth:`close` may be
    called from another one.

    Attributes:
        name: ``<flavour>/<name given>``.
        executed: role -> name of a linear's weight -> bits of its product.
        float32: role -> node that stays FP32 in an FP16 graph -> why.
        notes: what was not as it should be and was mended: damaged cache entries, refused captures.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        name: str = "gpu",
        cache: Path | None = None,
        flavour: str = "tensorrt",
        *,
        weight_only: bool = False,
        cuda: CudaRuntime | None = None,
    ) -> None:
        """Lower the three graphs and check them against the device; nothing is built yet.

        Args:
            files: role ("encoder", "timestep", "denoiser") -> canonical ONNX bytes.
            name: the variant, for reports.
            cache: folder of built engines; default: the user's.
            flavour: ``tensorrt`` or ``tensorrt_rtx``.
            weight_only: run linears with 4-bit weights as W4A16.
            cuda: a loaded CUDA runtime; default: the one that is found.

        Raises:
            EngineError: a role, the runtime, the CUDA runtime or the device is missing; a graph cannot be lowered, is
                not as the contract says, or multiplies a type that the device lacks.
        """
        require_roles(files, name)
        self._flavour, self._module = load_flavour(flavour)
        self._cuda = cuda or CudaRuntime()
        if self._cuda.device_count() < 1:
            raise EngineError(f"engine {flavour}/{name}: no CUDA device")
        self._cuda.set_device(0)
        self._capability = self._cuda.compute_capability()
        self.name = f"{flavour}/{name}"
        build_target(self._flavour, self._module, self._capability, f"engine {self.name}")
        self.executed: dict[str, Mapping[str, Bits]] = {}
        self.float32: dict[str, Mapping[str, str]] = {}
        self.notes: list[str] = []
        self.dims: dict[str, int] = {}  # sizes the graphs fix and share, by axis letter
        self._lowered: dict[str, bytes] = {}
        self._needs: dict[str, frozenset[str]] = {}
        models = {role: parse_model(files[role], f"{role}.onnx") for role in ROLES}
        half = any(wants_half(model) for model in models.values())
        for role, model in models.items():
            check_contract(role, declared(model.graph.input), declared(model.graph.output), self.dims)
            lowering = lower_for_tensorrt(model, f"{role}.onnx", half=half, weight_only=weight_only and half)
            require_capability(self._capability, lowering.needs, f"engine {self.name}: {role}.onnx")
            self.executed[role], self.float32[role] = lowering.executed, lowering.float32
            self._needs[role] = lowering.needs
            self._lowered[role] = model.SerializeToString(deterministic=True)
        self._cache = EngineCache(cache)
        self._plans: dict[str, Recent[tuple[int, ...], StaticPlan]] = {role: Recent(_KEPT_SHAPES) for role in ROLES}
        self._results: dict[int, Float32] = {}  # of plan -> the array that callers get
        self._thread = threading.get_ident()
        self._closed = False
        self._stream = self._cuda.create_stream()

    def prepare(self, batch: int, tokens: int, levels: int) -> None:
        """Build or load, and capture, what a policy of these shapes needs, so that its first chunk waits for nothing.

        Args:
            batch: rows B.
            tokens: action tokens T.
            levels: noise levels S.

        Raises:
            EngineError: building, loading or running failed.
        """
        for plan in (
            self._plan("encoder", batch),
            self._plan("timestep", levels),
            self._plan("denoiser", batch, tokens),
        ):
            self._run(plan)

    def observation_kv(self, observation: Float32) -> Float32:
        """See :meth:`Engine.observation_kv`."""
        plan = self._plan("encoder", len(observation))
        self._fill(plan, "observation", observation)
        return self._result(plan, "observation_kv")

    def timestep_kv(self, timesteps: Int64) -> Float32:
        """See :meth:`Engine.timestep_kv`."""
        plan = self._plan("timestep", len(timesteps))
        self._fill(plan, "timesteps", timesteps)
        return self._result(plan, "timestep_kv")

    def denoise(
        self, noisy: Float32, timestep_kv: Float32, observation_kv: Float32, out: Float32 | None = None
    ) -> Float32:
        """See :meth:`Engine.denoise`. Inputs are copied to page-locked buffers; nothing is allocated.

        Raises:
            EngineError: a shape does not fit, the device failed, another thread calls, or the engine is closed.
        """
        plan = self._plan("denoiser", *noisy.shape[:2])
        self._fill(plan, "noisy", noisy)
        self._fill(plan, "timestep_kv", timestep_kv)
        self._fill(plan, "observation_kv", observation_kv)
        return self._result(plan, "noise", out)

    def close(self) -> None:
        """Free contexts, buffers and the stream."""
        if self._closed:
            return
        self._closed = True
        for plans in self._plans.values():
            for plan in plans:
                plan.close()
            plans.clear()
        self._results.clear()
        self._lowered.clear()
        try:
            self._cuda.destroy_stream(self._stream)
        except CudaError as error:  # a device that has failed refuses even this, and the failure was reported
            self.notes.append(str(error))

    def _plan(self, role: str, *key: int) -> StaticPlan:
        """The plan of a graph for (B,), (S,) or (B, T); built where there is none yet."""
        if self._closed:
            raise EngineError(f"engine {self.name} is closed")
        if threading.get_ident() != self._thread:
            raise EngineError(f"engine {self.name} belongs to the thread that made it; open one engine per thread")
        plans = self._plans[role]
        plan = plans.get(key)
        if plan is None:
            plan = self._load(role, key)
            old = plans.put(key, plan)
            if old is not None:  # only now: a shape that cannot be loaded costs none of those there are
                self._results.pop(id(old), None)
                old.close()
        return plan

    def _load(self, role: str, key: tuple[int, ...]) -> StaticPlan:
        sizes = dict(zip({"encoder": "B", "timestep": "S", "denoiser": "BT"}[role], key, strict=True))
        if min(key) < 1:
            raise EngineError(f"engine {self.name}: {role} of shape {sizes}; expected sizes of at least 1")
        label = f"{role}.onnx ({', '.join(f'{axis}={size}' for axis, size in sizes.items())})"
        model = onnx.load_model_from_string(self._lowered[role])
        fix_sizes(model, sizes)
        graph = model.SerializeToString(deterministic=True)
        del model
        cache_key = EngineKey(
            onnx_sha256=hashlib.sha256(graph).hexdigest(),
            runtime=self._flavour.runtime,
            version=str(self._module.__version__),
            capability=dotted(self._capability),
            multiprocessors=self._cuda.multiprocessors(),
            driver=self._cuda.driver(),
            flags=build_flags(self._flavour),
        )

        def build() -> bytes:
            return build_engine(self._flavour, self._module, graph, label, self._capability, self._needs[role])

        found = self._cache.get(cache_key, build)
        self.notes.extend(found.notes)
        expected = self._expected(role, sizes)
        try:
            return StaticPlan(self._cuda, self._module, found.plan, self._stream, expected, label)
        except RefusedPlanError as error:
            if found.built:
                raise
            # Whole, and still not loaded: what the key does not know has changed. Built once more, not trusted.
            found = self._cache.get(cache_key, build, rejected=str(error))
            self.notes.extend(found.notes)
        return StaticPlan(self._cuda, self._module, found.plan, self._stream, expected, label)

    def _expected(self, role: str, sizes: Mapping[str, int]) -> dict[str, tuple[bool, tuple[int, ...], type]]:
        known = {**self.dims, **sizes}
        return {
            name: (
                table is INPUTS,
                tuple(known[axis] if isinstance(axis, str) else axis for axis in axes),
                DTYPES[element],
            )
            for table in (INPUTS, OUTPUTS)
            for name, (element, axes) in table[role].items()
        }

    def _fill(self, plan: StaticPlan, name: str, given: NDArray[Any]) -> None:
        bound = plan.inputs[name]
        if given.shape != bound.shape:
            raise EngineError(f"engine {self.name}: {name} has shape {given.shape}, expected {bound.shape}")
        np.copyto(bound, given)

    def _run(self, plan: StaticPlan) -> None:
        refused = plan.capture_refused
        try:
            plan.run()
        except EngineError as error:
            raise EngineError(f"engine {self.name}: {error}") from error
        if plan.capture_refused is not refused:
            self.notes.append(f"no CUDA graph: {plan.capture_refused}")

    def _result(self, plan: StaticPlan, name: str, out: Float32 | None = None) -> Float32:
        """Run a plan and copy its output out of page-locked memory, which ends with the engine."""
        self._run(plan)
        output = plan.outputs[name]
        if out is None:
            out = self._results.get(id(plan))
            if out is None:
                out = self._results[id(plan)] = np.empty(output.shape, np.float32)
        np.copyto(out, output)
        return out
