"""Pictures reach the network's size with one copy, and bundles that contradict themselves are refused by key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.bundle.schema import BundleSpec, DepthObservation, ImageObservation
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.observations import ObservationLayout
from dcqfa_ros.runtime.pictures import PictureForm, PictureHistory
from dcqfa_ros.runtime.worker_memory import ChunkMemory
from test.runtime.conftest import tiny_spec

COMMON = {"frame": "camera", "rate_hz": 30.0, "max_age_ms": 300.0, "history": 2}
SCALE = {"kind": "min_max", "scale": [1 / 127.5] * 3, "offset": [-1.0] * 3}


def image(**changes: Any) -> dict[str, Any]:
    document = {"type": "image", "shape": [8, 10, 3], "dtype": "uint8", "units": "intensity", "normalizer": SCALE}
    return {**COMMON, **document, **changes}


def depth(**changes: Any) -> dict[str, Any]:
    document = {"type": "depth", "shape": [8, 10], "dtype": "uint16", "units": "m", "depth_scale": 0.001}
    return {**COMMON, **document, "normalizer": {"kind": "identity"}, **changes}


def scalars() -> dict[str, Any]:
    document = {"type": "low_dim", "shape": [2], "dtype": "float32", "units": "m", "normalizer": {"kind": "identity"}}
    return {**COMMON, **document}


def spec_of(**observations: Any) -> BundleSpec:
    return tiny_spec(observations=observations)[0]


def picture(seed: int, dtype: str = "uint8", *shape: int) -> np.ndarray:
    limit = int(np.iinfo(dtype).max)
    return np.random.default_rng(seed).integers(0, limit, shape or (8, 10, 3), dtype=dtype, endpoint=True)


def test_a_crop_is_in_the_middle() -> None:
    form = PictureForm("front", ImageObservation.model_validate(image(crop=[4, 6])))
    out, source = np.empty(form.shape, np.uint8), picture(0)
    form.write(source, out)
    assert np.array_equal(out, source[2:6, 2:8])


def test_images_are_averaged_and_depth_takes_a_measured_value() -> None:
    form = PictureForm("front", ImageObservation.model_validate(image(resize=[4, 5], crop=[2, 3])))
    out, source = np.empty(form.shape, np.uint8), picture(0)
    form.write(source, out)
    blocks = source.reshape(4, 2, 5, 2, 3).mean((1, 3))[1:3, 1:4]
    assert np.abs(out - blocks).max() <= 0.5
    form = PictureForm("d", DepthObservation.model_validate(depth(resize=[4, 5])))
    measured, out = picture(1, "uint16", 8, 10), np.empty(form.shape, np.uint16)
    form.write(measured, out)
    assert np.isin(out, measured).all() and len(np.unique(out)) > 10


def test_a_padded_read_only_view_of_a_message_is_read_in_place() -> None:
    row = 10 * 3 + 7
    data = bytes(np.random.default_rng(2).integers(0, 256, 8 * row, dtype=np.uint8))
    view = np.ndarray((8, 10, 3), np.uint8, data, 0, (row, 3, 1))
    for changes in ({}, {"crop": [4, 4]}, {"resize": [4, 5]}):
        form = PictureForm("front", ImageObservation.model_validate(image(**changes)))
        out, expected = np.empty(form.shape, np.uint8), np.empty(form.shape, np.uint8)
        form.write(view, out)
        form.write(np.ascontiguousarray(view), expected)
        assert np.array_equal(out, expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, [8, 10], [4, 4], [1, 1]]))
def test_what_the_network_reads_is_scalars_then_pictures_channels_before_rows(seed: int, crop: Any) -> None:
    # Pictures first in the bundle: the order of the network is that of training all the same.
    spec = spec_of(front=image(crop=crop), d=depth(crop=crop), position=scalars())
    layout, memory = ObservationLayout(spec), ChunkMemory(spec)
    try:
        colors, ranges = [picture(seed + i) for i in range(2)], [picture(seed + i, "uint16", 8, 10) for i in range(2)]
        low = np.random.default_rng(seed).standard_normal((1, 2, 2)).astype(np.float32)
        raw = {"front": PictureHistory(colors), "d": PictureHistory(ranges), "position": low}
        assert layout.check(raw) == 1
        memory.put(raw)
        assert layout.check(memory.observation) == 1
        out = np.empty((1, 2, layout.dim), np.float32)
        layout.encode(memory.observation, out)
    finally:
        memory.close()
    height, width = crop or (8, 10)
    rows, columns = ((8 - height) // 2, height), ((10 - width) // 2, width)
    window = np.s_[rows[0] : sum(rows), columns[0] : sum(columns)]
    for step in range(2):
        chw = np.moveaxis(colors[step][window] / 127.5 - 1.0, -1, 0)
        expected = np.concatenate([low[0, step], chw.ravel(), (ranges[step][window] * 0.001).ravel()])
        assert np.allclose(out[0, step], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("observations", "text"),
    [
        ({"front": image(crop=[9, 4])}, "'front': crop (9, 4) is larger than the picture, (8, 10)"),
        ({"front": image(resize=[4, 4], crop=[5, 4])}, "crop (5, 4) is larger than the picture, (4, 4)"),
        ({"front": image(dtype="uint16")}, "'front': image expects shape (height, width, 3) and dtype uint8"),
        ({"front": image(shape=[8, 10], normalizer={"kind": "identity"})}, "'front': image expects shape"),
        ({"d": depth(shape=[8, 10, 1])}, "'d': depth expects shape (height, width) and dtype uint16"),
        ({"d": depth(normalizer={"kind": "min_max", "scale": [1.0] * 10, "offset": [0.0] * 10})}, "depth reaches"),
        ({"front": image(), "d": depth(history=1)}, "must share one history, got front 2, d 1"),
        ({"f": {**scalars(), "type": "wrench", "shape": [6], "clip": [1.0] * 6}}, "'f': wrench expects shape"),
    ],
)
def test_a_bundle_that_contradicts_itself_is_refused_by_key(observations: dict[str, Any], text: str) -> None:
    with pytest.raises(PolicyError) as error:
        ObservationLayout(spec_of(**observations))
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("frames", "text"),
    [([picture(0)], "expected 2 pictures"), ([picture(0), picture(0)[:4]], "uint8 (8, 10, 3)"),
     ([picture(0, "uint16")] * 2, "got 2 of")],
)  # fmt: skip
def test_pictures_of_another_size_or_number_are_refused_by_key(frames: list[np.ndarray], text: str) -> None:
    layout = ObservationLayout(spec_of(front=image()))
    with pytest.raises(PolicyError) as error:
        layout.check({"front": PictureHistory(frames)})
    assert "'front'" in str(error.value) and text in str(error.value)
