"""The Modbus side of an emulated FT 300-S: its registers, and what it answers. Pure functions of bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from dcqfa_ros.drivers import ft300s_protocol as ft
from dcqfa_ros.drivers.modbus import EXCEPTION_BIT, READ_HOLDING_REGISTERS, WRITE_MULTIPLE_REGISTERS, with_crc
from dcqfa_ros.sim.ft300s_options import FT300SOptions

_ILLEGAL_FUNCTION, _ILLEGAL_ADDRESS = 1, 2


def registers(options: FT300SOptions, counts: ft.Counts) -> dict[int, int]:
    """Return every register that can be read, with the reading ``counts``."""
    firmware, identity = ft.info_registers(
        ft.SensorInfo(options.serial_number, options.production_year, options.firmware)
    )
    groups: list[tuple[int, Sequence[int]]] = [
        (ft.WRENCH_REGISTER, [count & 0xFFFF for count in counts]),
        (ft.ACCELERATION_REGISTER, (0, 0, 1000)),
        (ft.FIRMWARE_REGISTER, firmware),
        (ft.SERIAL_NUMBER_REGISTER, identity),
        (ft.STREAM_REGISTER, (0,)),
    ]
    return {first + index: value for first, values in groups for index, value in enumerate(values)}


def request_size(received: bytearray) -> int | None:
    """Return the size of the request that begins with ``received``; None where none can."""
    if received[0] != ft.SLAVE:
        return None
    if len(received) >= 2 and received[1] == WRITE_MULTIPLE_REGISTERS:
        return 9 + received[6] if len(received) >= 7 else 8
    return 8


def answer(request: bytes, readable: Mapping[int, int]) -> tuple[bytes, bool]:
    """Return the answer to a request whose CRC is right, and whether the request starts the stream."""
    function = request[1]
    address, count = struct.unpack_from(">HH", request, 2)
    start = False
    if function == READ_HOLDING_REGISTERS:
        wanted = range(address, address + count)
        if count and all(register in readable for register in wanted):
            body = struct.pack(f">BBB{count}H", ft.SLAVE, function, 2 * count, *(readable[r] for r in wanted))
        else:
            body = bytes([ft.SLAVE, function | EXCEPTION_BIT, _ILLEGAL_ADDRESS])
    elif function == WRITE_MULTIPLE_REGISTERS:
        if address == ft.STREAM_REGISTER and count == 1 and request[6] == 2:
            body = request[:6]
            start = struct.unpack_from(">H", request, 7)[0] == ft.STREAM_ON
        else:
            body = bytes([ft.SLAVE, function | EXCEPTION_BIT, _ILLEGAL_ADDRESS])
    else:
        body = bytes([ft.SLAVE, function | EXCEPTION_BIT, _ILLEGAL_FUNCTION])
    return with_crc(body), start
