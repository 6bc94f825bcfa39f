"""A lifecycle node whose callbacks cannot end the process: parameters, topics, services, timers, diagnostics."""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.clock import Clock, ClockType  # type: ignore[attr-defined]  # Humble has no rclpy.clock_type
from rclpy.duration import Duration
from rclpy.exceptions import InvalidHandle
from rclpy.lifecycle import LifecycleNode
from rclpy.parameter import Parameter

from dcqfa_ros.errors import UserError
from dcqfa_ros.ros.diagnostics import EVENT, Level, Status, to_message
from dcqfa_ros.ros.discovery import discovery_profile
from dcqfa_ros.ros.interfaces import INTERFACES, interface
from dcqfa_ros.ros.parameters import Apply, ParameterRules, Validate
from dcqfa_ros.ros.qos import RELIABILITIES, profile, qos


class Refused(UserError):  # noqa: N818 - a refusal is an answer, no error
    """Raised by a service callback to refuse a request: the caller gets the text, the node carries on."""


def one_line(error: BaseException) -> str:
    """Return an error's text in one line, with its type unless it was written for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}"


class GuardedNode(LifecycleNode):
    """What :class:`~dcqfa_ros.ros.node.ManagedNode` offers apart from the lifecycle itself."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        """Create the node without any parameter, topic or service of its own except ``diagnostics``."""
        with discovery_profile():
            super().__init__(name, **kwargs)
        self.__thread = threading.get_ident()
        self.__inbox: deque[Callable[[], None]] = deque()
        self.__closed = False
        self.__error_count = 0
        self.__scope: str | None = None  # what is created now lives until this scope is released; None: for ever
        self.__scopes: dict[str, list[Callable[[], object]]] = {"setup": [], "start": []}
        self.__rules = ParameterRules(self.parameter, self.__report_rule)
        self.add_on_set_parameters_callback(self.__rules)
        self.__wake_guard = self.create_guard_condition(self.__drain)
        self.__steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.__diagnostics = self.create_interface_publisher("diagnostics")
        self.__types = {key: type(value) for key, value in vars(self).items() if value is not None}

    @abstractmethod
    def fault(self, reason: str) -> None:
        """Stop with ``reason``; how is for the lifecycle to say (:class:`~dcqfa_ros.ros.node.ManagedNode`)."""

    def check_attributes(self) -> None:
        """Find subclasses that use an attribute's name of rclpy's node for something else (``_clock``, ``_logger``).

        Raises:
            TypeError: one does; the message names it.
        """
        for key, kind in self.__types.items():
            if not isinstance(vars(self).get(key), kind):
                raise TypeError(f"{type(self).__name__}.{key} belongs to rclpy's node: choose another name")

    # Parameters ------------------------------------------------------------------------------------------------------

    def add_parameter(
        self,
        name: str,
        default: Any,
        description: str,
        *,
        read_only: bool = False,
        minimum: float | None = None,
        maximum: float | None = None,
        choices: Sequence[str] = (),
    ) -> Any:
        """Declare a parameter and return its value (from the parameter file or the command line, else ``default``).

        Args:
            name: relative name, may contain dots.
            default: gives the type too.
            description: one line, with units.
            read_only: refuse changes while the node runs.
            minimum: smallest allowed number.
            maximum: largest allowed number.
            choices: allowed texts.

        Raises:
            UserError: the given value has the wrong type, is out of range or is not among ``choices``.
        """
        descriptor = ParameterDescriptor(description=description, read_only=read_only)
        if choices:
            descriptor.additional_constraints = "one of: " + ", ".join(choices)
        if minimum is not None or maximum is not None:
            _set_range(descriptor, default, minimum, maximum)
        try:
            value = self.declare_parameter(name, default, descriptor).value
        except Exception as error:
            hint = " (write 10.0, not 10)" if isinstance(default, float) else ""
            wanted = f"expected {type(default).__name__}{hint}{_bounds(minimum, maximum)}"
            raise UserError(f"{self.get_name()}: parameter {name}: {wanted}; {one_line(error)}") from error
        if choices:
            refusal = _not_among(choices, value)
            if refusal:
                raise UserError(f"{self.get_name()}: parameter {name}: {refusal}")
            if not read_only:
                self.__rules.add(name, functools.partial(_not_among, choices), None)
        return value

    def parameter(self, name: str) -> Any:
        """Return the present value of a declared parameter."""
        return self.get_parameter(name).value

    def parameter_names(self) -> set[str]:
        """Return every parameter that can be set, also those of topics that ``setup()`` only declares."""
        topics = {f"qos.{entry.key}.reliability" for entry in INTERFACES if entry.kind == "topic"}
        return set(self.get_parameters_by_prefix("")) | topics

    def on_parameter(self, name: str, validate: Validate | None = None, apply: Apply | None = None) -> None:
        """Say how a change of parameter ``name`` is treated; replaces the check of ``choices``.

        Args:
            name: a declared parameter.
            validate: returns None, or why the value is refused; cheap and without side effects.
            apply: takes the new value over, quickly; :meth:`parameter` still gives the old one. Raising refuses.
        """
        self.__rules.remove(name)
        self.__rules.add(name, validate, apply)

    def restore_parameter(self, name: str, value: Any) -> None:
        """Set one of the node's own parameters without running its rule (a swap that failed later)."""
        self.__rules.bypass(lambda: self.set_parameters([Parameter(name, value=value)]))

    def __report_rule(self, name: str, error: Exception) -> None:
        self.event(Level.WARN, f"parameter {name} refused: {one_line(error)}", parameter=name)

    # Communication ---------------------------------------------------------------------------------------------------

    def __qos(self, key: str) -> Any:
        entry = interface(key)
        name = f"qos.{key}.reliability"
        if not self.has_parameter(name):
            default = profile(entry.qos).reliability
            self.add_parameter(name, default, f"reliability of {entry.name}", read_only=True, choices=RELIABILITIES)
        return qos(entry.qos, self.parameter(name))

    def create_interface_publisher(self, key: str, **fields: str) -> Any:
        """Return a publisher for the table's ``key``; ``fields`` fill the name's placeholders.

        It publishes in every lifecycle state: a node must be able to send its last word while it stops.
        """
        entry = interface(key)
        publisher = self.create_publisher(entry.message_class(), entry.resolve(**fields), self.__qos(key))
        self.__own(lambda: self.destroy_publisher(publisher))
        return publisher

    def create_guarded_subscription(
        self, key: str, callback: Callable[[Any], None], raw: bool = False, newest: int | None = None, **fields: str
    ) -> Any:
        """Subscribe to the table's ``key``; ``raw`` hands the callback serialized bytes.

        With ``newest`` no more than so many messages wait for a callback that cannot keep up; older ones are lost.
        """
        entry = interface(key)
        quality = self.__qos(key)
        if newest is not None:
            quality.depth = min(quality.depth, newest)
        subscription = self.create_subscription(
            entry.message_class(), entry.resolve(**fields), self.guard(callback), quality, raw=raw
        )
        self.__own(lambda: self.destroy_subscription(subscription))
        return subscription

    def create_guarded_service(self, key: str, callback: Callable[[Any, Any], Any], **fields: str) -> Any:
        """Serve the table's ``key``: ``callback(request, response) -> response``.

        :class:`Refused` answers with ``success = False`` and its text; anything else raised does too, and is a fault.
        """

        def serve(request: Any, response: Any) -> Any:
            try:
                return callback(request, response)
            except Refused as refusal:
                text = str(refusal)
                self.event(Level.WARN, f"{entry.name} refused: {text}", service=entry.name)
            except Exception as error:  # noqa: BLE001 - becomes the caller's answer and a fault
                text = one_line(error)
                self.report_exception(error)
            response.success, response.message = False, text
            return response

        entry = interface(key)
        service = self.create_service(entry.message_class(), entry.resolve(**fields), serve)
        self.__own(lambda: self.destroy_service(service))
        return service

    def create_guarded_timer(self, period_s: float, callback: Callable[[], None], simulated: bool = False) -> Any:
        """Call ``callback`` every ``period_s`` s of the monotonic clock, or of the node's clock if ``simulated``."""
        timer = self.create_timer(period_s, self.guard(callback), clock=None if simulated else self.__steady)
        self.__own(lambda: self.destroy_timer(timer))
        return timer

    def guard(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap any callback: what it raises is logged, reported and turned into :meth:`fault`; returns None then."""

        @functools.wraps(callback)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return callback(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the very purpose
                self.report_exception(error)
                return None

        return guarded

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work``, guarded, on the executor's thread soon; may be called from any thread."""
        self.__inbox.append(work)
        self.wake()

    def wake(self) -> None:
        """Make the executor look up; may be called from any thread."""
        if not self.__closed:
            with contextlib.suppress(InvalidHandle):  # the node was destroyed between the check and the call
                self.__wake_guard.trigger()

    def __drain(self) -> None:
        while self.__inbox:
            self.guard(self.__inbox.popleft())()

    def __own(self, destroy: Callable[[], object]) -> None:
        if self.__scope is not None:
            self.__scopes[self.__scope].append(destroy)

    def enter_scope(self, scope: str | None) -> None:
        """Say how long what is created from now on lives: until the scope is released, or for ever (None)."""
        self.__scope = scope

    def release_scope(self, scope: str) -> None:
        """Destroy what was created in ``scope`` ("setup" or "start"), newest first."""
        while self.__scopes[scope]:
            self.tolerate(self.__scopes[scope].pop(), "release")

    # Diagnostics -----------------------------------------------------------------------------------------------------

    def event(self, level: int, message: str, **values: Any) -> None:
        """Log ``message`` and publish it in ``diagnostics`` at once, with ``values`` as text; any thread."""
        log = self.get_logger()  # rclpy ties each calling line to one severity, hence a line for each
        if level == Level.OK:
            log.info(message)
        elif level == Level.WARN:
            log.warning(message)
        else:
            log.error(message)
        self.publish_statuses([Status(level, EVENT, message, {k: str(v) for k, v in values.items()})])

    def publish_statuses(self, statuses: Sequence[Status]) -> None:
        """Publish ``statuses`` in ``diagnostics`` now; any thread."""
        stamp = self.get_clock().now().to_msg()
        message = to_message(self.get_name(), self.get_fully_qualified_name(), statuses, stamp)
        with contextlib.suppress(InvalidHandle):  # a foreign thread's event after the node was destroyed
            self.__diagnostics.publish(message)

    def flush_diagnostics(self, timeout: Duration) -> None:
        """Wait until every subscriber has what was published in ``diagnostics``, at most ``timeout``."""
        self.__diagnostics.wait_for_all_acked(timeout)

    # Errors ----------------------------------------------------------------------------------------------------------

    @property
    def errors_caught(self) -> int:
        """Number of exceptions caught so far."""
        return self.__error_count

    @property
    def on_executor_thread(self) -> bool:
        """Whether the caller runs on the thread that made the node, which spins it too."""
        return threading.get_ident() == self.__thread

    def note_exception(self, error: Exception) -> str:
        """Count ``error``, log its traceback at debug level and return its text in one line."""
        self.__error_count += 1
        self.get_logger().debug("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        return one_line(error)

    def report_exception(self, error: Exception) -> None:
        """Treat ``error`` as what a guarded callback raised: a fault."""
        self.fault(self.note_exception(error))

    def tolerate(self, work: Callable[[], object], what: str) -> None:
        """Run a step of stopping; what it raises is reported, and the stopping goes on."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a stop must reach its end
            self.event(Level.ERROR, f"{what} failed: {self.note_exception(error)}")

    def guard_own_services(self) -> None:
        """Wrap the services rclpy makes itself: a transition that is not allowed, for one, raises out of them."""
        for service in self.services:
            service.callback = functools.partial(self.__answer, service.callback, service.srv_name)

    def __answer(self, callback: Callable[[Any, Any], Any], name: str, request: Any, response: Any) -> Any:
        try:
            return callback(request, response)
        except Exception as error:  # noqa: BLE001 - a bad request must not stop the node
            self.get_logger().warning(f"{name}: request refused: {one_line(error)}")
            return response

    def destroy_node(self) -> None:
        """Destroy the node; :meth:`event`, :meth:`post` and :meth:`wake` from other threads become harmless."""
        self.__closed = True
        super().destroy_node()


def _bounds(minimum: float | None, maximum: float | None) -> str:
    low = "" if minimum is None else f" >= {minimum}"
    high = "" if maximum is None else f" <= {maximum}"
    return low + (" and" if low and high else "") + high


def _set_range(descriptor: ParameterDescriptor, default: Any, minimum: float | None, maximum: float | None) -> None:
    if isinstance(default, float):
        low = -1.7e308 if minimum is None else float(minimum)
        high = 1.7e308 if maximum is None else float(maximum)
        descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
    else:
        low_int = -(2**63) if minimum is None else int(minimum)
        high_int = 2**63 - 1 if maximum is None else int(maximum)
        descriptor.integer_range = [IntegerRange(from_value=low_int, to_value=high_int, step=0)]


def _not_among(choices: Sequence[str], value: Any) -> str | None:
    return None if value in choices else f"expected one of {', '.join(map(repr, choices))}, got {value!r}"
