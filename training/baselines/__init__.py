"""Baselines: other ways to quantize the same policy, on plain linears (``algorithms.md`` section 7).

All get the same bits, the same calibration and the same excluded layers; see docs/baselines.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from training.baselines.bits import BaselineError, Bits, parse_bits

if TYPE_CHECKING:
    from training.baselines.calibration import Calibration
    from training.policies.diffusion_policy_t import DiffusionPolicyT
    from training.trained import TrainedPolicy

__all__ = ["BASELINES", "Baseline", "BaselineError", "Bits", "QuantizedPolicy", "find_baseline", "parse_bits"]


@dataclass(frozen=True, slots=True)
class QuantizedPolicy:
    """What a baseline makes of a policy.

    Attributes:
        network: quantized, called as the full-precision network is; :class:`training.torch_engine.TorchEngine` runs it.
        report: JSON-ready: method, bits, what is excluded, sizes, what a device executes, calibration, effort.
    """

    network: DiffusionPolicyT
    report: dict[str, Any]


class Baseline(Protocol):
    """A method that quantizes a policy.

    Attributes:
        name: of the method.
        trains: it needs a trained checkpoint of its own (option ``trained``) and not calibration alone.
    """

    name: str
    trains: bool

    def quantize(
        self, policy: TrainedPolicy, bits: Bits, calibration: Calibration, *, seed: int = 0, **options: Any
    ) -> QuantizedPolicy:
        """Quantize ``policy``, which is left as it is.

        Raises:
            BaselineError: the method has no such bits or options, or does not fit the policy.
        """
        ...


_MODULES = {
    "rtn": "training.baselines.rtn:Rtn",
    "smoothquant": "training.baselines.smoothquant:SmoothQuant",
    "awq": "training.baselines.awq:Awq",
    "hadamard": "training.baselines.hadamard:Hadamard",
    "sqil": "training.baselines.sqil:Sqil",
    "batchquant": "training.baselines.batchquant:BatchQuantSupernet",
    "qvla": "training.baselines.qvla:Qvla",
    "da_ptq": "training.baselines.da_ptq:DaPtq",
}
"""Where every method is: ``module:class``; a new one is one line here."""


class _Baselines(Mapping[str, Baseline]):
    """The methods by name, imported when they are asked for."""

    def __getitem__(self, name: str) -> Baseline:
        module, _, attribute = _MODULES[name].partition(":")
        made: Baseline = getattr(import_module(module), attribute)()
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


BASELINES: Mapping[str, Baseline] = _Baselines()


def find_baseline(name: str) -> Baseline:
    """The method called ``name``.

    Raises:
        BaselineError: there is none.
    """
    if name not in BASELINES:
        raise BaselineError(f"method {name!r}: expected one of {', '.join(BASELINES)}")
    return BASELINES[name]
