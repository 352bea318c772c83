"""From x to bytes to what Inception sees: quantisations and three resizing protocols, all on the device.

A figure is comparable only with figures of the same protocol; the name is stored with every number.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffdistill.diffusion import names

SIDE = 299


def quantise(x: Array, how: str) -> Array:
    """x (..., C) in [-1, 1] -> bytes of the same shape; what lies outside is clipped.

    how: "edm" truncates 127.5 x + 128, which is the nearest of 256 levels; "adm" truncates 127.5 (x + 1), which is
    darker by half a level in the mean; "none" leaves x as it is, for those who compare samples themselves.
    """
    if how == "none":
        return x
    return names.choose(QUANTISATIONS, how, "quantisation")(x)


def _adm(x: Array) -> Array:
    return jnp.clip((x + 1.0) * 127.5, 0, 255).astype(jnp.uint8)


def _edm(x: Array) -> Array:
    return jnp.clip(x * 127.5 + 128, 0, 255).astype(jnp.uint8)


QUANTISATIONS: dict[str, Callable[[Array], Array]] = {"edm": _edm, "adm": _adm}


def preprocess(images: Array, protocol: str) -> Array:
    """images (B, H, W, 1 or 3) uint8 -> (B, 299, 299, 3) float32 as the protocol resizes and normalises them.

    Grey images are repeated in three channels. ValueError for an unknown protocol, and for anything but bytes.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"expected uint8 images (B, H, W, 1 or 3); given {images.dtype} {images.shape}")
    x = names.choose(PROTOCOLS, protocol, "protocol")(images.astype(jnp.float32))
    return jnp.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x


def _tf(x: Array) -> Array:
    """TensorFlow 1's bilinear: pixel i lies at i, not at i + 1/2; the network's training normalisation."""
    return (_bilinear(x, lambda places, ratio: places * ratio) - 128.0) / 128.0


def _pytorch_fid(x: Array) -> Array:
    return (_bilinear(x, lambda places, ratio: (places + np.float32(0.5)) * ratio - np.float32(0.5)) - 127.5) / 127.5


def _clean(x: Array) -> Array:
    """Bicubic with antialiasing as PIL does it on float images, clipped (Parmar et al. 2022)."""
    shape = (x.shape[0], SIDE, SIDE, x.shape[-1])
    if x.shape != shape:
        x = jax.image.resize(x, shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
    return (jnp.clip(x, 0.0, 255.0) - 128.0) / 128.0


PROTOCOLS: dict[str, Callable[[Array], Array]] = {"tf": _tf, "pytorch-fid": _pytorch_fid, "clean": _clean}


def _bilinear(x: Array, place: Callable[[np.ndarray, np.float32], np.ndarray]) -> Array:
    """x (B, H, W, C) interpolated without antialiasing at `place(0..298, side / 299)` along both sides."""
    low_y, high_y, part_y = _grid(x.shape[1], place)
    low_x, high_x, part_x = _grid(x.shape[2], place)
    top, bottom = x[:, low_y], x[:, high_y]
    part = part_x[:, None]
    top = top[:, :, low_x] + (top[:, :, high_x] - top[:, :, low_x]) * part
    bottom = bottom[:, :, low_x] + (bottom[:, :, high_x] - bottom[:, :, low_x]) * part
    return top + (bottom - top) * part_y[:, None, None]


def _grid(
    side: int, place: Callable[[np.ndarray, np.float32], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower pixel, upper pixel, weight of the upper one), each (299,); float32 as the references compute it."""
    places = np.maximum(place(np.arange(SIDE, dtype=np.float32), np.float32(side / SIDE)), np.float32(0.0))
    low = np.minimum(places.astype(np.int32), side - 1)
    return low, np.minimum(low + 1, side - 1), (places - low).astype(np.float32)
