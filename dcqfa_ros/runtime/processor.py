"""The processor this computer multiplies 8-bit integers with, and which runtimes get exact results from it.

The selector and the engines go by the same rules: what the selector refuses, an engine that is named by hand refuses
too. Sources: onnxruntime pull request 12088 for 8-bit products on x86 without VNNI, which saturate unless the session
asks for exact ones (those take AVX2 and more time); OpenVINO's page on saturation: without VNNI its 8-bit products can
saturate, and nothing makes them exact; its page on the CPU device: quantized types on x86 only.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

DOT_PRODUCT_FEATURES = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
"""Processor features that multiply 8-bit integers into 32 bits exactly, most capable first."""

X86 = "x86_64"
_CPUINFO = Path("/proc/cpuinfo")
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE",
    "0xd4f": "Neoverse-V2",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """The CPU: ``features`` are those of :data:`DOT_PRODUCT_FEATURES` it has; ``cores`` counts logical processors.

    ``avx2`` says whether an x86 processor has the AVX2 instructions.
    """

    model: str
    architecture: str
    cores: int
    features: tuple[str, ...]
    avx2: bool = False


def processor_of(cpuinfo: str) -> Processor:
    """Describe the processor of a ``/proc/cpuinfo``; what does not say is of unknown model and architecture."""
    fields: dict[str, str] = {}
    cores = 0
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            cores += key.strip() == "processor"
            fields.setdefault(key.strip().lower(), value.strip())
    words = set(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
    features = tuple(f for f in DOT_PRODUCT_FEATURES if f in words)
    if "vendor_id" in fields:
        model = " ".join(fields.get("model name", "unknown processor").split())
        # Virtual machines and pre-production parts hide the product: family and model number tell them apart.
        if not re.search(r"\d{3}", model):
            model += f" family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
        return Processor(model, X86, cores, features, "avx2" in words)
    if "cpu part" in fields:
        part = fields["cpu part"].lower()
        return Processor(_ARM_PARTS.get(part, f"ARM part {part}"), "aarch64", cores, features)
    return Processor("unknown processor", "unknown architecture", cores, features)


def this_processor(cpuinfo: Path = _CPUINFO, machine: str = "") -> Processor:
    """Describe the processor that runs this process; where no file does, it has its architecture and no feature."""
    try:
        found = processor_of(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = processor_of("")
    architecture = (machine or platform.machine()).lower()
    architecture = X86 if architecture == "amd64" else architecture
    return Processor(found.model, architecture, found.cores, found.features, found.avx2)


def adds_products_in_16_bits(processor: Processor) -> bool:
    """Tell whether a processor adds pairs of uint8 x int8 products in 16 bits, where they can saturate.

    True for x86 without VNNI, and for x86 whose flags cannot be read. ONNX Runtime can then be told to be exact; where
    VNNI is exact anyway, that option costs half of the speed (ONNX Runtime 1.31: 24.5 against 16.7 ms a chunk).
    """
    return processor.architecture == X86 and not {"avx512_vnni", "avx_vnni"}.intersection(processor.features)


def onnxruntime_refusal(processor: Processor) -> str | None:
    """Return why ONNX Runtime has no exact 8-bit products on a processor, or None."""
    if processor.architecture != X86 or processor.features or processor.avx2:
        return None
    return "this processor has neither VNNI nor AVX2, which ONNX Runtime's exact 8-bit products need"


def openvino_refusal(processor: Processor) -> str | None:
    """Return why OpenVINO has no exact 8-bit products on a processor, or None."""
    if processor.architecture != X86:
        return f"OpenVINO has 8-bit products for x86 only, this is {processor.architecture}"
    if not processor.features:
        return "without VNNI or AMX OpenVINO's 8-bit products can saturate, which changes results"
    return None
