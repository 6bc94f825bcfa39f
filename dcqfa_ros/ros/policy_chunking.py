"""Parameters of a policy node that say how its chunks follow each other, and what the arm tells of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.ros.conversions import MessageError, consumption_report
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.chunk_schedule import Chunking
from dcqfa_ros.runtime.chunking import Method
from dcqfa_ros.runtime.consumption import Report
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.guidance import method_refusal
from dcqfa_ros.runtime.variant_host import VariantHost
from dcqfa_ros.runtime.variant_targets import Target

METHODS = tuple(method.value for method in Method)
RATES = ("realtime", "max")


class PolicyChunking:
    """Parameters ``chunking``, ``execution_horizon`` and ``delay``, live, and their agreement with what runs.

    What the active variant cannot do is refused at once, and so is a variant that cannot do what is set. In lockstep
    (``rate`` max) the cell waits for the policy: there chunks follow each other synchronously only. Where the running
    worker has not loaded what a method needs (``guided``: the denoiser's derivative), the variant is loaded anew in the
    background; until then chunks follow each other as before, and where that fails the parameter goes back.
    """

    def __init__(self, node: ManagedNode, host: Callable[[], VariantHost | None]) -> None:
        """Declare the parameters on ``node``; ``host`` returns the owner of the running variant."""
        self._node, self._host = node, host
        self._spec: BundleSpec | None = None
        self._followed = Method.SYNCHRONOUS  # how chunks follow each other until what was set is loaded
        self._loading = False
        add, told = node.add_parameter, ", ".join(METHODS)
        add("chunking", Method.SYNCHRONOUS.value, f"how chunks follow each other: {told}", choices=METHODS)
        add("execution_horizon", 0, "actions between two observations inferred on; 0: the bundle's own", minimum=0)
        add("delay", -1, "actions from an observation to its chunk; -1: from the measured latency", minimum=-1)
        add("rate", RATES[0], "pace of the cell; in lockstep (max) observations do not age", choices=RATES)
        node.on_parameter("chunking", self._validate, lambda _: node.post(self._load))
        node.on_parameter("rate", self._validate_rate)
        node.on_parameter("execution_horizon", self._validate_horizon)
        node.on_parameter("delay", self._validate_delay)

    @property
    def method(self) -> Method:
        """How chunks follow each other."""
        return Method(self._node.parameter("chunking"))

    def open(self, bundle: Bundle) -> None:
        """Check the parameters against ``bundle``.

        Raises:
            PolicyError: which parameter, and what can be set.
        """
        wanted = str(self._node.parameter("variant"))
        named = wanted if wanted in [variant.name for variant in bundle.spec.variants] else ""
        runtime = str(self._node.parameter("runtime"))
        reasons = (
            method_refusal(self.method, bundle.spec, named, "onnxruntime" if runtime == "auto" else runtime),
            self._out_of_step(self.method, str(self._node.parameter("rate"))),
            _out_of_range("execution_horizon", int(self._node.parameter("execution_horizon")), bundle.spec),
            _out_of_range("delay", int(self._node.parameter("delay")), bundle.spec),
        )
        for reason in filter(None, reasons):
            raise PolicyError(reason)
        self._spec, self._followed = bundle.spec, self.method

    def close(self) -> None:
        """Forget the bundle."""
        self._spec = None

    def suits(self, target: Target) -> str | None:
        """Return why a variant cannot take the place of the running one, or None."""
        spec, method = target.bundle.spec, self.method
        reason = method_refusal(method, spec, target.variant, target.runtime)
        host = self._host()
        running = None if host is None else host.target
        if reason is None and method is Method.TRAINED and running is not None:
            before = running.bundle.spec.diffusion.prefix
            if spec.diffusion.prefix < before:  # a chunk that is planned now may be computed by the new one
                reason = f"its diffusion.prefix {spec.diffusion.prefix} is below {before} of the one that runs"
        return reason and f"variant {target.label!r} does not suit parameter chunking: {reason}"

    def now(self) -> Chunking:
        """How the next chunk follows; called by the thread that infers."""
        host, spec = self._host(), self._spec
        running = None if host is None else host.target
        if running is not None:
            spec = running.bundle.spec
        method = self.method
        if host is not None and not host.warm_for(method):
            method = self._followed
        self._followed = method
        return Chunking(
            method,
            int(self._node.parameter("execution_horizon")),
            int(self._node.parameter("delay")),
            0 if spec is None else spec.diffusion.prefix,
        )

    def _load(self) -> None:
        """Load the running variant anew where its worker lacks what the method needs."""
        host = self._host()
        target = None if host is None else host.target
        if host is None or target is None or host.warm_for(self.method):
            return
        self._loading = True
        if not (host.closed or host.changing):  # else what is on its way, or the next start, is loaded for it
            host.request(target.label, target.runtime)

    def settle(self) -> None:
        """Set the parameter back where what its method needs could not be loaded; called on the executor's thread."""
        host, method = self._host(), self.method
        if not self._loading or (host is not None and (host.busy or host.closed)):  # the next start asks again
            return
        self._loading = False
        if host is None or host.target is None or host.warm_for(method):
            return
        self._node.restore_parameter("chunking", self._followed.value)
        text = f"chunking {method.value} was not taken, its variant could not be loaded for it: {self._followed.value}"
        self._node.event(2, f"{text} goes on", requested=method.value, active=self._followed.value)

    def listen(self, consumed: Callable[[Report], None]) -> None:
        """Hear what the arm has consumed of the chunks."""

        def take(message: Any) -> None:
            try:
                consumed(consumption_report(message))
            except MessageError as error:
                self._node.event(1, f"message of the arm ignored: {error}")

        self._node.create_guarded_subscription("consumption", take)

    # rules

    def _validate(self, value: str) -> str | None:
        if value not in METHODS:
            return f"expected one of {', '.join(METHODS)}"
        method, host = Method(value), self._host()
        reason = self._out_of_step(method, str(self._node.parameter("rate")))
        if reason is None and host is not None and method is not self.method:
            target = host.target
            if target is not None:
                reason = method_refusal(method, target.bundle.spec, target.variant, target.runtime)
            elif self._spec is not None:
                reason = method_refusal(method, self._spec)
            if reason is None and host.changing:  # what comes may not be able to
                reason = "an exchange of variants is under way: set it when that is done"
        return reason

    def _validate_rate(self, value: str) -> str | None:
        if value not in RATES:
            return f"expected one of {', '.join(RATES)}"
        return self._out_of_step(self.method, value)

    @staticmethod
    def _out_of_step(method: Method, rate: str) -> str | None:
        if rate == "max" and method.overlaps:
            return (
                f"chunking {method.value} needs rate realtime: in lockstep (rate max) the cell waits for the policy, "
                "and nothing overlaps; use chunking synchronous"
            )
        return None

    def _validate_horizon(self, value: int) -> str | None:
        return _out_of_range("execution_horizon", value, self._spec)

    def _validate_delay(self, value: int) -> str | None:
        return _out_of_range("delay", value, self._spec)


def _out_of_range(name: str, value: int, spec: BundleSpec | None) -> str | None:
    most = 1000 if spec is None else spec.action.horizon - spec.action.first_executed
    least, meaning = (0, "the bundle's own") if name == "execution_horizon" else (-1, "measured")
    return None if least <= value <= most else f"{name}: expected {least} ({meaning}) to {most} actions, got {value}"
