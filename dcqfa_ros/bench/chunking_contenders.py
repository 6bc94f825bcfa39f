"""Which network each method of chunk execution runs on, and which methods or delays cannot be run and why.

Most methods run on the variant asked for. Guided chunking differentiates the network and needs a floating-point
variant; trained chunking needs a network that was trained with clean prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bundle.errors import BundleNotFoundError
from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.runtime.chunking import Method
from dcqfa_ros.runtime.engine import ROLES
from dcqfa_ros.runtime.engines import ONNXRUNTIME
from dcqfa_ros.runtime.guidance import method_refusal
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.ort_pullback import open_pullback
from dcqfa_ros.runtime.policy import PolicyRuntime

DEFAULT_TRAINED = "pusht_keypoints_rtc"
OBSERVATIONS = {"keypoints", "agent_position"}  # what the Push-T cell offers
_FLOAT = "fp32"


@dataclass(frozen=True, slots=True)
class Contender:
    """A variant of a bundle, described so that another process can open it.

    Attributes:
        bundle: name of the bundle.
        folder: where it lies.
        variant: name of the variant.
        weights: identity of what it computes.
        note: why it is not the variant that was asked for, empty where it is.
    """

    bundle: str
    folder: str
    variant: str
    weights: str
    note: str = ""

    @contextmanager
    def open(self, threads: int) -> Iterator[PolicyRuntime]:
        """The policy on ONNX Runtime, for inference in this process.

        Raises:
            UserError: a file of the bundle is damaged.
        """
        bundle = load_bundle(find_bundle(self.folder), verify=False)
        files = {role: bundle.read(self.variant, role) for role in ROLES}
        engine = OnnxRuntimeEngine(files, threads=threads, name=self.variant, large_batches=True)
        pullback = partial(open_pullback, ONNXRUNTIME, files["denoiser"], threads=threads, name=self.variant)
        policy = PolicyRuntime(bundle.spec, engine, pullback)
        try:
            yield policy
        finally:
            policy.close()


@dataclass(frozen=True, slots=True)
class Field:
    """Who runs: a contender per method, and a reason per method that is not run."""

    spec: BundleSpec
    trained: BundleSpec | None
    contenders: Mapping[Method, Contender]
    not_run: Mapping[Method, str]


def find_contenders(bundle: str, variant: str, trained_bundle: str | None, methods: Sequence[Method]) -> Field:
    """Find what each method runs on.

    Args:
        bundle: folder or name.
        variant: of it.
        trained_bundle: folder or name of a network trained with clean prefixes; None looks for
            :data:`DEFAULT_TRAINED` and does without it where there is none.
        methods: that shall be run.

    Raises:
        UserError: a bundle is damaged, is no Push-T policy, has no such variant, or a bundle named for trained chunking
            was not trained for it.
    """
    loaded = _push_t(bundle)
    try:
        chosen = loaded.spec.variant(variant)
    except KeyError as error:
        raise BenchError(f"--variant: {error.args[0]}") from None
    common = Contender(loaded.spec.name, str(loaded.folder), variant, chosen.weights)
    contenders: dict[Method, Contender] = {}
    not_run: dict[Method, str] = {}
    trained: Bundle | None = None
    for method in methods:
        found: Contender | str = common
        if method is Method.GUIDED:
            found = _floating(loaded, common)
        elif method is Method.TRAINED:
            other = _trained(trained_bundle)
            if isinstance(other, Bundle):
                trained = other
                _same_task(loaded.spec, other.spec)
            found = _of_trained(other, variant) if isinstance(other, Bundle) else other
        if isinstance(found, Contender):
            spec = trained.spec if trained is not None and method is Method.TRAINED else loaded.spec
            found = method_refusal(method, spec, found.variant, ONNXRUNTIME) or found
        if isinstance(found, str):
            not_run[method] = found
        else:
            contenders[method] = found
    return Field(loaded.spec, trained.spec if trained else None, contenders, not_run)


def _push_t(name: str) -> Bundle:
    bundle = load_bundle(find_bundle(name))
    spec = bundle.spec
    if set(spec.observations) != OBSERVATIONS:
        raise BenchError(
            f"policy {spec.name!r} observes {', '.join(spec.observations)}; "
            f"the Push-T cell offers {', '.join(sorted(OBSERVATIONS))}"
        )
    return bundle


def _same_task(spec: BundleSpec, trained: BundleSpec) -> None:
    """Refuse a comparison between policies whose steps or actions are not the same thing."""
    for name in ("rate_hz", "space", "units", "executed", "first_executed", "horizon"):
        ours, theirs = getattr(spec.action, name), getattr(trained.action, name)
        if ours != theirs:
            raise BenchError(
                f"--trained-bundle {trained.name}: its action.{name} is {theirs}, that of {spec.name} is {ours}; "
                "their rows could not be compared"
            )


def _floating(bundle: Bundle, asked: Contender) -> Contender | str:
    """The variant asked for where it has a derivative, else the bundle's floating-point variant."""
    spec = bundle.spec
    refusal = method_refusal(Method.GUIDED, spec, asked.variant, ONNXRUNTIME)
    if refusal is None:
        return asked
    candidate = next((v for v in spec.variants if v.precision == _FLOAT and v.subnet is None), None)
    if candidate is None:
        return f"{refusal}; the bundle has no {_FLOAT} variant"
    note = f"guidance differentiates the network: run on {candidate.name}"
    return Contender(asked.bundle, asked.folder, candidate.name, candidate.weights, note)


def _trained(name: str | None) -> Bundle | str:
    """The bundle for trained chunking, or why there is none; a bundle given by name has to be one."""
    try:
        bundle = _push_t(name or DEFAULT_TRAINED)
    except BundleNotFoundError:
        if name is not None:
            raise
        return (
            f"no bundle {DEFAULT_TRAINED!r} was found; trained chunking needs a network fine-tuned with clean "
            "prefixes: give one by --trained-bundle"
        )
    prefix, past = bundle.spec.diffusion.prefix, bundle.spec.action.first_executed
    if prefix > past:
        return bundle
    reason = (
        f"bundle {bundle.spec.name}: diffusion.prefix is {prefix} with {past} past action tokens, so its network was "
        "not trained for chunks that begin with actions already under way"
    )
    if name is None:
        return reason
    raise BenchError(f"--trained-bundle: {reason}; give one that was")


def _of_trained(bundle: Bundle, variant: str) -> Contender:
    names = [candidate.name for candidate in bundle.spec.variants]
    name = variant if variant in names else bundle.spec.default_variant
    note = "" if name == variant else f"its bundle has no variant {variant}: run on {name}"
    return Contender(bundle.spec.name, str(bundle.folder), name, bundle.spec.variant(name).weights, note)
