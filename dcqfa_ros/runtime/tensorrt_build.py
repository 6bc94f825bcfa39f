"""From a lowered ONNX graph to a serialized engine, by TensorRT (for this device) or TensorRT-RTX (for named ones).

Both modules have one Python API; :class:`Flavour` holds what differs. TensorRT builds on the device it will run on.
TensorRT-RTX compiles for named compute capabilities without a GPU and finishes on the device that loads the engine.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from dcqfa_ros.runtime.capability import MINIMUM_CAPABILITY, dotted
from dcqfa_ros.runtime.engines import RUNTIMES, TENSORRT, TENSORRT_RTX, version_refusal
from dcqfa_ros.runtime.errors import EngineError

_MESSAGES = 20
_STARVED = re.compile(r"out of memory|OutOfMemory|bad_alloc|insufficient memory", re.IGNORECASE)
_building = threading.Lock()  # TensorRT has one logger per process: messages of two builds would mix


@dataclass(frozen=True, slots=True)
class Flavour:
    """TensorRT or TensorRT-RTX.

    Attributes:
        runtime: its name in bundles and reports.
        module: the Python module, imported when it is needed.
        names_capability: whether a build names the compute capabilities it is for.
    """

    runtime: str
    module: str
    names_capability: bool


FLAVOURS: Mapping[str, Flavour] = {
    TENSORRT: Flavour(TENSORRT, RUNTIMES[TENSORRT].package, names_capability=False),
    TENSORRT_RTX: Flavour(TENSORRT_RTX, RUNTIMES[TENSORRT_RTX].package, names_capability=True),
}


class RefusedPlanError(EngineError):
    """A serialized engine is not one that this runtime runs here: damaged, of another version or device, or graph."""


def load_flavour(name: str) -> tuple[Flavour, ModuleType]:
    """Import the module of a flavour.

    Raises:
        EngineError: no such flavour, the module is missing or broken, or TensorRT is too old.
    """
    flavour = FLAVOURS.get(name)
    if flavour is None:
        raise EngineError(f"flavour: expected one of {', '.join(FLAVOURS)}, got {name!r}")
    facts = RUNTIMES[name]
    try:
        module = importlib.import_module(flavour.module)
    except (ImportError, OSError) as error:  # OSError: a library of another CUDA or C library
        raise EngineError(f"runtime {name} is not installed ({error}): {facts.install}") from error
    refusal = version_refusal(facts, str(module.__version__))
    if refusal:
        raise EngineError(f"runtime {name}: {refusal}")
    return flavour, module


def require_capability(capability: tuple[int, int], needs: Iterable[str], label: str) -> None:
    """Refuse element types that a device does not multiply, before the builder is asked.

    TensorRT has silently built broken engines for types the hardware lacks (FP8 on Orin), so nothing is left to it.

    Args:
        capability: compute capability, for example (8, 7).
        needs: element types, keys of ``MINIMUM_CAPABILITY``.
        label: the file or variant, for the message.

    Raises:
        EngineError: names the type, the capability it needs and the one there is.
    """
    for name in sorted(needs):
        minimum = MINIMUM_CAPABILITY[name]
        if capability < minimum:
            raise EngineError(
                f"{label}: {name.upper()} needs compute capability {dotted(minimum)} or newer, this build is for "
                f"{dotted(capability)}; choose another variant"
            )


def build_target(flavour: Flavour, module: Any, capability: tuple[int, int], label: str) -> Any:
    """The member of ``ComputeCapability`` to build for; None where the builder takes the device present.

    Raises:
        EngineError: the runtime does not build for that capability; the message names those it builds for.
    """
    if not flavour.names_capability:
        return None
    members = module.ComputeCapability.__members__
    name = f"SM{capability[0]}{capability[1]}"
    if name not in members:
        known = ", ".join(sorted((m[2:-1] + "." + m[-1] for m in members if m.startswith("SM")), key=float))
        raise EngineError(
            f"{label}: {flavour.runtime} {module.__version__} does not build for compute capability "
            f"{dotted(capability)}; it builds for {known}"
        )
    return members[name]


def build_engine(
    flavour: Flavour,
    module: Any,
    onnx: bytes,
    label: str,
    capability: tuple[int, int],
    needs: Iterable[str],
) -> bytes:
    """Parse a lowered ONNX graph with static shapes and build it.

    Args:
        flavour: which of the two.
        module: its imported module.
        onnx: the graph; all dimensions of its inputs fixed (:func:`~dcqfa_ros.runtime.lowering_tensorrt.fix_sizes`).
        label: what to call the file in errors.
        capability: of the device the engine is for. TensorRT builds for the device present, whose capability this is.
        needs: element types the graph multiplies, from the lowering.

    Returns:
        The serialized engine.

    Raises:
        EngineError: the device lacks a type, the runtime does not build for it, or parser or builder failed; the
            message holds what they said.
    """
    require_capability(capability, needs, label)
    target = build_target(flavour, module, capability, label)
    with _building:
        logger = logger_of(module)
        logger.messages.clear()
        builder = module.Builder(logger)
        if builder is None:
            raise EngineError(f"{label}: no builder{said(logger)}")
        network = builder.create_network(_network_flags(module))
        parser = module.OnnxParser(network, logger)
        if not parser.parse(onnx):
            errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
            raise EngineError(
                f"{label}: {flavour.runtime} {module.__version__} cannot parse it: {'; '.join(errors) or 'no reason'}"
            )
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if any(size < 0 for size in tensor.shape):
                raise EngineError(f"{label}: input {tensor.name!r} has open dimensions {tuple(tensor.shape)}")
        config = builder.create_builder_config()
        if hasattr(module.BuilderFlag, "TF32"):  # FP32 means FP32: what is recorded as executed is executed
            config.clear_flag(module.BuilderFlag.TF32)
        if target is not None:
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(target, 0):
                raise EngineError(f"{label}: {flavour.runtime} refuses compute capability {dotted(capability)}")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"{label}: {flavour.runtime} {module.__version__} cannot build it for compute capability "
                f"{dotted(capability)}{said(logger)}"
            )
        return bytes(plan)


def build_flags(flavour: Flavour) -> tuple[str, ...]:
    """What a build asks for beyond the graph, for the cache's key."""
    return ("strongly_typed", "no_tf32", *(("one_capability",) if flavour.names_capability else ()))


