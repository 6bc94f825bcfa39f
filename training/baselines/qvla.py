"""QVLA: bits for every output channel, by what quantizing it does to the actions (``algorithms.md`` section 7).

All channels start in floating point and are demoted 16 -> 8 -> 4 -> 2 -> 0 bits until the mean over all weights of the
plain linears is within the bits asked for. A channel of 0 bits is pruned: what is left of it is its bias. Activations
are those of RTN. What every method excludes (embeddings, time MLP, final layer) is no part of the mean.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from training.baselines import QuantizedPolicy
from training.baselines.allocation import CHANNEL_BITS, demote
from training.baselines.allocation_chunks import CalibrationSampler
from training.baselines.bits import FLOAT, BaselineError, Bits
from training.baselines.calibration import Calibration
from training.baselines.network import linear_names, plain_copy, plain_linears
from training.baselines.options import check_count, check_switch, no_options
from training.baselines.qvla_sensitivity import LOW_BITS, PROBES, Floats, direct_sensitivity, proxy_sensitivity
from training.baselines.qvla_store import SensitivityStore
from training.baselines.report import calls_of, finish, report
from training.baselines.rtn import quantize_activations
from training.trained import TrainedPolicy

KINDS = ("proxy", "squared_proxy", "direct")


class Qvla:
    """See the module."""

    name = "qvla"
    trains = False

    def quantize(
        self,
        policy: TrainedPolicy,
        bits: Bits,
        calibration: Calibration,
        *,
        seed: int = 0,
        sensitivity: str = "proxy",
        observations: int | None = None,
        probes: int = PROBES,
        store: str | Path | None = None,
        progress: bool = True,
        **options: Any,
    ) -> QuantizedPolicy:
        """See :class:`training.baselines.Baseline`; ``bits.weights`` is the budget, the mean over all weights.

        Args:
            policy: see there.
            bits: see there.
            calibration: see there.
            seed: of the proxy's random vectors.
            sensitivity: ``proxy``, ``squared_proxy`` (its norms squared, as the direct one is) or ``direct``, which
                samples a chunk for each channel, width and observation: hours for the full network on a CPU.
            observations: the first so many of the calibration that a direct sensitivity is measured on; all if None.
            probes: random vectors per chunk of the proxy.
            store: file that keeps a direct sensitivity layer by layer, so that it can be interrupted and reused.
            progress: show a bar.
            **options: none.

        Raises:
            BaselineError: FP8 is asked for, which has one width, or an option is none of the above.
        """
        no_options(self.name, options)
        count = len(calibration.observation)
        if bits.fp8:
            raise BaselineError("qvla: allots integer bits to channels; expected bits such as w4a4, got fp8")
        if sensitivity not in KINDS:
            raise BaselineError(f"qvla: sensitivity: expected one of {', '.join(KINDS)}, got {sensitivity!r}")
        if observations is not None:
            check_count(self.name, "observations", observations, 1)
            if sensitivity != "direct" or observations > count:
                raise BaselineError(
                    f"qvla: observations {observations}: expected 1 to the {count} of the calibration, and a direct "
                    "sensitivity (a proxy uses them all)"
                )
        check_count(self.name, "probes", probes, 1)
        check_switch(self.name, "progress", progress)
        if store is not None and (sensitivity != "direct" or not isinstance(store, str | Path)):
            raise BaselineError(f"qvla: store: expected a file, and a direct sensitivity to keep in it, got {store!r}")
        started = time.monotonic()
        if sensitivity == "direct":
            found, calls = _direct(policy, calibration, observations or count, store, progress)
        else:
            squared = sensitivity == "squared_proxy"
            with tqdm(total=count, desc="qvla proxy", unit="chunk", disable=not progress) as bar:
                found = proxy_sensitivity(
                    policy, calibration, squared=squared, probes=probes, seed=seed, progress=bar.update
                )
            calls = calls_of(calibration)
        network = plain_copy(policy.network)
        linears, names = plain_linears(network), linear_names(network)
        sizes = np.concatenate([np.full(linears[name].out_features, linears[name].in_features) for name in names])
        allotted = demote(np.concatenate([found[name] for name in names]), sizes, float(bits.weights))
        quantize_activations(network, bits, calibration)
        ends = np.cumsum([linears[name].out_features for name in names])[:-1]
        for name, rows in zip(names, np.split(allotted, ends), strict=True):
            linears[name].quantize_weight(torch.from_numpy(rows))
        finish(network)
        label = "QVLA" if bits.activations == FLOAT else "QVLA weights + RTN activations"
        return QuantizedPolicy(
            network,
            report(
                self.name,
                label,
                bits,
                network,
                calibration,
                time.monotonic() - started,
                calls,
                action_error=CalibrationSampler(policy, calibration).error(network),
                sensitivity=sensitivity,
                sensitivity_observations=observations or count,
                probes=None if sensitivity == "direct" else probes,
                backward_calls=0 if sensitivity == "direct" else probes * calls,
                budget_bits=bits.weights,
                channels={str(width): int((allotted == width).sum()) for width in CHANNEL_BITS},
            ),
        )


def _direct(
    policy: TrainedPolicy, calibration: Calibration, observations: int, store: str | Path | None, progress: bool
) -> tuple[dict[str, Floats], int]:
    """Direct sensitivities of all layers, those that are stored already read from there, and the policy calls made."""
    network = policy.network
    names = linear_names(network)
    kept = None if store is None else SensitivityStore(Path(store), policy, calibration, observations)
    found = {} if kept is None else kept.read(names)
    cases = {name: plain.out_features * len(LOW_BITS) for name, plain in plain_linears(plain_copy(network)).items()}
    made = 0
    with tqdm(total=sum(cases.values()), desc="qvla", unit="channel", disable=not progress, smoothing=0.02) as bar:
        bar.update(sum(cases[name] for name in found))
        for name in names:
            if name in found:
                continue
            found[name] = direct_sensitivity(policy, calibration, name, observations=observations, progress=bar.update)
            made += (cases[name] + 1) * observations * len(calibration.calls)
            if kept is not None:
                kept.write(found)
    return found, made
