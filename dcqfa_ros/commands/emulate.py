"""``dcqfa emulate``: devices of a cell with an arm, emulated behind their real transports."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dcqfa_ros.errors import UserError

if TYPE_CHECKING:
    from dcqfa_ros.sim.inovo import InovoEmulator

_PORT = 9090
_ACTIONS = "trip, estop, release, drop [S], pause, resume, fault CODE, state"


class EmulateError(UserError, ValueError):
    """An argument cannot be; the message names it."""


def register(subparsers: Any) -> None:
    """Add ``emulate``."""
    parser = subparsers.add_parser(
        "emulate",
        help="emulate the devices of a cell: Inovo arm, FT 300-S",
        description="Emulate devices behind their real transports, for drivers to connect to: the Inovo controller "
        "behind a WebSocket that speaks rosbridge, the FT 300-S behind a pseudo-terminal.",
        epilog="example: dcqfa emulate inovo --variant short --port 9090",
    )
    devices = parser.add_subparsers(metavar="DEVICE", required=True)
    inovo = devices.add_parser(
        "inovo",
        help="Inovo arm controller",
        description="Emulate an Inovo arm and its controller. In a terminal, type what shall happen: " + _ACTIONS + ".",
        epilog="example: dcqfa emulate inovo --ready --contact-height 0.3",
    )
    _add_inovo_arguments(inovo)
    inovo.set_defaults(func=_inovo)
    from dcqfa_ros.sim import ft300s_cli

    sensor = devices.add_parser("ft300s", help="Robotiq FT 300-S", description="Emulate a Robotiq FT 300-S.")
    ft300s_cli.add_arguments(sensor)
    sensor.set_defaults(func=ft300s_cli.run)
    cell = devices.add_parser(
        "cell",
        help="arm and force/torque sensor that feel the same surface",
        description="Emulate an Inovo arm with an FT 300-S on its flange in one process: the sensor feels the contact "
        "and the weight of the tool. In a terminal, type what shall happen: " + _ACTIONS + ".",
        epilog="example: dcqfa emulate cell --ft300s-link /tmp/ft300s --contact-height 0.3",
    )
    _add_inovo_arguments(cell)
    cell.add_argument("--ft300s-link", type=Path, metavar="PATH", help="symbolic link to the sensor's pseudo-terminal")
    cell.add_argument("--ft300s-noise", type=float, default=0.05, metavar="N", help="of force (default %(default)s)")
    cell.add_argument("--ft300s-paced", action="store_true", help="send its bytes one by one, as at 19200 baud")
    cell.set_defaults(func=_cell)


def _add_inovo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--variant", default="short", choices=("short", "medium", "long"), help="build of the arm (default %(default)s)"
    )
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this host only)")
    add("--port", type=int, default=_PORT, help="port to listen on, 0 for a free one (default %(default)s)")
    add("--gripper", default="robotiqd", metavar="NAME", help="device name; empty for none (default %(default)s)")
    add("--ready", action="store_true", help="power, drives and gripper are on from the start")
    add("--time-scale", type=float, default=1.0, metavar="X", help="of bring-up times (default %(default)s)")
    add("--tool-z", type=float, default=0.0, metavar="M", help="tool centre point before the flange (default 0)")
    add("--tool-mass", type=float, default=0.0, metavar="KG", help="weight the sensor feels (default 0)")
    add("--tool-com-z", type=float, default=0.0, metavar="M", help="centre of that mass before the flange (default 0)")
    add("--contact-height", type=float, default=math.nan, metavar="M", help="of a surface the tool can touch")
    add("--stiffness", type=float, default=5000.0, metavar="N/M", help="of the surface (default %(default)s)")
    add("--latency-ms", type=float, default=0.0, metavar="MS", help="delay of every frame (default 0)")
    add("--jitter-ms", type=float, default=0.0, metavar="MS", help="random part on top of it (default 0)")
    add(
        "--drop-every",
        type=float,
        default=0.0,
        metavar="S",
        help="drop all connections every S seconds (default never)",
    )


def _inovo(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        emulator = stack.enter_context(_emulator(args))
        return _serve(emulator, args, [], lambda: emulator.failure)


def _cell(args: argparse.Namespace) -> int:
    from dcqfa_ros.sim.ft300s import FT300SEmulator, FT300SOptions

    options = FT300SOptions(link=args.ft300s_link, noise=args.ft300s_noise, paced=args.ft300s_paced)
    with ExitStack() as stack:
        emulator = stack.enter_context(_emulator(args))
        sensor = stack.enter_context(FT300SEmulator(options, source=emulator.sensor_wrench))
        return _serve(emulator, args, [f"FT 300-S: {sensor.port}"], lambda: emulator.failure or sensor.failure)


def _emulator(args: argparse.Namespace) -> InovoEmulator:
    from dcqfa_ros.sim.contact import ContactPlane, ToolLoad
    from dcqfa_ros.sim.inovo import InovoEmulator

    for name, low, high in (
        ("port", 0, 65535),
        ("time_scale", 0.0, 100.0),
        ("tool_z", -1.0, 1.0),
        ("tool_mass", 0.0, 20.0),
        ("tool_com_z", -1.0, 1.0),
        ("stiffness", 1.0, 1e7),
        ("latency_ms", 0.0, 60_000.0),
        ("jitter_ms", 0.0, 60_000.0),
        ("drop_every", 0.0, 1e6),
    ):
        if not low <= getattr(args, name) <= high:
            raise EmulateError(f"--{name.replace('_', '-')}: expected {low:g} to {high:g}, got {getattr(args, name)}")
    if not (math.isnan(args.contact_height) or abs(args.contact_height) <= 10.0):
        raise EmulateError(f"--contact-height: expected -10 to 10, got {args.contact_height}")
    contact = None if math.isnan(args.contact_height) else ContactPlane(args.contact_height, args.stiffness)
    emulator = InovoEmulator(
        args.variant,
        host=args.host,
        port=args.port,
        gripper=args.gripper,
        tool_m=(0.0, 0.0, args.tool_z),
        ready=args.ready,
        time_scale=args.time_scale,
        contact=contact,
        load=ToolLoad(args.tool_mass, (0.0, 0.0, args.tool_com_z)) if args.tool_mass else None,
    )
    emulator.set_delay(args.latency_ms / 1000, args.jitter_ms / 1000)
    return emulator


def _serve(
    emulator: InovoEmulator, args: argparse.Namespace, lines: list[str], failure: Callable[[], BaseException | None]
) -> int:
    """Say what to connect to, then let it run until a signal comes or ``failure`` tells what went wrong."""
    done = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        done.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    if not _watch_parent():
        return 1
    print(f"Inovo arm ({emulator.variant}): ws://{args.host}:{emulator.port} (rosbridge)")
    for line in lines:
        print(line)
    print("emulating until Ctrl-C", flush=True)
    if sys.stdin is not None and sys.stdin.isatty():
        threading.Thread(target=_obey, args=(emulator,), name="keyboard", daemon=True).start()
    while not done.wait(args.drop_every or 1.0):
        if args.drop_every:
            emulator.drop_connections()
        cause = failure()
        if cause is not None:
            raise cause
    return 0


def _watch_parent() -> bool:
    """End with a supervisor that started this process; return False where it is gone already."""
    from dcqfa_ros.ros.process import PARENT_VARIABLE, die_with_parent

    return die_with_parent() if os.environ.get(PARENT_VARIABLE) else True


def _obey(emulator: InovoEmulator) -> None:
    """Carry out what people type."""
    for line in sys.stdin:
        words = line.split()
        if words:
            try:
                print(_act(emulator, words[0], words[1:]), flush=True)
            except (ValueError, KeyError, IndexError):
                print(f"{line.strip()!r}: expected one of {_ACTIONS}", flush=True)


def _act(emulator: InovoEmulator, name: str, arguments: list[str]) -> str:
    actions: dict[str, Callable[[], object]] = {
        "trip": emulator.trip,
        "estop": emulator.press_estop,
        "release": emulator.release_estop,
        "drop": lambda: emulator.drop_connections(float(arguments[0]) if arguments else 0.0),
        "pause": emulator.pause,
        "resume": emulator.resume,
        "fault": lambda: emulator.set_fault(int(arguments[0])),
        "state": lambda: None,
    }
    actions[name]()
    position = ", ".join(f"{value:.4f}" for value in emulator.position)
    power = emulator.power
    return (
        f"tool at ({position}) m, jog {emulator.twist.round(4).tolist()}, bus {power.bus}, "
        f"{'moves' if power.allows_motion else 'does not move'}, {emulator.server.clients} clients"
    )
