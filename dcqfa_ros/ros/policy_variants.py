"""Which variant a policy node runs: the operator's wish, the selector's choice, and what became of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.devices import modelled
from dcqfa_ros.devices.detect import detect, memory_of
from dcqfa_ros.errors import UserError
from dcqfa_ros.ros.bringup import AUTO
from dcqfa_ros.ros.conversions import MessageError, status_values
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.chunking import Method
from dcqfa_ros.runtime.engines import ONNXRUNTIME, RUNTIMES, runtime_facts
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.ranked_engines import RankedEngines
from dcqfa_ros.runtime.swaps import HostOptions, Outcome, Shortage, SwapResult
from dcqfa_ros.runtime.variant_host import VariantHost
from dcqfa_ros.runtime.variant_targets import Target, Targets

KEPT_SWAPS = 200
_MIB = 2**20


class VariantControl:
    """Parameters ``variant`` and ``runtime`` of a node, and the host of the variant they ask for.

    ``variant`` is the wish: a name of the node's bundle, ``BUNDLE:VARIANT`` of another one of the same contract, or
    ``auto``. It is checked cheaply and taken at once; where the exchange fails later, it is set back to the last wish
    that was fulfilled, and the reason is published. What runs is told by the host.

    Attributes:
        host: owns the running variant; None while the node is not configured.
        history: outcomes of the last exchanges, oldest first.
    """

    def __init__(
        self,
        node: ManagedNode,
        changed: Callable[[], None],
        suits: Callable[[Target], str | None] = lambda _: None,
        method: Callable[[], Method] = lambda: Method.SYNCHRONOUS,
    ) -> None:
        """Declare the parameters on ``node``.

        Args:
            node: the node.
            changed: called when another variant, or none, computes the next chunk; from any thread, before that chunk.
            suits: returns why the node cannot run a variant as its other parameters are, or None.
            method: how chunks follow each other, which a new worker is to be warm for.
        """
        self.host: VariantHost | None = None
        self.history: deque[SwapResult] = deque(maxlen=KEPT_SWAPS)
        self._node, self._changed, self._suits, self._method = node, changed, suits, method
        self._bundle: Bundle | None = None
        self._failures = 0
        add = node.add_parameter
        add("variant", AUTO, "variant to run, BUNDLE:VARIANT of the same contract, or auto: the selector's choice")
        add("runtime", AUTO, f"runtime: {', '.join(RUNTIMES)}, or {AUTO}: the selector's choice", read_only=True)
        add("engine_threads", 1, "threads of the engine", minimum=1, maximum=64, read_only=True)
        add("selector_timeout_s", 5.0, "auto: wait this long for the selector, seconds", minimum=0.1)
        add("engine_memory_limit_mb", 0, "memory that an engine's process may take, MiB; 0: any", minimum=0)
        add("engine_start_timeout_s", 0.0, "time an engine may take to load, seconds; 0: the runtime's", minimum=0.0)
        add(
            "swap_when_memory_is_short",
            Shortage.REFUSE.value,
            "where two variants do not fit together: refuse, or stop publishing, close the old one, load the new one",
            choices=[choice.value for choice in Shortage],
        )
        add("memory_reserve_mb", 64, "memory that an exchange leaves free, MiB", minimum=0)
        node.on_parameter("variant", self._validate, self._apply)
        self._forget()

    def _forget(self) -> None:
        self._choice = ""
        self._steps = 0  # that go with it
        self._nothing_fits = False  # the selector's verdict: then a default would break a budget
        self._ranking = RankedEngines()  # the selector's
        self._wanted = ""  # <runtime>/<variant> that was asked for last
        self._asked = 0  # number of the exchange that was asked for last, 0 once its outcome is known
        self._wish = ""  # the parameter's value that it was asked for by
        self._fulfilled = ""  # the last such value whose variant came to run

    @property
    def refused(self) -> str:
        """Engines of the selector's ranking that could not be opened."""
        return ", ".join(sorted(self._ranking.refused))

    @property
    def steps(self) -> int:
        """Denoising steps of the selector's choice; 0 where there is none, or a variant is pinned."""
        return self._steps if self._node.parameter("variant") == AUTO else 0

    # lifecycle

    def check(self, bundle: Bundle) -> None:
        """Refuse parameters that ask for what ``bundle`` does not have.

        Raises:
            PolicyError, BundleError, EngineError: which parameter, and what there is.
        """
        wanted = str(self._node.parameter("variant"))
        names = [v.name for v in bundle.spec.variants]
        if ":" in wanted:
            Targets(bundle).resolve(wanted)
        elif wanted not in (AUTO, *names):
            raise PolicyError(f"parameter variant is {wanted!r}; the bundle has {', '.join(names)}, and {AUTO}")
        if self._node.parameter("runtime") != AUTO:
            runtime_facts(str(self._node.parameter("runtime")))

    def open(self, bundle: Bundle) -> VariantHost:
        """Make the host of ``bundle``'s variants."""
        self._bundle = bundle
        threads = int(self._node.parameter("engine_threads"))

        def settle(result: SwapResult) -> None:  # of this host: its last words may come when the node has another one
            self._node.post(lambda: self._settle_swap(result, ours=self.host is host))

        host = VariantHost(bundle, threads, settle, lambda _: self._changed(), self._on_hold, self._host_options)
        self.host = host
        return host

    def _host_options(self) -> HostOptions:
        parameter = self._node.parameter
        return HostOptions(
            memory_limit=int(parameter("engine_memory_limit_mb")) * _MIB,
            start_timeout_s=float(parameter("engine_start_timeout_s")),
            shortage=Shortage(parameter("swap_when_memory_is_short")),
            reserve=int(parameter("memory_reserve_mb")) * _MIB,
            free_memory=lambda: memory_of()[1],
            needed_memory=_needed_memory,
            chunking=self._method(),
        )

    def load_pinned(self) -> None:
        """Ask for the variant that the parameter names, where it names one.

        Raises:
            PolicyError: the node cannot run it as its other parameters are.
        """
        wanted = str(self._node.parameter("variant"))
        if self.host is None or wanted == AUTO:
            return
        problem = self._problem(wanted)
        if problem:
            raise PolicyError(problem)
        self._want(wanted)

    def start(self) -> None:
        """Ask for a variant; in ``auto`` the selector's choice is awaited for a while, then the default is used."""
        if self.host is None:
            return
        self.host.reopen()
        if self.host.active:
            return
        if self._node.parameter("variant") != AUTO:
            self.load_pinned()
        elif self._choice:
            self._want(self._choice)
        else:
            timeout = float(self._node.parameter("selector_timeout_s"))
            self._fallback = self._node.create_guarded_timer(timeout, self._use_default)

    def abort(self) -> None:
        """Kill the workers: an engine that does not answer must not keep the node."""
        if self.host is not None:
            self.host.abort()
            self._asked = 0

    def close(self) -> None:
        """End the workers and forget the selector's choice."""
        host, self.host = self.host, None
        if host is not None:
            host.close()
        self._bundle = None
        self._forget()

    # what is asked for

    def _validate(self, value: str) -> str | None:
        if self.host is None:
            return None
        return self._problem((self._choice or self._first_that_suits()[0]) if value == AUTO else value)

    def _problem(self, variant: str, runtime: str = "") -> str | None:
        """Why a variant cannot be asked for, None where it can; no weights are read."""
        assert self.host is not None
        try:
            return self._suits(self.host.targets.resolve(variant, runtime or self._runtime_for(variant)))
        except UserError as error:
            return str(error)

    def _first_that_suits(self) -> tuple[str, str]:
        """The default variant, or the first of the bundle that suits where it does not; and why it does not, if so."""
        default = self._default
        reason = self._problem(default) or ""
        names = [v.name for v in self._bundle.spec.variants] if reason and self._bundle is not None else []
        return next((name for name in names if self._problem(name) is None), default), reason

    def _apply(self, value: str) -> None:
        if self.host is not None:
            self._want((self._choice or self._first_that_suits()[0]) if value == AUTO else value, value)

    @property
    def _default(self) -> str:
        return "" if self._bundle is None else self._bundle.spec.default_variant

    @property
    def _most_steps(self) -> int:
        return 0 if self._bundle is None else self._bundle.spec.diffusion.most_steps

    def _use_default(self) -> None:
        self._fallback.cancel()
        unanswered = not self._choice and not self._nothing_fits and not self._asked
        if self._node.parameter("variant") != AUTO or self.host is None or self.host.active or not unanswered:
            return
        variant, reason = self._first_that_suits()
        if not reason:
            self._node.event(1, f"no choice from the selector: using the default variant {variant!r}")
        elif variant != self._default:
            self._node.event(1, f"no choice from the selector: using variant {variant!r}, because {reason}")
        else:
            self._node.event(2, f"no variant is loaded: {reason}; set chunking or variant")
            return
        self._want(variant)

    def _want(self, variant: str, wish: str | None = None) -> None:
        """Ask for ``variant`` because the parameter is, or is about to be, ``wish``."""
        if self.host is None:
            return
        self._wish = str(self._node.parameter("variant")) if wish is None else wish
        if self.host.closed:
            return  # its workers were killed: activation asks
        runtime = self._runtime_for(variant)
        engine = self.host.targets.resolve(variant, runtime).engine
        if engine == self._wanted and self._asked and self.host.busy:
            return  # on its way
        if engine == self._wanted == self.host.engine:
            self._fulfilled = self._wish
            return
        self._ask(variant, runtime)

    def _ask(self, variant: str, runtime: str) -> None:
        assert self.host is not None
        engine = self.host.targets.resolve(variant, runtime).engine
        self._asked = self.host.request(variant, runtime)
        self._wanted = engine

    def _runtime_for(self, variant: str) -> str:
        runtime = str(self._node.parameter("runtime"))
        return self._runtime_of(variant) if runtime == AUTO else runtime

    def _runtime_of(self, variant: str) -> str:
        best = self._ranking.best(variant)
        return ONNXRUNTIME if best is None else best[0]

    def _try_next(self, refused: str) -> bool:
        """In ``auto``, ask for the best engine that was not refused and suits; returns whether one was asked for."""
        pinned = str(self._node.parameter("variant")), str(self._node.parameter("runtime"))
        while self.host is not None and not self.host.closed and AUTO in pinned:
            best, text = self._ranking.after(refused, *pinned, running=self.host.engine)
            problem = None if best is None else self._problem(best[1], best[0])
            if text:
                self._node.event(2, text, refused=refused)
            if best is None:
                return False
            if problem is None:
                self._ask(best[1], best[0])
                return True
            refused = "/".join(best)
            self._node.event(2, f"{refused} cannot be tried: {problem}", refused=refused)
        return False

    # what became of it

    def figures(self) -> dict[str, str]:
        """What computed the present episode: ``computed_by``, JSON, ``[[first chunk, "<runtime>/<variant>"], ...]``."""
        return {} if self.host is None else {"computed_by": self.host.computed_by.text()}

    def status_values(self) -> dict[str, str]:
        """Exchanges so far, for diagnostics: ``swaps``, ``swap_failures``, ``last_swap``."""
        last = self.history[-1] if self.history else None
        told = "" if last is None else f"{last.swap_id}: {last.requested} on {last.runtime} {last.outcome.value}"
        if last is not None and last.reason:
            told += f" ({last.reason})"
        swaps = 0 if self.host is None else self.host.swaps
        return {"swaps": str(swaps), "swap_failures": str(self._failures), "last_swap": told}

    def _on_hold(self, reason: str) -> None:
        self._node.event(1, f"the policy holds until the exchange of variants is done: {reason}")

    def _settle_swap(self, result: SwapResult, ours: bool) -> None:
        """Tell the outcome of an exchange; where it is the one that was asked for last (of ``ours``), act on it."""
        self.history.append(result)
        engine = f"{result.runtime}/{result.requested}"
        latest = ours and result.swap_id == self._asked
        if latest:
            self._asked = 0
        if result.ok:
            text = f"variant {result.active!r} is active on {result.runtime}"
            self._node.event(0, text, **result.values())
            if latest:
                self._fulfilled = self._wish
        elif result.outcome is Outcome.SUPERSEDED:
            text = f"variant {result.requested!r} on {result.runtime} was not waited for: {result.reason}"
            self._node.event(1, text, **result.values())
            if latest and self.host is not None and not self.host.closed:  # by somebody who asked for another purpose
                self._ask(result.requested, result.runtime)
        else:
            self._failures += 1
            text = f"variant {result.requested!r} refused on {result.runtime}: {result.reason}"
            self._node.event(2, text, **result.values())
            if latest:  # else a newer request's outcome counts, or the running variant was to be loaded anew
                self._wanted = result.engine
                if not self._try_next(engine):
                    self._take_back()

    def _take_back(self) -> None:
        """Set the parameter back to the last wish that was fulfilled, unless it was set anew meanwhile."""
        if self._fulfilled and self._fulfilled != self._wish and self._node.parameter("variant") == self._wish:
            self._node.restore_parameter("variant", self._fulfilled)
            self._wish = self._fulfilled
            if self._wish == AUTO and self._choice and self._problem(self._choice) is None:
                self._want(self._choice)  # it may have changed while another variant was asked for

    def on_choice(self, message: Any) -> None:
        """Take the selector's choice (interface ``choice``)."""
        if self.host is None:
            return
        try:
            values = status_values(message)
        except MessageError as error:
            self._node.event(1, f"message on the selector's topic ignored: {error}")
            return
        choice = values.get("variant", "")
        self._ranking.take(values.get("ranking", ""))
        self._nothing_fits = not choice
        if not choice:
            if self._node.parameter("variant") == AUTO:
                self._node.event(2, f"the selector found no variant for this device: {message.status[0].message}")
            return
        pinned = str(self._node.parameter("variant"))
        target = choice if pinned == AUTO else pinned  # a pinned variant may have a better runtime
        reasons = [self._problem(name) for name in (choice, target)]
        steps, most = values.get("steps", ""), self._most_steps
        if steps and not (steps.isdecimal() and 1 <= int(steps) <= most):
            reasons.append(f"steps is {steps!r}, expected a number from 1 to {most}")
        reason = next(filter(None, reasons), None)
        if reason:
            self._node.event(2, f"choice of the selector refused: {reason}")
            return
        self._choice, self._steps = choice, int(steps or 0)
        self._want(target)


def _needed_memory(target: Target) -> int:
    """Return the modelled peak of a worker that was never loaded here, bytes, with what it takes of a shared GPU."""
    size = target.bundle.spec.variant(target.variant).size.disk_bytes
    device = detect()
    shared = device.gpu is None or device.gpu.memory_bytes is None
    return modelled.host_bytes(target.runtime, size) + (modelled.gpu_bytes(target.runtime, size) if shared else 0)
