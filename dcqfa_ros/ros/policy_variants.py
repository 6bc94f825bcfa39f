"""Which variant a policy node runs: the operator's wish, the selector's choice, and what became of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dcqfa_ros.bundle.load import Bundle
from dcqfa_ros.ros.bringup import AUTO
from dcqfa_ros.ros.conversions import MessageError, status_values
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.runtime.engines import ONNXRUNTIME, RUNTIMES, runtime_facts
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.ranked_engines import RankedEngines
from dcqfa_ros.runtime.variant_host import SwapResult, VariantHost


class VariantControl:
    """Parameters ``variant`` and ``runtime`` of a node, and the host of the variant they ask for.

    Attributes:
        host: owns the running variant; None while the node is not configured.
    """

    def __init__(self, node: ManagedNode, changed: Callable[[], None]) -> None:
        """Declare the parameters on ``node``; ``changed`` is called when another variant may be active."""
        self.host: VariantHost | None = None
        self._node, self._changed = node, changed
        self._bundle: Bundle | None = None
        add = node.add_parameter
        add("variant", AUTO, "variant to run, or auto: the selector's choice")
        add("runtime", AUTO, f"runtime: {', '.join(RUNTIMES)}, or {AUTO}: the selector's choice", read_only=True)
        add("engine_threads", 1, "threads of the engine", minimum=1, maximum=64, read_only=True)
        add("selector_timeout_s", 5.0, "auto: wait this long for the selector, seconds", minimum=0.1)
        node.on_parameter("variant", self._validate, self._apply)
        self._forget()

    def _forget(self) -> None:
        self._choice = ""
        self._nothing_fits = False  # the selector's verdict: then a default would break a budget
        self._ranking = RankedEngines()  # the selector's
        self._wanted = ""  # <runtime>/<variant> that was asked for last

    @property
    def refused(self) -> str:
        """Engines of the selector's ranking that could not be opened."""
        return ", ".join(sorted(self._ranking.refused))

    # lifecycle

    def check(self, bundle: Bundle) -> None:
        """Refuse parameters that ask for what ``bundle`` does not have.

        Raises:
            PolicyError, EngineError: which parameter, and what there is.
        """
        wanted = str(self._node.parameter("variant"))
        names = [v.name for v in bundle.spec.variants]
        if wanted not in (AUTO, *names):
            raise PolicyError(f"parameter variant is {wanted!r}; the bundle has {', '.join(names)}, and {AUTO}")
        if self._node.parameter("runtime") != AUTO:
            runtime_facts(str(self._node.parameter("runtime")))

    def open(self, bundle: Bundle) -> VariantHost:
        """Make the host of ``bundle``'s variants."""
        self._bundle = bundle
        self.host = VariantHost(bundle, int(self._node.parameter("engine_threads")), self._on_swap)
        return self.host

    def load_pinned(self) -> None:
        """Ask for the variant that the parameter names, where it names one."""
        if self._node.parameter("variant") != AUTO:
            self._want(str(self._node.parameter("variant")))

    def start(self) -> None:
        """Ask for a variant; in ``auto`` the selector's choice is awaited for a while, then the default is used."""
        if self.host is None or self.host.active:
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
            self._wanted = ""

    def lose(self) -> None:
        """Take note that the active variant's worker has died."""
        self._wanted = ""

    def close(self) -> None:
        """End the workers and forget the selector's choice."""
        host, self.host = self.host, None
        if host is not None:
            host.close()
        self._bundle = None
        self._forget()

    # what is asked for

    def _validate(self, value: str) -> str | None:
        return None if value == AUTO or self.host is None else self.host.validate(value)

    def _apply(self, value: str) -> None:
        if self.host is not None:
            self._want((self._choice or self._default) if value == AUTO else value)

    @property
    def _default(self) -> str:
        return "" if self._bundle is None else self._bundle.spec.default_variant

    def _use_default(self) -> None:
        self._fallback.cancel()
        unanswered = not self._choice and not self._nothing_fits and not self._wanted
        if self._node.parameter("variant") == AUTO and self.host is not None and unanswered:
            self._node.event(1, f"no choice from the selector: using the default variant {self._default!r}")
            self._want(self._default)

    def _want(self, variant: str) -> None:
        runtime = str(self._node.parameter("runtime"))
        if runtime == AUTO:
            runtime = self._runtime_of(variant)
        engine = f"{runtime}/{variant}"
        if self.host is None or engine == self._wanted:
            return
        self._wanted = engine
        self.host.request(variant, runtime)

    def _runtime_of(self, variant: str) -> str:
        best = self._ranking.best(variant)
        return ONNXRUNTIME if best is None else best[0]

    def _try_next(self, refused: str) -> bool:
        """In ``auto``, ask for the best engine that was not refused; returns whether one was asked for."""
        pinned = str(self._node.parameter("variant")), str(self._node.parameter("runtime"))
        if self.host is None or AUTO not in pinned:
            return False
        best, text = self._ranking.after(refused, *pinned, running=self.host.engine)
        if text:
            self._node.event(2, text, refused=refused)
        if best is not None:
            self._wanted = "/".join(best)
            self.host.request(best[1], best[0])
        return best is not None

    # what became of it

    def _on_swap(self, result: SwapResult) -> None:
        self._node.post(functools.partial(self._settle_swap, result))

    def _settle_swap(self, result: SwapResult) -> None:
        values = {"swap_id": result.swap_id, "requested": result.requested, "active": result.active}
        values |= {"runtime": result.runtime, "engine": result.engine}
        if result.ok:
            text = f"variant {result.active!r} is active on {result.runtime}"
            self._node.event(0, text, **values, load_ms=round(result.load_ms, 1))
        else:
            text = f"variant {result.requested!r} refused on {result.runtime}: {result.reason}"
            self._node.event(2, text, **values, reason=result.reason)
            engine, goes_on = f"{result.runtime}/{result.requested}", False
            if self._wanted == engine:  # else a newer request's outcome counts
                self._wanted = result.engine
                goes_on = self._try_next(engine)
            if not goes_on and result.active and self._node.parameter("variant") == result.requested:
                self._node.restore_parameter("variant", result.active)
        self._changed()

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
        reasons = [self.host.validate(name, self._runtime_of(name)) for name in (choice, target)]
        reason = next(filter(None, reasons), None)
        if reason:
            self._node.event(2, f"choice of the selector refused: {reason}")
            return
        self._choice = choice
        self._want(target)