def deserialize(module: Any, plan: bytes, label: str) -> tuple[Any, Any]:
    """Load a serialized engine.

    Returns:
        The runtime, which must outlive the engine, and the engine.

    Raises:
        RefusedPlanError: it is damaged, or of another version or device.
        EngineError: it may be sound, but memory ran out.
    """
    logger = logger_of(module)
    logger.messages.clear()
    runtime = module.Runtime(logger)
    engine = None if runtime is None else runtime.deserialize_cuda_engine(plan)
    if engine is None:
        starved = runtime is None or any(_STARVED.search(message) for message in logger.messages)
        raise (EngineError if starved else RefusedPlanError)(f"{label}: the engine cannot be loaded{said(logger)}")
    return runtime, engine


@cache
def logger_of(module: Any) -> Any:
    """The logger of a module: TensorRT keeps the first one it is given, so there is one per process.

    Its attribute ``messages`` holds the last warnings and errors.
    """

    class Collector(module.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors for the message of an exception instead of printing them."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR, module.ILogger.WARNING):
                self.messages.append(" ".join(message.split()))

    return Collector()


def said(logger: Any) -> str:
    """What TensorRT has said since the last build or load, as the end of a message."""
    return f": {'; '.join(logger.messages)}" if logger.messages else " and does not say why"


def _network_flags(module: Any) -> int:
    """Strong typing: a flag up to TensorRT 10, where it may be missing afterwards because nothing else exists."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_error(error: Any) -> str:
    node = error.node_name() or error.node_operator()
    return f"{node}: {error.desc()}" if node else str(error.desc())
