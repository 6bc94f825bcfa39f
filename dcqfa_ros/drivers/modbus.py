"""The part of Modbus RTU that a sensor with registers needs: requests, answers, CRC. Pure functions of bytes.

Source: MODBUS over Serial Line, Specification and Implementation Guide V1.02, and MODBUS Application Protocol V1.1b3.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

READ_HOLDING_REGISTERS = 0x03
WRITE_MULTIPLE_REGISTERS = 0x10
EXCEPTION_BIT = 0x80
MAX_READ = 125
"""Most registers that one request can read."""
MAX_WRITE = 123
"""Most registers that one request can write."""

EXCEPTIONS = {1: "illegal function", 2: "illegal data address", 3: "illegal data value", 4: "device failure"}


class ModbusError(ValueError):
    """An answer that is no answer to the request; the message says what it is instead."""


class ModbusExceptionError(ModbusError):
    """The device understood the request and refused it."""


def _table() -> tuple[int, ...]:
    entries = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ 0xA001 if value & 1 else value >> 1
        entries.append(value)
    return tuple(entries)


_TABLE = _table()


def crc16(data: bytes | bytearray | memoryview) -> int:
    """Return Modbus' CRC-16 (polynomial 0xA001 reflected, start 0xFFFF); it travels low byte first."""
    crc = 0xFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc


def with_crc(body: bytes) -> bytes:
    """Return ``body`` followed by its CRC, low byte first."""
    return body + crc16(body).to_bytes(2, "little")


def read_request(slave: int, address: int, count: int) -> bytes:
    """Return the request for ``count`` holding registers from ``address`` on (function 3).

    Raises:
        ValueError: a number is out of Modbus' range.
    """
    _check(slave, address, count, MAX_READ)
    return with_crc(struct.pack(">BBHH", slave, READ_HOLDING_REGISTERS, address, count))


def write_request(slave: int, address: int, values: Sequence[int]) -> bytes:
    """Return the request that writes ``values`` (0..65535 each) from register ``address`` on (function 16).

    Raises:
        ValueError: a number is out of Modbus' range.
    """
    count = len(values)
    _check(slave, address, count, MAX_WRITE)
    for value in values:
        if not 0 <= value <= 0xFFFF:
            raise ValueError(f"register value: expected 0 to 65535, got {value}")
    head = struct.pack(">BBHHB", slave, WRITE_MULTIPLE_REGISTERS, address, count, 2 * count)
    return with_crc(head + struct.pack(f">{count}H", *values))


def answer_size(request: bytes) -> int:
    """Return how many bytes the answer to ``request`` has when it is no exception."""
    if request[1] == READ_HOLDING_REGISTERS:
        return 5 + 2 * struct.unpack_from(">H", request, 4)[0]
    return 8


def find_answer(received: bytes | bytearray, request: bytes) -> tuple[tuple[int, ...], int] | None:
    """Look for the answer to ``request`` in what was received, wherever in it it begins.

    Returns:
        The registers read (none for a write) and the index behind the answer's last byte; None while it is not
        there.

    Raises:
        ModbusExceptionError: the device refused the request.
    """
    slave, function = request[0], request[1]
    size = answer_size(request)
    expected = bytes([slave, function, size - 5]) if function == READ_HOLDING_REGISTERS else request[:6]
    for start in range(len(received) - 4):
        if received[start] != slave:
            continue
        if received[start + 1] == function | EXCEPTION_BIT:
            answer = received[start : start + 5]
            if crc16(answer[:3]) == int.from_bytes(answer[3:], "little"):
                what = EXCEPTIONS.get(answer[2], "unknown reason")
                raise ModbusExceptionError(f"exception {answer[2]} ({what}) for function {function}")
        elif received.startswith(expected, start) and len(received) >= start + size:
            answer = received[start : start + size]
            if crc16(answer[:-2]) == int.from_bytes(answer[-2:], "little"):
                if function != READ_HOLDING_REGISTERS:
                    return (), start + size
                return struct.unpack(f">{(size - 5) // 2}H", answer[3:-2]), start + size
    return None


def _check(slave: int, address: int, count: int, most: int) -> None:
    if not 1 <= slave <= 247:
        raise ValueError(f"slave: expected 1 to 247, got {slave}")
    if not 1 <= count <= most:
        raise ValueError(f"number of registers: expected 1 to {most}, got {count}")
    if not 0 <= address <= 0x10000 - count:
        raise ValueError(f"register address: expected 0 to {0x10000 - count}, got {address}")
