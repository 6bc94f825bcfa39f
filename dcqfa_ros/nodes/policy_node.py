"""policy_node: observations in, one time-stamped action chunk out, the variant exchangeable while it runs.

The node follows the arm: an arming begins an episode (history and chunk count start anew), a disarming ends it.
Inference runs on its own thread; the engine lives in a worker process, so this process never imports one.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections import deque
from typing import Any

import numpy as np
from std_msgs.msg import String
from std_srvs.srv import Trigger

from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.bundle.schema import ActionSpace
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.ros.conversions import MessageError, from_time, observation_array, planar_chunk_message, status_values
from dcqfa_ros.ros.diagnostics import Status
from dcqfa_ros.ros.interfaces import interface
from dcqfa_ros.ros.node import ManagedNode, run_node
from dcqfa_ros.runtime.errors import PolicyError, WorkerDiedError
from dcqfa_ros.runtime.synchronizer import Frame, ObservationSynchronizer, stack_history
from dcqfa_ros.runtime.variant_host import SwapResult, VariantHost

AUTO = "auto"
WAIT_S = 0.1
STOP_S = 0.5
LATENCIES_KEPT = 500


class PolicyNode(ManagedNode):
    """Runs one bundle's policy."""

    NODE_NAME = "policy_node"

    def declare(self) -> None:
        """Declare the parameters (see ``config/pusht_cell.yaml``)."""
        add = self.add_parameter
        add("bundle", "pusht_keypoints", "bundle: a name or a folder", read_only=True)
        add("variant", AUTO, "variant to run, or auto: the selector's choice")
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
        self._sync: ObservationSynchronizer | None = None
        self._inference_thread: threading.Thread | None = None
        self._halt = threading.Event()  # one per activation, so that an old thread can never come back to life
        self._choice = ""
        self._nothing_fits = False  # the selector's verdict: then a default would break a budget
        self._wanted = ""
        self._episode_lock = threading.Lock()
        self._episode: tuple[int, int, int] | None = None  # number, first stamp, seed
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._chunks = 0
        self._report_of = -1  # episode whose figures are being collected
        self._problem = ""

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
        rate = float(self.parameter("control_rate")) or action.rate_hz
        if abs(rate - action.rate_hz) > 1e-6:
            raise PolicyError(
                f"parameter control_rate is {rate:g} Hz, "
                f"but bundle {bundle.spec.name!r} was trained at {action.rate_hz:g} Hz"
            )
        sources = self._sources(bundle)
        self._period_ns = round(1e9 / rate)
        self._units = float(self.parameter("units_per_metre"))
        self._sync = ObservationSynchronizer(
            bundle.spec.observations, round(float(self.parameter("sync_tolerance_ms")) * 1e6)
        )
        self._bundle = bundle
        self._host = VariantHost(bundle, int(self.parameter("engine_threads")), self._on_swap)
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
        self._problem = ""
        if self._host is not None and not self._host.active:
            if self.parameter("variant") != AUTO:
                self._want(str(self.parameter("variant")))
            elif self._choice:
                self._want(self._choice)
            else:
                timeout = float(self.parameter("selector_timeout_s"))
                self._fallback = self.create_guarded_timer(timeout, self._use_default)
        run = functools.partial(self._run, self._halt)
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
        if self._sync is not None:
            self._sync.end()
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
        self._bundle, self._sync, self._wanted, self._choice = None, None, "", ""

    # variant

    def _want(self, variant: str) -> None:
        if self._host is None or variant == self._wanted:
            return
        self._wanted = variant
        self._host.request(variant)

    def _on_swap(self, result: SwapResult) -> None:
        self.post(functools.partial(self._settle_swap, result))

    def _settle_swap(self, result: SwapResult) -> None:
        values = {"swap_id": result.swap_id, "requested": result.requested, "active": result.active}
        if result.ok:
            self.event(0, f"variant {result.active!r} is active", **values, load_ms=round(result.load_ms, 1))
        else:
            self.event(2, f"variant {result.requested!r} refused: {result.reason}", **values, reason=result.reason)
            if self._wanted == result.requested:  # else a newer request is under way: its outcome counts
                self._wanted = result.active
            if result.active and self.parameter("variant") == result.requested:
                self.restore_parameter("variant", result.active)
        self._publish_active()

    def _publish_active(self) -> None:
        self._active_publisher.publish(String(data=self._host.active if self._host else ""))

    def _on_choice(self, message: Any) -> None:
        if self._host is None:
            return
        try:
            choice = status_values(message).get("variant", "")
        except MessageError as error:
            self.event(1, f"message on the selector's topic ignored: {error}")
            return
        self._nothing_fits = not choice
        if not choice:
            if self.parameter("variant") == AUTO:
                self.event(2, f"the selector found no variant for this device: {message.status[0].message}")
            return
        reason = self._host.validate(choice)
        if reason:
            self.event(2, f"choice of the selector refused: {reason}")
            return
        self._choice = choice
        if self.parameter("variant") == AUTO:
            self._want(choice)

    # observations and episodes

    def _on_observation(self, key: str, message: Any) -> None:
        sync, now = self._sync, time.monotonic_ns()
        if sync is None:
            return
        spec = sync.specs[key]
        scale = self._units if spec.units == "px" else 1.0
        try:
            sync.add(key, from_time(message.header.stamp), observation_array(message, spec.shape, scale), now)
        except (MessageError, PolicyError) as error:
            self._halt_episode(str(error))

    def _on_arm_state(self, message: Any) -> None:
        try:
            values = status_values(message)
            number, cell_seed = int(values["episode"]), int(values["seed"])
        except (MessageError, KeyError, ValueError) as error:
            self.event(1, f"message on the arm's state topic ignored: {error!r}")
            return
        if values.get("state") != "armed":
            with self._episode_lock:
                self._episode = None
                reported, self._report_of = self._report_of == number, -1
            if self._sync is not None:
                self._sync.end()
            if reported:
                self.event(0, f"episode {number} ended: {values.get('reason', '')}", episode=number, **self._figures())
            return
        with self._episode_lock:
            if self._report_of == number:
                return
            self._report_of = number
            self._latencies.clear()
            self._chunks = 0
            own = int(self.parameter("noise_seed"))
            seed = own if own >= 0 else cell_seed
            stamp = from_time(message.header.stamp)
            self._episode = (number, stamp, seed)
            self._problem = ""
            if self._sync is not None:
                self._sync.begin(stamp)

    def _halt_episode(self, reason: str) -> None:
        """Send nothing more in this episode; the arm's deadman then stops the arm."""
        with self._episode_lock:
            first = self._episode is not None and not self._problem
            self._problem = self._problem or reason
            self._episode = None
        if self._sync is not None:
            self._sync.end()
        if first:
            self.event(2, f"no further commands in this episode: {reason}", reason=reason)

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._halt_episode("reset by ~/reset")
        response.success, response.message = True, "observations and chunks forgotten; the next arming begins anew"
        return response

    # inference thread

    def _run(self, halt: threading.Event) -> None:
        running: tuple[int, int, int] | None = None
        due = chunk = 0
        while not halt.is_set():
            with self._episode_lock:
                episode = self._episode
            if episode is None or self._host is None or not self._host.active:
                running = None
                halt.wait(0.005)
                continue
            if episode != running:
                running, due, chunk = episode, episode[1], 0
            assert self._sync is not None
            frames = self._sync.wait_for(due, WAIT_S)
            if not self._fresh(frames) or frames is None:
                continue
            if self._infer(episode, frames, chunk, halt):
                due = frames[-1].stamp_ns + self._spec.action.executed * self._period_ns - self._period_ns // 2
                chunk += 1

    def _fresh(self, frames: list[Frame] | None) -> bool:
        if self.parameter("rate") == "max":
            return True  # the cell waits for the command: nothing ages
        assert self._sync is not None
        ages = self._sync.ages_ms(time.monotonic_ns(), frames[-1].stamp_ns if frames else None)
        for key, spec in self._sync.specs.items():
            age = ages[key]
            if age is None or age > spec.max_age_ms:
                held = "has not come yet" if age is None else f"is {age:.0f} ms old"
                self._halt_episode(f"observation {key!r} {held}, its limit is {spec.max_age_ms:.0f} ms")
                return False
        return True

    def _infer(self, episode: tuple[int, int, int], frames: list[Frame], chunk: int, halt: threading.Event) -> bool:
        host, sync = self._host, self._sync
        assert host is not None and sync is not None
        begin = time.monotonic()
        try:
            actions, _ = host.predict(
                stack_history(frames, sync.specs), episode[2], chunk, int(self.parameter("denoising_steps")) or None
            )
        except WorkerDiedError as error:
            if not halt.is_set():  # else it was killed to let this node go
                self._lose_worker(str(error))
            return False
        except PolicyError as error:
            self._halt_episode(str(error))
            return False
        self._latencies.append((time.monotonic() - begin) * 1e3)
        with self._episode_lock:
            if self._episode != episode or halt.is_set():
                return False  # the arm was disarmed meanwhile: no command after a stop
            self._chunk_publisher.publish(
                planar_chunk_message(
                    frames[-1].stamp_ns, self._spec.action.frame, actions, self._period_ns, self._units
                )
            )
            self._chunks += 1
        return True

    def _lose_worker(self, reason: str) -> None:
        self._wanted = ""
        self._publish_active()
        self._halt_episode(reason)
        self.fault(reason)

    def _figures(self) -> dict[str, object]:
        latency = np.array(self._latencies or [0.0])
        p50, p99 = np.percentile(latency, [50, 99])
        return {"chunks": self._chunks, "inference_p50_ms": f"{p50:.2f}", "inference_p99_ms": f"{p99:.2f}"}

    def status(self) -> list[Status]:
        """Variant, latency percentiles, observation ages, drops."""
        host, sync = self._host, self._sync
        if host is None or sync is None:
            return [Status(1, "policy", "not configured", {})]
        lost = host.lost()
        if lost:
            self._lose_worker(lost)
        ages = sync.ages_ms(time.monotonic_ns())
        values = {
            "variant": host.active,
            "requested": str(self.parameter("variant")),
            **{key: str(value) for key, value in self._figures().items()},
            "swaps": str(host.swaps),
            "dropped_observations": str(sync.dropped),
            **{f"age_ms.{key}": "" if age is None else f"{age:.1f}" for key, age in ages.items()},
        }
        if self._problem:
            return [Status(2, "policy", self._problem, values)]
        text = f"variant {host.active!r} active" if host.active else "no variant loaded yet"
        return [Status(0 if host.active else 1, "policy", text, values)]


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``policy_node``."""
    return run_node(PolicyNode, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
