"""What a processor multiplies exactly, and what follows for the runtimes on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcqfa_ros.runtime.processor import (
    Processor,
    adds_products_in_16_bits,
    onnxruntime_refusal,
    openvino_refusal,
    this_processor,
)


def read(folder: Path, machine: str, flags: str | None) -> Processor:
    cpuinfo = folder / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: {flags}\n")
    return this_processor(cpuinfo, machine)


@pytest.mark.parametrize(
    ("machine", "flags", "saturates"),
    [
        ("x86_64", "fpu avx2 avx512_vnni", False),
        ("AMD64", "fpu avx2 avx_vnni", False),
        ("x86_64", "fpu avx2 avx512f", True),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_exact_products_are_asked_for_only_where_the_processor_would_saturate(
    tmp_path: Path, machine: str, flags: str | None, saturates: bool
) -> None:
    assert adds_products_in_16_bits(read(tmp_path, machine, flags)) is saturates


@pytest.mark.parametrize(
    ("machine", "flags", "onnxruntime", "openvino"),
    [
        ("x86_64", "fpu avx2 avx512_vnni", "", ""),
        ("x86_64", "fpu avx2 amx_int8", "", ""),
        ("x86_64", "fpu avx2", "", "can saturate"),
        ("x86_64", "fpu sse4_1", "neither VNNI nor AVX2", "can saturate"),
        ("x86_64", None, "neither VNNI nor AVX2", "can saturate"),
        ("aarch64", None, "", "for x86 only, this is aarch64"),
    ],
)
def test_runtimes_refuse_8_bit_products_that_would_not_be_exact(
    tmp_path: Path, machine: str, flags: str | None, onnxruntime: str, openvino: str
) -> None:
    processor = read(tmp_path, machine, flags)
    for refusal, expected in ((onnxruntime_refusal(processor), onnxruntime), (openvino_refusal(processor), openvino)):
        assert (refusal is None) if not expected else (refusal is not None and expected in refusal)


def test_this_computer_is_described() -> None:
    assert this_processor().architecture
