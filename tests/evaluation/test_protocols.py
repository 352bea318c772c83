"""The three preprocessings against their definitions in numpy and PIL, and the two quantisations."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffdistill.evaluation import protocols


def images(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def pixels(name: str, size: int) -> np.ndarray:
    """What a protocol makes of images, back in 0..255."""
    shift, scale = (127.5, 127.5) if name == "pytorch-fid" else (128.0, 128.0)
    return np.asarray(protocols.preprocess(jnp.asarray(images(size)), name), np.float64) * scale + shift


def bilinear(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """float64, at fractional pixels `places` along both sides."""
    low = np.clip(np.floor(places), 0, x.shape[1] - 1).astype(int)
    high, part = np.minimum(low + 1, x.shape[1] - 1), np.clip(places, 0, None) - low
    rows = x[:, low] * (1 - part)[:, None, None] + x[:, high] * part[:, None, None]
    return rows[:, :, low] * (1 - part)[:, None] + rows[:, :, high] * part[:, None]


@pytest.mark.parametrize("size", [32, 256, 299, 512])
def test_tf_samples_without_the_half_pixel(size):
    expected = bilinear(images(size).astype(np.float64), np.arange(299) * size / 299)
    np.testing.assert_allclose(pixels("tf", size), expected, atol=2e-2)  # places in float32


@pytest.mark.parametrize("size", [32, 256, 299, 512])
def test_pytorch_fid_samples_at_pixel_centres(size):
    expected = bilinear(images(size).astype(np.float64), np.maximum((np.arange(299) + 0.5) * size / 299 - 0.5, 0))
    np.testing.assert_allclose(pixels("pytorch-fid", size), expected, atol=2e-2)


@pytest.mark.parametrize("size", [32, 256, 512])
def test_clean_is_the_bicubic_of_pil_on_float_images(size):
    expected = [
        [
            np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        for image in images(size)
    ]
    expected = np.clip(np.moveaxis(np.array(expected), 1, -1), 0, 255)
    np.testing.assert_allclose(pixels("clean", size), expected, atol=5e-3)


@pytest.mark.parametrize("name", ["tf", "pytorch-fid", "clean"])
def test_images_of_the_right_size_are_only_normalised(name):
    np.testing.assert_allclose(pixels(name, 299), images(299), atol=1e-4)


def test_quantisations_truncate():
    x = jnp.array([-1.5, -1.0, -0.999, 0.0, 0.0039, 0.00393, 0.999, 1.0, 2.0])
    assert protocols.quantise(x, "edm").tolist() == [0, 0, 0, 128, 128, 128, 255, 255, 255]
    assert protocols.quantise(x, "adm").tolist() == [0, 0, 0, 127, 127, 128, 254, 255, 255]
    levels = jnp.arange(256) / 127.5 - 1
    np.testing.assert_array_equal(protocols.quantise(levels, "edm"), np.arange(256))
    assert np.abs(protocols.quantise(levels, "adm").astype(int) - np.arange(256)).max() <= 1  # float32 just below
    with pytest.raises(ValueError, match="quantisation"):
        protocols.quantise(x, "round")
