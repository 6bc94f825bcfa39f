"""The vector-Jacobian product of a floating-point denoiser on ONNX Runtime's CPU provider."""

from __future__ import annotations

import onnxruntime as ort

from dcqfa_ros.runtime.contract import check_contract, declared
from dcqfa_ros.runtime.engine import Float32
from dcqfa_ros.runtime.engines import ONNXRUNTIME
from dcqfa_ros.runtime.errors import EngineError, first_line
from dcqfa_ros.runtime.guidance import Pullback
from dcqfa_ros.runtime.lowering import parse_model
from dcqfa_ros.runtime.ort_engine import open_session, session_options
from dcqfa_ros.runtime.vjp import COTANGENT, GRADIENT, vector_jacobian_product

_LABEL = "denoiser.onnx"


class OnnxRuntimePullback:
    """Runs a denoiser's graph forward and backward; see :class:`dcqfa_ros.runtime.guidance.Pullback`."""

    def __init__(self, denoiser: bytes, threads: int = 1, name: str = "cpu") -> None:
        """Derive and load the graph.

        Args:
            denoiser: canonical ONNX bytes.
            threads: intra-operator threads, at least 1.
            name: the variant, for reports.

        Raises:
            EngineError: not a denoiser, an operator without a derivative (quantizers among them), or ONNX Runtime
                cannot load the graph.
        """
        self.name = f"{ONNXRUNTIME}/{name}"
        model = parse_model(denoiser, _LABEL)
        check_contract("denoiser", declared(model.graph.input), declared(model.graph.output), {})
        derived = vector_jacobian_product(model, _LABEL)
        try:
            self._session: ort.InferenceSession | None = open_session(derived, session_options(threads))
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(f"{_LABEL}: its derivative cannot be loaded: {first_line(error)}") from error

    def pull(self, noisy: Float32, timestep_kv: Float32, observation_kv: Float32, cotangent: Float32) -> Float32:
        """See :meth:`Pullback.pull`.

        Raises:
            EngineError: a shape does not fit, ONNX Runtime failed, or this is closed.
        """
        if self._session is None:
            raise EngineError(f"derivative of {self.name} is closed")
        feeds = {
            "noisy": noisy, "timestep_kv": timestep_kv, "observation_kv": observation_kv, COTANGENT: cotangent
        }  # fmt: skip
        try:
            gradient: Float32 = self._session.run([GRADIENT], feeds)[0]
        except Exception as error:  # as above
            raise EngineError(f"derivative of {self.name}: {_LABEL} failed: {first_line(error)}") from error
        return gradient

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def open_pullback(runtime: str, denoiser: bytes, *, threads: int = 1, name: str) -> Pullback:
    """Open the derivative of a variant's denoiser.

    Args:
        runtime: what executes the variant.
        denoiser: canonical ONNX bytes.
        threads: threads of one operator.
        name: the variant, for reports.

    Raises:
        EngineError: the runtime gives no derivative (the message says what can be used instead), or the graph has none.
    """
    if runtime != ONNXRUNTIME:
        raise EngineError(
            f"chunking guided needs the denoiser's derivative, which runtime {runtime} does not give: "
            f"use runtime {ONNXRUNTIME}, or chunking soft or trained"
        )
    return OnnxRuntimePullback(denoiser, threads, name)
