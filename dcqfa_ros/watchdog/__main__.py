"""``python -m dcqfa_ros.watchdog``: see the package."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from dcqfa_ros.watchdog.address import Address, AddressError
from dcqfa_ros.watchdog.guard import SERVICE, Watchdog
from dcqfa_ros.watchdog.heartbeat import DEFAULT_TIMEOUT_S


def main(argv: Sequence[str] | None = None) -> int:
    """Watch until INT, TERM or HUP; returns 0 then, 1 when it could not start."""
    parser = argparse.ArgumentParser(
        prog="python -m dcqfa_ros.watchdog",
        description=f"Calls {SERVICE} on the arm's controller when an armed arm_node falls silent. A process of its "
        "own: start it beside arm_node, never as its child. It is no safety function.",
        epilog="example: python -m dcqfa_ros.watchdog --url ws://192.168.1.7:9090 --listen udp:127.0.0.1:47800",
    )
    parser.add_argument("--url", required=True, metavar="URL", help="rosbridge of the controller, ws://HOST:9090")
    parser.add_argument(
        "--listen", required=True, metavar="ADDRESS", help="where heartbeats come: unix:/path or udp:127.0.0.1:PORT"
    )
    parser.add_argument(
        "--timeout-ms",
        type=float,
        default=DEFAULT_TIMEOUT_S * 1e3,
        metavar="MS",
        help="silence that trips, 20 to 1000 ms (default: %(default)g)",
    )
    args = parser.parse_args(argv)
    try:
        watchdog = Watchdog(args.url, Address.parse(args.listen), args.timeout_ms / 1e3)
    except (AddressError, ValueError) as error:
        print(f"watchdog: could not start: {error}", file=sys.stderr, flush=True)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: watchdog.stop())
    try:
        watchdog.run()
    finally:
        watchdog.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
