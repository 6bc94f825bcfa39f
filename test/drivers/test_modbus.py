"""Modbus RTU requests and answers: what the standard and another implementation say."""

from __future__ import annotations

import minimalmodbus
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.drivers import modbus

REGISTERS = st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=20)


def test_the_crc_is_the_standards() -> None:
    assert modbus.crc16(b"123456789") == 0x4B37, "the check value of CRC-16/MODBUS"


@given(st.binary(max_size=40))
def test_the_crc_agrees_with_minimalmodbus(data: bytes) -> None:
    assert modbus.crc16(data).to_bytes(2, "little") == minimalmodbus._calculate_crc(data)


def test_the_request_that_starts_the_stream_is_the_manuals() -> None:
    assert modbus.write_request(9, 410, [0x0200]).hex(" ").upper() == "09 10 01 9A 00 01 02 02 00 CD CA"


def answer(request: bytes, values: list[int]) -> bytes:
    body = request[:2] + bytes([2 * len(values)]) + b"".join(v.to_bytes(2, "big") for v in values)
    return modbus.with_crc(body)


@given(REGISTERS, st.binary(max_size=10), st.binary(max_size=10))
def test_an_answer_is_found_behind_and_before_noise(values: list[int], before: bytes, behind: bytes) -> None:
    request = modbus.read_request(9, 180, len(values))
    whole = answer(request, values)
    assert modbus.answer_size(request) == len(whole)
    found = modbus.find_answer(before.replace(b"\x09", b"\x08") + whole + behind, request)
    assert found == (tuple(values), len(before) + len(whole))


@given(REGISTERS, st.data())
def test_a_damaged_or_unfinished_answer_is_none(values: list[int], data: st.DataObject) -> None:
    request = modbus.read_request(9, 180, len(values))
    whole = answer(request, values)
    assert modbus.find_answer(whole[: data.draw(st.integers(0, len(whole) - 1))], request) is None
    index = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[index] ^= data.draw(st.integers(1, 255))
    assert modbus.find_answer(changed, request) is None


def test_a_write_is_answered_by_its_own_head_and_a_refusal_is_told() -> None:
    request = modbus.write_request(9, 410, [1])
    assert modbus.find_answer(modbus.with_crc(request[:6]), request) == ((), 8)
    with pytest.raises(modbus.ModbusExceptionError, match="exception 2 \\(illegal data address\\) for function 16"):
        modbus.find_answer(modbus.with_crc(bytes([9, 0x90, 2])), request)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: modbus.read_request(0, 180, 6), "slave: expected 1 to 247, got 0"),
        (lambda: modbus.read_request(9, 65535, 2), "register address: expected 0 to 65534, got 65535"),
        (lambda: modbus.read_request(9, 0, 126), "number of registers: expected 1 to 125, got 126"),
        (lambda: modbus.write_request(9, 0, [70000]), "register value: expected 0 to 65535, got 70000"),
    ],
)
def test_what_modbus_cannot_say_is_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
