"""Full-precision variants whose weights lie in their files as float16 (``dcqfa export --store float16``).

They are computed in float32: as soon as such a variant is loaded, its weights take as much memory and time as any in
full precision.
"""

from __future__ import annotations

from dcqfa_ros.bundle.schema import Bits, LayerBits, VariantSpec

_FLOAT32 = Bits(weight=32, activation=32, kind="float")


def stored_as_half(variant: VariantSpec) -> bool:
    """Whether a full-precision variant's weights are stored as float16."""
    return variant.precision == "fp32" and any(layer.exported.weight == 16 for layer in variant.layers)


def loaded_bytes(variant: VariantSpec) -> int:
    """Bytes of a variant's weights once they are loaded, as an engine is given them."""
    return variant.size.disk_bytes * (2 if stored_as_half(variant) else 1)


def computed_bits(variant: VariantSpec, layer: LayerBits) -> Bits:
    """Bits that a layer asks to be computed in: as it is exported, float32 where it is only stored as float16."""
    return _FLOAT32 if stored_as_half(variant) else layer.exported
