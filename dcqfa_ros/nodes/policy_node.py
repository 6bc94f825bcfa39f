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
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.ros.clock_exchange import ClockEcho
from dcqfa_ros.ros.conversions import MessageError, from_time, status_values
from dcqfa_ros.ros.diagnostics import Status
from dcqfa_ros.ros.node import ManagedNode, run_node
from dcqfa_ros.ros.policy_chunking import PolicyChunking
from dcqfa_ros.ros.policy_inputs import PolicyInputs
from dcqfa_ros.ros.policy_outputs import PolicyOutputs
from dcqfa_ros.ros.policy_variants import VariantControl
from dcqfa_ros.ros.realtime_parameters import RealtimeParameters
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.policy_session import Episode, PolicySession, SessionHooks
from dcqfa_ros.runtime.recent_latencies import RecentLatencies
from dcqfa_ros.runtime.synchronizer import Frame

STOP_S = 0.5


class PolicyNode(ManagedNode):
    """Runs one bundle's policy."""

    NODE_NAME = "policy_node"

    def declare(self) -> None:
        """Declare the parameters (see ``config/pusht_cell.yaml``)."""
        add = self.add_parameter
        add("bundle", "pusht_keypoints", "bundle: a name or a folder", read_only=True)
        self._telling = threading.Lock()
        self._chunking = PolicyChunking(self, lambda: self._variants.host)
        self._variants = VariantControl(self, self._publish_active, self._chunking.suits, lambda: self._chunking.method)
        self._inputs = PolicyInputs(self, self._refuse)
        self._outputs = PolicyOutputs(self)
        self._echo = ClockEcho(self)
        self._recent = RecentLatencies()
        self._realtime = RealtimeParameters(self, "inference")
        add("denoising_steps", 0, "denoising steps per chunk; 0: the selector's, else the bundle's own", minimum=0)
        add(
            "control_rate",
            0.0,
            "rate at which actions are executed, Hz; 0: the bundle's own",
            minimum=0.0,
            read_only=True,
        )
        add("noise_seed", -1, "seed of the policy's noise; -1: the cell's seed", minimum=-1)
        add("units_per_metre", 1024.0, "bundle units (px) per metre", minimum=1e-6, read_only=True)
        self.on_parameter("denoising_steps", self._validate_steps)
        self._bundle: Bundle | None = None
        self._session: PolicySession | None = None
        self._inference_thread: threading.Thread | None = None
        self._halt = threading.Event()  # one per activation, so that an old thread can never come back to life

    def _validate_steps(self, value: int) -> str | None:
        limit = self._bundle.spec.diffusion.most_steps if self._bundle else 10_000
        return None if 0 <= value <= limit else f"expected 0 (the bundle's own) to {limit}"

    def _steps(self) -> int | None:
        """Return the denoising steps to use now: the operator's, else the selector's; None for the bundle's own."""
        return int(self.parameter("denoising_steps")) or self._variants.steps or None

    def _steps_values(self, active: str) -> dict[str, str]:
        """Return ``steps`` of a chunk (empty: those of another bundle) and ``steps_requested`` by the operator."""
        own = "" if self._bundle is None or ":" in active else self._bundle.spec.diffusion.steps
        return {"steps": str(self._steps() or own), "steps_requested": str(self.parameter("denoising_steps"))}

    # lifecycle

    def setup(self) -> None:
        """Load and verify the bundle, bind its observation keys to topics, create publishers."""
        self._realtime.settings()  # refuses before anything is loaded
        bundle = load_bundle(find_bundle(str(self.parameter("bundle"))))
        action = bundle.spec.action
        self._outputs.check(bundle)
        self._variants.check(bundle)
        self._chunking.open(bundle)
        rate = float(self.parameter("control_rate")) or action.rate_hz
        if abs(rate - action.rate_hz) > 1e-6:
            raise PolicyError(
                f"parameter control_rate is {rate:g} Hz, "
                f"but bundle {bundle.spec.name!r} was trained at {action.rate_hz:g} Hz"
            )
        self._inputs.check(bundle)
        self._period_ns = round(1e9 / rate)
        self._units = float(self.parameter("units_per_metre"))
        self._bundle = bundle
        hooks = SessionHooks(
            publish=self._publish_chunk,
            problem=self._tell_problem,
            lost=self._lose_worker,
            steps=self._steps,
            ageless=lambda: self.parameter("rate") == "max",
            chunking=self._chunking.now,
            advice=lambda text: self.event(1, f"chunks are executed as far as they fit: {text}"),
        )
        observations = self._inputs.open(bundle, self._units)
        self._session = PolicySession(bundle.spec, self._variants.open(bundle), observations, self._period_ns, hooks)
        self._outputs.open(bundle, self._units, self._period_ns)
        self._active_publisher = self.create_interface_publisher("active_variant")
        self._publish_active()
        self._inputs.subscribe()
        self._chunking.listen(self._session.consumed)
        self._echo.open(action.space)
        self.create_guarded_subscription("choice", self._variants.on_choice)
        self.create_guarded_subscription("arm_state", self._on_arm_state)
        self.create_guarded_service("policy_reset", self._on_reset)
        self._variants.load_pinned()

    def start(self) -> None:
        """Begin to infer, as soon as there is a variant."""
        self._halt = threading.Event()
        self._variants.start()
        if self._session is None:
            raise PolicyError("policy_node is not configured")
        run = functools.partial(self._infer, self._session, self._halt)
        self._inference_thread = threading.Thread(target=self.guard(run), name="inference", daemon=True)
        self._inference_thread.start()

    def _infer(self, session: PolicySession, halt: threading.Event) -> None:
        with self._realtime.entered():  # workers, which compute, do not inherit it
            session.run(halt)

    def stop(self, reason: str) -> None:  # noqa: ARG002 - the base class publishes the reason
        """Publish no further chunk and end the inference thread."""
        self._halt.set()
        if self._session is not None:
            self._session.observations.end()  # wakes the thread
        thread, self._inference_thread = self._inference_thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(STOP_S)
            if thread.is_alive():
                self._variants.abort()
                thread.join(STOP_S)

    def teardown(self) -> None:
        """End the engine's worker."""
        self._inputs.close()
        self._variants.close()
        self._chunking.close()
        self._bundle, self._session = None, None

    def _publish_active(self) -> None:
        with self._telling:  # exchanges end on a thread of their own: the last word must be the latest
            host = self._variants.host
            self._active_publisher.publish(String(data=host.active if host else ""))

    def _refuse(self, reason: str) -> None:
        if self._session is not None:
            self._session.refuse(reason)

    # episodes

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
            if session.begin(Episode(number, from_time(message.header.stamp), own if own >= 0 else cell_seed)):
                self._outputs.begin()
        elif session.end(number):
            self.event(
                0,
                f"episode {number} ended: {values.get('reason', '')}",
                episode=number,
                **session.figures(),
                **self._variants.figures(),
            )

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._refuse("reset by ~/reset")
        response.success, response.message = True, "observations and chunks forgotten; the next arming begins anew"
        return response

    # what the session asks for, on the inference thread

    def _publish_chunk(self, frame: Frame, actions: NDArray[np.float32], inference_ms: float) -> None:
        self._outputs.publish(frame, actions, inference_ms)
        self._recent.add(inference_ms)

    def _tell_problem(self, reason: str) -> None:
        self.event(2, f"no further commands in this episode: {reason}", reason=reason)

    def _lose_worker(self, reason: str) -> None:
        self._publish_active()
        self._refuse(reason)
        self.fault(reason)

    def status(self) -> list[Status]:
        """Variant, latency percentiles, observation ages, drops."""
        host, session = self._variants.host, self._session
        if host is None or session is None:
            return [Status(1, "policy", "not configured", {})]
        lost = host.lost()
        if lost:
            self._lose_worker(lost)
        self._chunking.settle()
        ages = session.observations.ages_ms(time.monotonic_ns())
        values = {
            "variant": host.active,
            "requested": str(self.parameter("variant")),
            **session.figures(),
            **self._recent.figures(),
            **self._steps_values(host.active),
            **self._outputs.figures(),
            **self._realtime.figures(),
            **self._inputs.figures(),
            **self._variants.status_values(),
            "dropped_observations": str(session.observations.dropped),
            **{f"age_ms.{key}": "" if age is None else f"{age:.1f}" for key, age in ages.items()},
        }
        if session.problem:
            return [Status(2, "policy", session.problem, values)]
        refused = self._variants.refused
        text = f"{host.engine} active" if host.active else "no variant loaded yet"
        text += f"; refused: {refused}" if refused else ""
        return [Status(0 if host.active and not refused else 1, "policy", text, values)]


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``policy_node``."""
    return run_node(PolicyNode, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
