"""policy_node: observations in, one time-stamped action chunk out, the variant exchangeable while it runs.

The node follows the arm: an arming begins an episode (history and chunk count start anew), a disarming ends it.
Inference runs on its own thread; the engine lives in a worker process, so this process never imports one.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from std_msgs.msg import String
from std_srvs.srv import Trigger

from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.bundle.schema import ActionSpace
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.ros.bringup import AUTO
from dcqfa_ros.ros.conversions import MessageError, from_time, observation_array, planar_chunk_message, status_values
from dcqfa_ros.ros.diagnostics import Status
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.node import ManagedNode, run_node
from dcqfa_ros.runtime.engines import ONNXRUNTIME, RUNTIMES, runtime_facts
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.policy_session import Episode, PolicySession, SessionHooks
from dcqfa_ros.runtime.ranked_engines import RankedEngines
from dcqfa_ros.runtime.synchronizer import ObservationSynchronizer
from dcqfa_ros.runtime.variant_host import SwapResult, VariantHost

STOP_S = 0.5


class PolicyNode(ManagedNode):
    """Runs one bundle's policy."""

    NODE_NAME = "policy_node"

    def declare(self) -> None:
        """Declare the parameters (see ``config/pusht_cell.yaml``)."""
        add = self.add_parameter
        add("bundle", "pusht_keypoints", "bundle: a name or a folder", read_only=True)
        add("variant", AUTO, "variant to run, or auto: the selector's choice")
        add("runtime", AUTO, f"runtime: {', '.join(RUNTIMES)}, or {AUTO}: the selector's choice", read_only=True)
        add("denoising_steps", 0, "denoising steps per chunk; 0: the bundle's own", minimum=0)
        add(
            "control_rate",
            0.0,
            "rate at which actions are executed, Hz; 0: the bundle's own",
            minimum=0.0,
            read_only=True,
        )
        add("noise_seed", -1, "seed of the policy's noise; -1: the cell's seed", minimum=-1)
        add(
            "rate",
            "realtime",
            "pace of the cell; in lockstep (max) observations do not age",
            choices=("realtime", "max"),
        )
        add("engine_threads", 1, "threads of the engine", minimum=1, maximum=64, read_only=True)
        add("selector_timeout_s", 5.0, "auto: wait this long for the selector, seconds", minimum=0.1)
        add("sync_tolerance_ms", 0.0, "stamps of one time step may differ by this, ms", minimum=0.0, read_only=True)
        add("units_per_metre", 1024.0, "bundle units (px) per metre", minimum=1e-6, read_only=True)
        add(
            "observation_sources",
            ["keypoints=keypoints", "agent_position=tcp_pose"],
            "observation key = interface key (docs/interfaces.md)",
            read_only=True,
        )
        self.on_parameter("variant", self._validate_variant, self._apply_variant)
        self.on_parameter("denoising_steps", self._validate_steps)
        self._host: VariantHost | None = None
        self._bundle: Bundle | None = None
        self._session: PolicySession | None = None
        self._inference_thread: threading.Thread | None = None
        self._halt = threading.Event()  # one per activation, so that an old thread can never come back to life
        self._choice = ""
        self._nothing_fits = False  # the selector's verdict: then a default would break a budget
        self._ranking = RankedEngines()  # the selector's
        self._wanted = ""  # <runtime>/<variant> that was asked for last

    # parameters

    def _validate_variant(self, value: str) -> str | None:
        return None if value == AUTO or self._host is None else self._host.validate(value)

    def _apply_variant(self, value: str) -> None:
        if self._host is None:
            return
        if value == AUTO:
            self._want(self._choice or self._spec.default_variant)
        else:
            self._want(value)

    def _validate_steps(self, value: int) -> str | None:
        limit = self._bundle.spec.diffusion.train_timesteps if self._bundle else 10_000
        return None if 0 <= value <= limit else f"expected 0 (the bundle's own) to {limit}"

    @property
    def _spec(self) -> Any:
        if self._bundle is None:
            raise PolicyError("policy_node is not configured")
        return self._bundle.spec

    # lifecycle

    def setup(self) -> None:
        """Load and verify the bundle, bind its observation keys to topics, create publishers."""
        bundle = load_bundle(find_bundle(str(self.parameter("bundle"))))
        action = bundle.spec.action
        if action.space is not ActionSpace.PLANAR_POSITION:
            raise PolicyError(
                f"bundle {bundle.spec.name!r}: action space {action.space.value} has no arm in this version"
            )
        wanted = str(self.parameter("variant"))
        names = [v.name for v in bundle.spec.variants]
        if wanted not in (AUTO, *names):
            raise PolicyError(f"parameter variant is {wanted!r}; the bundle has {', '.join(names)}, and {AUTO}")
        if self.parameter("runtime") != AUTO:
            runtime_facts(str(self.parameter("runtime")))
        rate = float(self.parameter("control_rate")) or action.rate_hz
        if abs(rate - action.rate_hz) > 1e-6:
            raise PolicyError(
                f"parameter control_rate is {rate:g} Hz, "
                f"but bundle {bundle.spec.name!r} was trained at {action.rate_hz:g} Hz"
            )
        sources = self._sources(bundle)
        self._period_ns = round(1e9 / rate)
        self._units = float(self.parameter("units_per_metre"))
        tolerance_ns = round(float(self.parameter("sync_tolerance_ms")) * 1e6)
        self._bundle = bundle
        self._host = VariantHost(bundle, int(self.parameter("engine_threads")), self._on_swap)
        hooks = SessionHooks(
            publish=self._publish_chunk,
            problem=self._tell_problem,
            lost=self._lose_worker,
            steps=lambda: int(self.parameter("denoising_steps")) or None,
            ageless=lambda: self.parameter("rate") == "max",
        )
        observations = ObservationSynchronizer(bundle.spec.observations, tolerance_ns)
        self._session = PolicySession(bundle.spec, self._host, observations, self._period_ns, hooks)
        self._chunk_publisher = self.create_interface_publisher("chunk")
        self._active_publisher = self.create_interface_publisher("active_variant")
        self._publish_active()
        for key, source in sources.items():
            self.create_guarded_subscription(source, functools.partial(self._on_observation, key))
        self.create_guarded_subscription("choice", self._on_choice)
        self.create_guarded_subscription("arm_state", self._on_arm_state)
        self.create_guarded_service("policy_reset", self._on_reset)
        if wanted != AUTO:
            self._want(wanted)

    def _sources(self, bundle: Bundle) -> dict[str, str]:
        pairs = [str(entry).partition("=") for entry in self.parameter("observation_sources")]
        given = {key.strip(): source.strip() for key, _, source in pairs}
        for key, spec in bundle.spec.observations.items():
            if key not in given:
                raise PolicyError(
                    f"bundle {bundle.spec.name!r} needs observation {key!r}: "
                    "name its topic in parameter observation_sources"
                )
            if spec.type != "low_dim":
                raise PolicyError(
                    f"observation {key!r} is of type {spec.type}; this version reads low_dim observations"
                )
            try:
                interface(given[key])
            except KeyError as error:
                raise PolicyError(f"parameter observation_sources, key {key!r}: {error.args[0]}") from error
        return {key: given[key] for key in bundle.spec.observations}

    def start(self) -> None:
        """Begin to infer; in ``auto`` the selector's choice is awaited for a while, then the default is used."""
        self._halt = threading.Event()
        if self._host is not None and not self._host.active:
            if self.parameter("variant") != AUTO:
                self._want(str(self.parameter("variant")))
            elif self._choice:
                self._want(self._choice)
            else:
                timeout = float(self.parameter("selector_timeout_s"))
                self._fallback = self.create_guarded_timer(timeout, self._use_default)
        if self._session is None:
            raise PolicyError("policy_node is not configured")
        run = functools.partial(self._session.run, self._halt)
        self._inference_thread = threading.Thread(target=self.guard(run), name="inference", daemon=True)
        self._inference_thread.start()

    def _use_default(self) -> None:
        self._fallback.cancel()
        unanswered = not self._choice and not self._nothing_fits and not self._wanted
        if self.parameter("variant") == AUTO and self._host is not None and unanswered:
            self.event(1, f"no choice from the selector: using the default variant {self._spec.default_variant!r}")
            self._want(self._spec.default_variant)

    def stop(self, reason: str) -> None:  # noqa: ARG002 - the base class publishes the reason
        """Publish no further chunk and end the inference thread."""
        self._halt.set()
        if self._session is not None:
            self._session.observations.end()  # wakes the thread
        thread, self._inference_thread = self._inference_thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(STOP_S)
            if thread.is_alive() and self._host is not None:  # an engine that does not answer must not keep the node
                self._host.abort()
                self._wanted = ""
                thread.join(STOP_S)

    def teardown(self) -> None:
        """End the engine's worker."""
        host, self._host = self._host, None
        if host is not None:
            host.close()
        self._bundle, self._session, self._wanted, self._choice, self._ranking = None, None, "", "", RankedEngines()

    # variant

    def _want(self, variant: str) -> None:
        runtime = str(self.parameter("runtime"))
        if runtime == AUTO:
            runtime = self._runtime_of(variant)
        engine = f"{runtime}/{variant}"
        if self._host is None or engine == self._wanted:
            return
        self._wanted = engine
        self._host.request(variant, runtime)

    def _runtime_of(self, variant: str) -> str:
        best = self._ranking.best(variant)
        return ONNXRUNTIME if best is None else best[0]

    def _try_next(self, refused: str) -> bool:
        """In ``auto``, ask for the best engine that was not refused; returns whether one was asked for."""
        pinned = str(self.parameter("variant")), str(self.parameter("runtime"))
        if self._host is None or AUTO not in pinned:
            return False
        best, text = self._ranking.after(refused, *pinned, running=self._host.engine)
        if text:
            self.event(2, text, refused=refused)
        if best is not None:
            self._wanted = "/".join(best)
            self._host.request(best[1], best[0])
        return best is not None

    def _on_swap(self, result: SwapResult) -> None:
        self.post(functools.partial(self._settle_swap, result))

    def _settle_swap(self, result: SwapResult) -> None:
        values = {"swap_id": result.swap_id, "requested": result.requested, "active": result.active}
        values |= {"runtime": result.runtime, "engine": result.engine}
        if result.ok:
            text = f"variant {result.active!r} is active on {result.runtime}"
            self.event(0, text, **values, load_ms=round(result.load_ms, 1))
        else:
            text = f"variant {result.requested!r} refused on {result.runtime}: {result.reason}"
            self.event(2, text, **values, reason=result.reason)
            engine, goes_on = f"{result.runtime}/{result.requested}", False
            if self._wanted == engine:  # else a newer request's outcome counts
                self._wanted = result.engine
                goes_on = self._try_next(engine)
            if not goes_on and result.active and self.parameter("variant") == result.requested:
                self.restore_parameter("variant", result.active)
        self._publish_active()

    def _publish_active(self) -> None:
        self._active_publisher.publish(String(data=self._host.active if self._host else ""))

    def _on_choice(self, message: Any) -> None:
        if self._host is None:
            return
        try:
            values = status_values(message)
        except MessageError as error:
            self.event(1, f"message on the selector's topic ignored: {error}")
            return
        choice = values.get("variant", "")
        self._ranking.take(values.get("ranking", ""))
        self._nothing_fits = not choice
        if not choice:
            if self.parameter("variant") == AUTO:
                self.event(2, f"the selector found no variant for this device: {message.status[0].message}")
            return
        pinned = str(self.parameter("variant"))
        target = choice if pinned == AUTO else pinned  # a pinned variant may have a better runtime
        reasons = [self._host.validate(name, self._runtime_of(name)) for name in (choice, target)]
        reason = next(filter(None, reasons), None)
        if reason:
            self.event(2, f"choice of the selector refused: {reason}")
            return
        self._choice = choice
        self._want(target)

    # observations and episodes

    def _on_observation(self, key: str, message: Any) -> None:
        session, now = self._session, time.monotonic_ns()
        if session is None:
            return
        spec = session.observations.specs[key]
        scale = self._units if spec.units == "px" else 1.0
        try:
            value = observation_array(message, spec.shape, scale)
            session.observations.add(key, from_time(message.header.stamp), value, now)
        except (MessageError, PolicyError) as error:
            session.refuse(str(error))

    def _on_arm_state(self, message: Any) -> None:
        session = self._session
        if session is None:
            return
        try:
            values = status_values(message)
            number, cell_seed = int(values["episode"]), int(values["seed"])
        except (MessageError, KeyError, ValueError) as error:
            self.event(1, f"message on the arm's state topic ignored: {error!r}")
            return
        if values.get("state") == "armed":
            own = int(self.parameter("noise_seed"))
            session.begin(Episode(number, from_time(message.header.stamp), own if own >= 0 else cell_seed))
        elif session.end(number):
            self.event(0, f"episode {number} ended: {values.get('reason', '')}", episode=number, **session.figures())

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._session is not None:
            self._session.refuse("reset by ~/reset")
        response.success, response.message = True, "observations and chunks forgotten; the next arming begins anew"
        return response

    # what the session asks for, on the inference thread

    def _publish_chunk(self, stamp_ns: int, actions: NDArray[np.float32]) -> None:
        frame = self._spec.action.frame
        self._chunk_publisher.publish(planar_chunk_message(stamp_ns, frame, actions, self._period_ns, self._units))

    def _tell_problem(self, reason: str) -> None:
        self.event(2, f"no further commands in this episode: {reason}", reason=reason)

    def _lose_worker(self, reason: str) -> None:
        self._wanted = ""
        self._publish_active()
        if self._session is not None:
            self._session.refuse(reason)
        self.fault(reason)

    def status(self) -> list[Status]:
        """Variant, latency percentiles, observation ages, drops."""
        host, session = self._host, self._session
        if host is None or session is None:
            return [Status(1, "policy", "not configured", {})]
        lost = host.lost()
        if lost:
            self._lose_worker(lost)
        ages = session.observations.ages_ms(time.monotonic_ns())
        values = {
            "variant": host.active,
            "requested": str(self.parameter("variant")),
            **session.figures(),
            "swaps": str(host.swaps),
            "dropped_observations": str(session.observations.dropped),
            **{f"age_ms.{key}": "" if age is None else f"{age:.1f}" for key, age in ages.items()},
        }
        if session.problem:
            return [Status(2, "policy", session.problem, values)]
        refused = ", ".join(sorted(self._ranking.refused))
        text = f"{host.engine} active" if host.active else "no variant loaded yet"
        text += f"; refused: {refused}" if refused else ""
        return [Status(0 if host.active and not refused else 1, "policy", text, values)]


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``policy_node``."""
    return run_node(PolicyNode, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
