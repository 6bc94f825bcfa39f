"""The emulated FT 300-S as a process of its own: options, commands on standard input, a log of the frames."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from dcqfa_ros.sim.ft300s import EmulatorError, FT300SEmulator, FT300SOptions, SentFrame

COMMANDS = """commands on standard input, one per line:
  load FX FY FZ MX MY MZ   the load from the next sample on (N, N m)
  unplug, plug             pull the plug and put it in again
  silent on|off            send nothing, as without supply
  inject HEX               put bytes on the line
  quit                     end
each is answered by one JSON line with "done" or "error", and "monotonic_ns"

example: dcqfa emulate ft300s --link /tmp/ft300s --wrench 0 0 9.8 0 0 0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the emulator's options to ``parser``, and its commands to the end of its help."""
    default = FT300SOptions()
    add = parser.add_argument
    add(
        "--link",
        type=Path,
        metavar="PATH",
        help="a link to the pseudo-terminal, to be opened (default: none)",
    )
    add("--serial-number", default=default.serial_number, metavar="TEXT", help="(default %(default)s)")
    add("--firmware", default=default.firmware, metavar="TEXT", help="(default %(default)s)")
    add("--production-year", type=int, default=default.production_year, metavar="YEAR", help="(default %(default)s)")
    add(
        "--wrench",
        type=float,
        nargs=6,
        default=list(default.wrench),
        metavar=("FX", "FY", "FZ", "MX", "MY", "MZ"),
        help="load, N and N m (default: none)",
    )
    add("--noise", type=float, default=default.noise, metavar="N", help="standard deviation (default %(default)s)")
    add("--rate-hz", type=float, default=default.rate_hz, metavar="HZ", help="frames per second (default %(default)s)")
    add("--paced", action="store_true", help="let the bytes leave one by one, as at 19200 baud")
    add("--boot-streaming", action="store_true", help="stream when plugged in, without being asked")
    add("--no-stream", dest="stream_works", action="store_false", help="refuse to stream: the driver must poll")
    add(
        "--boot-s",
        type=float,
        default=default.boot_s,
        metavar="S",
        help="silence after the plug (default %(default)s)",
    )
    add("--answer-delay-s", type=float, default=default.answer_delay_s, metavar="S", help="(default %(default)s)")
    for name, what in (("damaged", "have a wrong byte"), ("cut", "lose bytes"), ("noise", "follow random bytes")):
        add(f"--{name}-share", type=float, default=0.0, metavar="SHARE", help=f"share of frames that {what} (0)")
    add("--seed", type=int, default=default.seed, metavar="N", help="of noise and damage (default %(default)s)")
    add(
        "--log",
        type=Path,
        metavar="FILE",
        help="write one JSON line per frame: when it was sampled, last byte",
    )
    parser.epilog = "\n\n".join(text for text in (parser.epilog, COMMANDS) if text)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    """Emulate until INT, TERM, HUP or the command ``quit``; prints one JSON line with the port when it is ready.

    Raises:
        EmulatorError: an option is out of range, the link's place is taken, or the log cannot be written.
    """
    emulator = FT300SEmulator(FT300SOptions(**{f.name: getattr(args, f.name) for f in fields(FT300SOptions)}))
    with _log(args.log) as log, _stop_signals() as stop:
        if log is not None:
            emulator.on_frame = lambda frame: _write(log, frame)
        with emulator:
            _say({"port": emulator.port, "serial_number": args.serial_number, "pid": os.getpid()})
            for line in _lines(stop):
                if emulator.failure is not None:
                    raise emulator.failure
                words = line.partition("#")[0].split()
                if words == ["quit"]:
                    break
                if words:
                    _say(_obey(emulator, words))
    return 0


def _obey(emulator: FT300SEmulator, words: list[str]) -> dict[str, Any]:
    name, *rest = words
    try:
        if name == "load" and len(rest) == 6:
            emulator.set_load([float(word) for word in rest])
        elif name in ("plug", "unplug") and not rest:
            getattr(emulator, name)()
        elif name == "silent" and rest in (["on"], ["off"]):
            emulator.set_silent(rest == ["on"])
        elif name == "inject" and len(rest) == 1:
            emulator.inject(bytes.fromhex(rest[0]))
        else:
            return {"error": f"{' '.join(words)}: expected one of: {' | '.join(_COMMAND_FORMS)}"}
    except (EmulatorError, ValueError) as error:
        return {"error": f"{name}: {error}"}
    return {"done": name, "monotonic_ns": time.monotonic_ns()}


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_COMMAND_FORMS = ("load FX FY FZ MX MY MZ", "unplug", "plug", "silent on|off", "inject HEX", "quit")


def _say(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def _write(log: Any, frame: SentFrame) -> None:
    try:
        log.write(json.dumps(frame.as_dict()) + "\n")
    except OSError as error:
        raise EmulatorError(f"--log {log.name}: cannot be written any more ({error.strerror})") from error


@contextlib.contextmanager
def _log(path: Path | None) -> Iterator[Any]:
    if path is None:
        yield None
        return
    try:
        file = path.open("w", buffering=1)
    except OSError as error:
        raise EmulatorError(f"--log {path}: cannot be written ({error.strerror})") from error
    with file:
        yield file


@contextlib.contextmanager
def _stop_signals() -> Iterator[int]:
    """Give a descriptor that becomes readable on INT, TERM and HUP; the handlers are put back afterwards."""
    receive, send = os.pipe()
    os.set_blocking(send, False)
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    wake = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    try:
        yield receive
    finally:
        signal.set_wakeup_fd(wake)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(receive)
        os.close(send)


def _lines(stop: int) -> Iterator[str]:
    """Yield lines of standard input, and an empty one each second, until ``stop`` is readable.

    The end of the input is no reason to stop, nor is a standard input that was closed from the beginning.
    """
    source, pending = -1 if sys.stdin is None else sys.stdin.fileno(), b""
    watched = [stop] if source < 0 else [stop, source]
    while True:
        ready, _, _ = select.select(watched, [], [], 1.0)
        if stop in ready:
            return
        if not ready:
            yield ""
            continue
        data = os.read(source, 4096)
        if not data:
            watched = [stop]
        *lines, pending = (pending + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
