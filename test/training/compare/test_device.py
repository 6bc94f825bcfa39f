"""What the device of the column of latencies executes of a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.runtime.processor import X86, Processor
from training.compare.contenders import bits_of, by_table, device_executes, on_this_processor
from training.lut import load_table
from training.subnet import Layer, Precision, Subnet

TABLES = Path(__file__).parents[3] / "config/tables"
MIXED = Subnet((Layer(4, 1024, 8, 8), None, Layer(2, 512, 4, 8), Layer(2, 512, 8, 8)), Precision.INT)


@pytest.mark.parametrize(
    ("table", "bits", "expected"),
    [
        ("cpu_1_thread", "fp32", "FP32 products on cpu_1_thread."),
        ("cpu_1_thread", "w8a8", "INT8 products on cpu_1_thread."),
        ("orin_nx_16gb", "fp16", "FP16 products on orin_nx_16gb."),
        ("orin_nx_16gb", "w8a8", "INT8 products on orin_nx_16gb."),
    ],
)
def test_what_a_device_has_it_executes(table: str, bits: str, expected: str) -> None:
    known = load_table(TABLES / f"{table}.json")
    assert device_executes(bits_of(bits, None), known.name, by_table(known)) == expected


@pytest.mark.parametrize(
    ("table", "bits", "words"),
    [
        ("cpu_1_thread", "fp16", ("FP32 products of FP16", "widened to FP32", "no gain in speed")),
        ("cpu_1_thread", "fp8", ("FP32 products of FP8", "simulated", "no gain in speed")),
        ("cpu_1_thread", "w4a4", ("INT8 products of W4A4", "held and multiplied as 8 bits")),
        ("cpu_1_thread", "mixed", ("INT8 products of W4A8, W8A8", "held and multiplied as 8 bits")),
        ("orin_nx_16gb", "fp8", ("FP16 products of FP8", "no FP8 products")),
        ("orin_nx_16gb", "w4a4", ("FP16 products of W4A4", "bandwidth is saved, no arithmetic")),
        ("orin_nx_16gb", "mixed", ("FP16 products of W4A8", "INT8 products on")),
    ],
)
def test_what_it_executes_in_other_bits_is_said(table: str, bits: str, words: tuple[str, ...]) -> None:
    known = load_table(TABLES / f"{table}.json")
    text = device_executes(bits_of(bits, MIXED), known.name, by_table(known))
    assert text is not None and all(word in text for word in words), text


def test_a_processor_without_such_products_and_bits_that_cannot_be_told_are_said_so() -> None:
    plain = on_this_processor(Processor("old", X86, 1, ()))
    text = device_executes([Bits(weight=8, activation=8, kind="int")], "old", plain)
    assert text is not None and "no products of W8A8" in text and "VNNI" in text
    assert device_executes(bits_of("mixed", None), "old", plain) is None
