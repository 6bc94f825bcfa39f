"""Opens the entries of a comparison, each from its own kind of source."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.devices.detect import detect
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.runtime.engine import ROLES
from training.checkpoint import CHECKPOINT, load_checkpoint
from training.checkpoint_engine import refuse_images
from training.compare.config import CompareConfig, CompareError, Entry, found, missing_source
from training.compare.contenders import (
    FLOAT_TABLE,
    MIB,
    ONNX,
    SIMULATED,
    Contender,
    Executes,
    Runnable,
    bits_of,
    by_table,
    device_executes,
    on_this_processor,
)
from training.compare.cost import Cost, training_cost
from training.compare.exported import check_export
from training.config import load_config
from training.evaluate import check_push_t
from training.export.diffusion_policy_t import export_graphs
from training.export.half import HalfTablePolicy, half_graphs, round_weights
from training.export.subnets import REST, TOLERANCE, AsStored, precision_name
from training.full_precision import load_full_precision
from training.lut import load_table
from training.policies.diffusion_policy_t import DiffusionPolicyT, parameter_count
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policy_shape import PolicyShape
from training.space import SearchSpace, SpaceError
from training.space_config import SpaceConfig
from training.space_counts import paper_bytes, parameters
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.torch_engine import TorchEngine
from training.trained import TrainedPolicy, policy_meaning
from training.warm_start import state_sha256

if TYPE_CHECKING:
    from training.baselines import Baseline, Bits

EXPORT_RMS = 1e-5  # of full precision, as the exporter's own bound


class Opener:
    """Opens the entries of a comparison; what several of them share is read once."""

    def __init__(self, config: CompareConfig, data: str | None = None) -> None:
        """Take the comparison, and another path of the demonstrations than it says."""
        self.config = config
        self._data = data or config.data
        self._supernets: dict[str, tuple[TrainedSupernet, str, Cost]] = {}
        self._bundles: dict[Path, Bundle] = {}

    def check(self, entry: Entry) -> None:
        """Refuse what is wrong with an entry and can be told without opening it.

        Raises:
            UserError: a file is not there, or a baseline, its bits or its checkpoint are unknown.
        """
        if entry.bundle is not None:
            find_bundle(str(found(entry.bundle)))
        missing = missing_source(entry)
        if missing is not None:
            raise CompareError(
                f"entry {entry.name}: {' '.join(missing)}: no such run or checkpoint; train it, or leave the entry out "
                "with --only and the names of the others, or by giving the command that makes it as made_by"
            )
        if entry.baseline is not None:
            method, _ = _asked(entry)
            if method.trains != (entry.trained is not None):
                raise CompareError(
                    f"entry {entry.name}: baseline {entry.baseline} "
                    + ("trains: name its checkpoint with trained" if method.trains else "takes no checkpoint (trained)")
                )

    def open(self, entry: Entry) -> Contender:
        """Open one entry, and check that it belongs to the comparison.

        Raises:
            CompareError: other data, another full-precision policy, or other bits than the file says.
            UserError: a file is missing or damaged, or a name is unknown.
        """
        opened: Contender = getattr(self, f"_{entry.kind}")(entry)
        check_push_t(opened.runnable.spec)
        for field, have, expected in (
            ("data", opened.data, (self.config.data_sha256,)),
            ("policy", opened.origin, self.config.policy_sha256),
        ):
            if have is None and field not in entry.stated:
                raise CompareError(
                    f"entry {entry.name}: its files do not record its {field}, so it may be another one; if you know "
                    f"that it is the comparison's, say so with stated: [{field}]"
                )
            if have is not None and have not in expected:
                raise CompareError(
                    f"entry {entry.name}: comes from other {'demonstrations' if field == 'data' else 'weights'} than "
                    f"the comparison: field {field} is {have}, expected {' or '.join(expected)} ({field}_sha256); "
                    "leave it out, or compare it with entries of its own kind"
                )
        return opened

    # Shared --------------------------------------------------------------------------------------------------------

    @cached_property
    def training(self) -> Any:
        """Training configuration of the full-precision policy."""
        return load_config(found(self.config.training))

    @cached_property
    def shape(self) -> PolicyShape:
        """The policy, with the tokens that a robot executes."""
        policy = self.training.policy
        return diffusion_policy_t_shape(policy, policy.observation_horizon - 1 + self.training.executed_actions)

    @cached_property
    def full_precision(self) -> tuple[TrainedPolicy, str]:
        """The full-precision policy that baselines quantize, and its SHA-256."""
        return load_full_precision(found(self.config.policy), self.training)

    @property
    def policy(self) -> TrainedPolicy:
        """The full-precision policy that baselines quantize."""
        return self.full_precision[0]

    @cached_property
    def demonstrations(self) -> Any:
        """The demonstrations that baselines calibrate on.

        Raises:
            CompareError: they are not those of the comparison.
            UserError: they cannot be read.
        """
        from training.baselines.calibration import calibration_data

        data = calibration_data(self.policy, self._data)
        if data.sha256 != self.config.data_sha256:
            raise CompareError(
                f"{self._data or self.policy.config.data.path}: field data_sha256 is {data.sha256}, expected "
                f"{self.config.data_sha256}; give the demonstrations of the comparison with --data"
            )
        return data

    @cached_property
    def _calibration(self) -> Any:
        """The observations that every baseline shares."""
        from training.baselines.calibration import calibrate

        data = self.demonstrations
        torch.set_num_threads(1)
        return calibrate(self.policy, data)

    @cached_property
    def _device(self) -> tuple[str, Executes]:
        """The device of the column of latencies, and how it executes bits."""
        if self.config.latency.table is None:
            processor = detect().processor
            return processor.model, on_this_processor(processor)
        table = load_table(found(self.config.latency.table))
        return table.name, by_table(table)

    def _executes(self, entry: Entry, subnet: Subnet | None) -> str | None:
        """What that device executes of an exported entry."""
        return device_executes(bits_of(entry.bits, subnet), *self._device)

    def _open_bundle(self, path: Path) -> Bundle:
        if path not in self._bundles:
            self._bundles[path] = load_bundle(path)
        return self._bundles[path]

    def whole(self, bits: str) -> Subnet | None:
        """The whole network at equal bits, as the look-up tables know it."""
        config = self.training.policy
        w, a = {"w8a8": (8, 8), "w4a4": (4, 4)}.get(bits, (0, 0))
        if not w:
            known = {"fp32": Precision.FP32, "fp16": Precision.FP16, "fp8": Precision.FP8}
            if bits not in known:
                return None
            w = a = FLOAT_BITS[known[bits]]
        layer = Layer(config.heads, config.ffn_ratio * config.dim, w, a)
        return Subnet((layer,) * config.depth, Precision.INT if bits in ("w8a8", "w4a4") else known[bits])

    # Kinds of entries ----------------------------------------------------------------------------------------------

    def _bundle(self, entry: Entry) -> Contender:
        assert entry.bundle is not None
        bundle = self._open_bundle(find_bundle(str(found(entry.bundle))))
        spec, name = bundle.spec, entry.variant or bundle.spec.default_variant
        variant = next((v for v in spec.variants if v.name == name), None)
        if variant is None:
            known = ", ".join(v.name for v in spec.variants)
            raise CompareError(f"entry {entry.name}: variant {name}: bundle {spec.name} has none; it has {known}")
        _check_bits(entry, variant.precision)
        record = variant.training or spec.training
        whole = next((v.weights for v in spec.variants if v.precision == "fp32" and v.subnet is None), None)
        stated = entry.cost
        trained = variant.subnet is not None
        subnet = self._space(spec).parse(variant.subnet) if variant.subnet is not None else self.whole(entry.bits)
        return Contender(
            entry,
            Runnable(spec, {role: bundle.read(name, role) for role in ROLES}, None),
            variant.weights,
            record.data_sha256 or (variant.calibration.data_sha256 if variant.calibration else None),
            whole,
            ONNX,
            self._executes(entry, subnet),
            subnet,
            _size(variant.size.parameters, variant.size.paper_bytes, variant.size.disk_bytes, "graphs on disk"),
            Cost(
                steps=record.steps if trained else None,
                hours=stated.hours if stated else None,
                teacher_calls=stated.teacher_calls if stated else None,
                policy_calls=variant.calibration.samples if variant.calibration else None,
                source="; ".join(
                    [f"{record.steps} steps by the bundle" if trained else "the full-precision policy itself, or none"]
                    + ([stated.source] if stated else [])
                ),
            ),
        )

    def _space(self, spec: BundleSpec) -> SearchSpace:
        """A space in which the names of any bundle's subnets can be read."""
        size, blocks = spec.architecture, self.shape.blocks
        shares = tuple(count / size.heads for count in range(1, size.heads + 1))
        widths = tuple(size.dim * number / size.ffn_dim for number in range(1, size.ffn_dim // size.dim + 1))
        groups = {block.group: 1 for block in blocks}
        config = SpaceConfig(min_depth=groups, head_ratios=shares, mlp_ratios=widths)
        return SearchSpace(self.shape, config)

    def _checkpoint(self, entry: Entry) -> Contender:
        assert entry.checkpoint is not None
        trained, sha256 = load_full_precision(found(entry.checkpoint), self.training)
        refuse_images(trained.meaning, trained.path)
        spec, network = trained.meaning.specification(), trained.network
        graphs, size = self._float_graphs(entry, network, spec)
        cost = Cost(steps=trained.meaning.step, source=f"{trained.meaning.step} steps by the bundle")
        if trained.path.is_file():
            payload = load_checkpoint(trained.path)
            cost = training_cost(trained.path, trained.config, trained.meaning.step, payload, entry.cost)
        return Contender(
            entry,
            Runnable(spec, graphs, None),
            sha256,
            trained.meaning.data_sha256,
            sha256,
            FLOAT_TABLE if entry.bits == "fp16" else ONNX,
            self._executes(entry, None),
            self.whole("fp32"),  # as which it is computed, whatever its weights are stored as
            size,
            cost,
        )

    def _float_graphs(
        self, entry: Entry, network: DiffusionPolicyT, spec: BundleSpec
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        steps = spec.diffusion.train_timesteps
        if entry.bits == "fp16":
            network = HalfTablePolicy(round_weights(network, steps), steps)
            graphs = half_graphs(network, steps)
        else:
            graphs = export_graphs(network, steps)
        check_export(entry, TorchEngine(network, 1), graphs, spec, network, EXPORT_RMS)
        count = parameter_count(network)
        bytes_each = 2 if entry.bits == "fp16" else 4
        return graphs, _size(count, bytes_each * count, sum(map(len, graphs.values())), "graphs on disk")

    def _supernet(self, entry: Entry) -> Contender:
        assert entry.supernet is not None and entry.subnet is not None
        if entry.supernet not in self._supernets:
            supernet = load_supernet(found(entry.supernet))
            refuse_images(supernet.meaning, supernet.path)
            meaning = supernet.meaning
            payload = {k: v for k, v in load_checkpoint(supernet.path).items() if k == "teacher_calls"}
            cost = training_cost(supernet.path, meaning.config, meaning.step, payload, entry.cost)
            self._supernets[entry.supernet] = supernet, state_sha256(supernet.network.state_dict()), cost
        supernet, weights, cost = self._supernets[entry.supernet]
        space, spec = supernet.space, supernet.meaning.specification()
        try:
            subnet, network = supernet.subnet(entry.subnet)
        except SpaceError as error:
            raise CompareError(f"entry {entry.name}: subnet {entry.subnet}: {error}") from error
        _check_bits(entry, precision_name(subnet))
        rest = REST[subnet.precision]
        graphs = export_graphs(network, spec.diffusion.train_timesteps, rest)
        reference = AsStored(network, rest, spec.diffusion.train_timesteps, 1)
        check_export(entry, reference, graphs, spec, network, TOLERANCE[subnet.precision].export_rms)
        return Contender(
            entry,
            Runnable(spec, graphs, None),
            weights,
            supernet.meaning.data_sha256,
            supernet.teacher_sha256,
            ONNX,
            self._executes(entry, subnet),
            subnet,
            _size(
                parameters(space.shape, subnet),
                paper_bytes(space.shape, subnet),
                sum(map(len, graphs.values())),
                "graphs on disk",
            ),
            cost,
        )

    def _baseline(self, entry: Entry) -> Contender:
        from training.baselines import BaselineError

        method, bits = _asked(entry)
        options: dict[str, Any] = dict(entry.options)
        calibration, cost = self._calibration, None
        weights = self.full_precision[1]
        origin: str | None = weights
        data: str | None = calibration.data_sha256
        if entry.trained is not None:
            path = options["trained"] = found(entry.trained)
            file = path / CHECKPOINT if path.is_dir() else path
            payload = load_checkpoint(file)
            meaning = policy_meaning(file, payload)
            weights = hashlib.sha256(file.read_bytes()).hexdigest()
            data, origin = meaning.data_sha256, payload.get("teacher_sha256")
            cost = training_cost(file, meaning.config, meaning.step, payload, entry.cost)
        torch.manual_seed(entry.seed)
        try:
            made = method.quantize(self.policy, bits, calibration, seed=entry.seed, **options)
        except BaselineError as error:
            raise CompareError(f"entry {entry.name}: baseline {error}") from error
        report = made.report
        return Contender(
            entry,
            Runnable(self.policy.meaning.specification(), None, made.network.eval()),
            weights,
            data,
            origin,
            SIMULATED,
            report.get("executes_as"),
            self.whole(entry.bits),
            {
                "parameters": parameter_count(self.policy.network),
                "paper_mib": report["size_paper_mib"],
                "artifact_mib": report["size_packed_mib"],
                "artifact_of": "packed codes with scales, counted",
            },
            cost
            or Cost(
                hours=report.get("seconds", 0.0) / 3600.0,
                policy_calls=report.get("policy_calls"),
                source="calibration, measured here",
            ),
            {key: value for key, value in report.items() if _is_small(value)},
        )


def _is_small(value: Any) -> bool:
    """Whether a figure of a report is kept in the results: numbers, words, short lists; no table of every layer."""
    return len(json.dumps(value, default=str)) < 400


def _asked(entry: Entry) -> tuple[Baseline, Bits]:
    """The method and bits of a baseline.

    Raises:
        CompareError: there are none of that name.
    """
    from training.baselines import BaselineError, find_baseline, parse_bits

    assert entry.baseline is not None
    try:
        return find_baseline(entry.baseline), parse_bits(entry.baseline_bits or entry.bits)
    except BaselineError as error:
        raise CompareError(f"entry {entry.name}: baseline {error}") from error


def _check_bits(entry: Entry, precision: str) -> None:
    if precision != entry.bits:
        raise CompareError(f"entry {entry.name}: bits: the file says {entry.bits}, the network is {precision}")


def _size(count: int, paper: int, artifact: int, of: str) -> dict[str, Any]:
    return {"parameters": count, "paper_mib": paper / MIB, "artifact_mib": artifact / MIB, "artifact_of": of}
