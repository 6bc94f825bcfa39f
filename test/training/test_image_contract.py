"""The robot's runtime gives the encoder the vector that training gave it: scalars, then the cropped image."""

from __future__ import annotations

import numpy as np
import torch

from dcqfa_ros.bundle.schema import NormalizerKind
from dcqfa_ros.runtime.observations import ObservationLayout
from dcqfa_ros.runtime.pictures import PictureHistory
from dcqfa_ros.runtime.worker_memory import ChunkMemory
from test.runtime.conftest import tiny_spec
from training.data.images import IMAGE_OFFSET, IMAGE_SCALE, ImageWindows

CROP = 12


def test_the_vector_of_an_image_policy_is_that_of_training() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 16, 17, 3), dtype=np.uint8)
    low = generator.standard_normal((1, 2, 3)).astype(np.float32)
    trained = ImageWindows(torch.from_numpy(low), torch.from_numpy(images), torch.tensor([[0, 1]]), CROP)[:1]
    common = {"frame": "-", "rate_hz": 10.0, "max_age_ms": 300.0, "history": 2}
    normalizer = {"kind": NormalizerKind.MIN_MAX.value, "scale": [IMAGE_SCALE] * 3, "offset": [IMAGE_OFFSET] * 3}
    spec, _ = tiny_spec(
        observations={
            "position": {**common, "type": "low_dim", "shape": [3], "dtype": "float32", "units": "m",
                         "normalizer": {"kind": "identity"}},
            "image": {**common, "type": "image", "shape": [16, 17, 3], "crop": [CROP, CROP], "dtype": "uint8",
                      "units": "intensity 0 to 255", "normalizer": normalizer},
        }
    )  # fmt: skip
    layout, memory = ObservationLayout(spec), ChunkMemory(spec)
    try:
        memory.put({"position": low, "image": PictureHistory(list(images))})
        out = np.empty((1, 2, layout.dim), np.float32)
        layout.encode(memory.observation, out)
    finally:
        memory.close()
    assert out.shape == tuple(trained.shape)
    assert np.abs(out - trained.numpy()).max() < 1e-6
