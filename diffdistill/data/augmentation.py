"""Non-leaking augmentation (Karras et al. 2022, appendix F.2; the geometry follows Karras et al. 2020, ADA).

A network that is told how its training image was changed, and is told "not at all" when it samples, learns from the
changed images without ever drawing them. Pure functions of a key: draw -> parameters, parameters -> label and maps,
images and maps -> images. All shapes are static, so that `augment` can stand in a compiled, sharded step.

| label | operation | parameter | drawn |
|---|---|---|---|
| 0: w | mirror, x -> -x | w = 0 or 1, even odds | always |
| 1: w | upside down, y -> -y | w = 0 or 1, even odds | at times |
| 2: w | scale by 2^(0.2 w) | w ~ N(0, 1) | at times |
| 3, 4: cos w - 1, sin w | rotation by w | w ~ U(-pi, pi) | at times |
| 5, 6: w cos r, w sin r | 2^(0.2 w) along r, the inverse across | w ~ N(0, 1); r ~ U(-pi, pi) or 0 | at times |
| 7, 8: w_x, w_y | shift by 0.125 (w_x W, w_y H) pixels | w_x, w_y ~ N(0, 1) | at times |

"At times" is with the probability asked for, each operation of each image on its own; otherwise parameter and label are
zero. r is 0 with even odds. The operations act in the order of the table. x points right and y down, in pixels, from
the centre of the image: a positive scale enlarges the content, a positive rotation turns it counter-clockwise as seen,
the axis r points to (cos r, sin r).
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import NDArray

LABELS = 9
SCALE = 0.2  # binary logarithm of the factor of both scalings, per standard deviation
TRANSLATION = 0.125  # of the side, per standard deviation

# Daubechies' least asymmetric wavelet of six vanishing moments: the low-pass filter of its analysis side.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263748278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
# By how many samples the filter delays what varies slowly. It is not symmetric: the middle of its taps is at 5.5.
_DELAY = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)
_HIGHEST = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class Parameters:
    """What is done to each image of a batch; zero (False) everywhere is nothing. The table is at the top of this file.

    Attributes:
      x_flip, y_flip: (B,) bool.
      scale: (B,) float32, w of the scaling.
      rotation: (B,) float32, angle in -pi..pi.
      anisotropy, axis: (B,) float32, w and the angle r.
      translation: (B, 2) float32, w_x and w_y.
    """

    x_flip: jax.Array
    y_flip: jax.Array
    scale: jax.Array
    rotation: jax.Array
    anisotropy: jax.Array
    axis: jax.Array
    translation: jax.Array


def augment(key: jax.Array, images: jax.Array, probability: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Changes each image of a batch at random, and says how.

    With probability 0 images are still mirrored; for images and labels without any change, do not call it.

    Args:
      key: one typed PRNG key for the whole batch; the draws depend on it and on the batch size alone.
      images: (B, H, W, C) float32 in [-1, 1].
      probability: of each operation but the mirror, 0..1; .12 at 32x32 and .15 at 64x64 in the paper.

    Returns:
      images (B, H, W, C) float32, which may overshoot [-1, 1] a little beside sharp edges and are equal to what came
      in, bit for bit, where nothing was drawn; labels (B, LABELS) float32.

    Raises:
      ValueError: images of another rank or type, or a probability outside 0..1.
    """
    if images.ndim != 4 or images.dtype != jnp.float32:
        raise ValueError(f"images of shape {images.shape}, {images.dtype}: augment takes (B, H, W, C) float32")
    if not isinstance(probability, Tracer) and not 0 <= probability <= 1:
        raise ValueError(f"augmentation probability {probability}: give a number from 0 to 1")
    batch, height, width, _ = images.shape
    parameters = draw(key, batch, probability)
    images = warp(flip(images, parameters), inverse_maps(parameters, height, width))
    return images, labels(parameters)


def draw(key: jax.Array, batch_size: int, probability: float | jax.Array) -> Parameters:
    """Returns random Parameters of `batch_size` images, by the table at the top of this file."""
    flip_key, normal_key, angle_key, axis_key, use_key = jax.random.split(key, 5)
    x_flip, y_flip = jax.random.bernoulli(flip_key, 0.5, (2, batch_size))
    scale, anisotropy, w_x, w_y = jax.random.normal(normal_key, (4, batch_size), jnp.float32)
    rotation, axis = jax.random.uniform(angle_key, (2, batch_size), jnp.float32, -math.pi, math.pi)
    tilted = jax.random.bernoulli(axis_key, 0.5, (batch_size,))
    flips, scales, turns, stretches, moves = jax.random.bernoulli(use_key, probability, (5, batch_size))
    return Parameters(
        x_flip=x_flip,
        y_flip=y_flip & flips,
        scale=jnp.where(scales, scale, 0.0),
        rotation=jnp.where(turns, rotation, 0.0),
        anisotropy=jnp.where(stretches, anisotropy, 0.0),
        axis=jnp.where(stretches & tilted, axis, 0.0),
        translation=jnp.where(moves[:, None], jnp.stack([w_x, w_y], axis=1), 0.0),
    )


def labels(parameters: Parameters) -> jax.Array:
    """Returns what the network is told of `parameters`: (B, LABELS) float32, zeros for an image as it is."""
    return jnp.stack(
        [
            parameters.x_flip.astype(jnp.float32),
            parameters.y_flip.astype(jnp.float32),
            parameters.scale,
            jnp.cos(parameters.rotation) - 1.0,
            jnp.sin(parameters.rotation),
            parameters.anisotropy * jnp.cos(parameters.axis),
            parameters.anisotropy * jnp.sin(parameters.axis),
            parameters.translation[:, 0],
            parameters.translation[:, 1],
        ],
        axis=1,
    )


def inverse_maps(parameters: Parameters, height: int, width: int) -> jax.Array:
    """Returns for each image the (2, 3) float32 affine map from a point (x, y, 1) of the result to its origin (x, y).

    x right and y down in pixels from the centre, which lies between pixels where a side is even; pixels are square, so
    that rotations are rotations in images of any shape. With scaling S, rotation R, stretch A and translation T in
    turn, the map is S^-1 R^-1 A^-1 T^-1: (B, 2, 3).
    """
    cos, sin = jnp.cos(parameters.rotation), jnp.sin(parameters.rotation)
    unrotate = _matrices(cos, -sin, sin, cos) * jnp.exp2(-SCALE * parameters.scale)[:, None, None]
    factor = jnp.exp2(SCALE * parameters.anisotropy)
    mean, half_gap = (factor + 1.0 / factor) / 2.0, (factor - 1.0 / factor) / 2.0
    along, aslant = half_gap * jnp.cos(2.0 * parameters.axis), half_gap * jnp.sin(2.0 * parameters.axis)
    # The axis lies at -r, r counted from x towards y: with the labels of the published networks it is that one.
    unstretch = _matrices(mean - along, aslant, aslant, mean + along)
    linear = jnp.einsum("bij,bjk->bik", unrotate, unstretch, precision=_HIGHEST)
    pixels = parameters.translation * TRANSLATION * jnp.array([width, height], jnp.float32)
    return jnp.concatenate([linear, -jnp.einsum("bij,bj->bi", linear, pixels, precision=_HIGHEST)[..., None]], axis=2)


def flip(images: jax.Array, parameters: Parameters) -> jax.Array:
    """Returns the images (B, H, W, C) with their pixels in reverse order along x, y or both where asked for."""
    images = jnp.where(parameters.x_flip[:, None, None, None], images[:, :, ::-1], images)
    return jnp.where(parameters.y_flip[:, None, None, None], images[:, ::-1], images)


def warp(images: jax.Array, maps: jax.Array) -> jax.Array:
    """Returns the images that show at each point what `images` show where `maps` sends it.

    An image counts as continued without end by reflection at its border pixels (which are not doubled). It is
    oversampled twofold with the sym6 filter, sampled there by bilinear interpolation and brought back with the same
    filter, reversed. Shifts by whole and half pixels are exact but for rounding, because the filter is orthonormal.

    Args:
      images: (B, H, W, C) float32.
      maps: (B, 2, 3) float32, as of `inverse_maps`; an image whose map is the identity is returned bit for bit.
    """
    _, height, width, _ = images.shape
    # Both filters are matrices: depthwise convolutions took 20 to 90 times as long on a CPU (sides 64 and 32).
    fine = jnp.einsum("nh,mw,bhwc->bnmc", _upsampling(height), _upsampling(width), images, precision=_HIGHEST)
    y, x = _fine_positions(height)[:, None], _fine_positions(width)[None, :]
    origin = maps[..., None, None]
    columns = _fine_index(origin[:, 0, 0] * x + origin[:, 0, 1] * y + origin[:, 0, 2], width)
    rows = _fine_index(origin[:, 1, 0] * x + origin[:, 1, 1] * y + origin[:, 1, 2], height)
    fine = jax.vmap(_bilinear)(fine, rows, columns)
    warped = jnp.einsum("hn,wm,bnmc->bhwc", _downsampling(height), _downsampling(width), fine, precision=_HIGHEST)
    unchanged = jnp.all(maps == jnp.eye(2, 3, dtype=maps.dtype), axis=(1, 2))
    return jnp.where(unchanged[:, None, None, None], images, warped)


def _matrices(xx: jax.Array, xy: jax.Array, yx: jax.Array, yy: jax.Array) -> jax.Array:
    return jnp.stack([jnp.stack([xx, xy], axis=1), jnp.stack([yx, yy], axis=1)], axis=1)


def _bilinear(fine: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The values (n, m, C) of a periodic image (N, M, C) at fractional indices (n, m)."""
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, across = (rows - top)[..., None], (columns - left)[..., None]
    top, left = top.astype(jnp.int32) % fine.shape[0], left.astype(jnp.int32) % fine.shape[1]
    bottom, right = (top + 1) % fine.shape[0], (left + 1) % fine.shape[1]
    above = fine[top, left] * (1.0 - across) + fine[top, right] * across
    below = fine[bottom, left] * (1.0 - across) + fine[bottom, right] * across
    return above * (1.0 - down) + below * down


def _fine_positions(side: int) -> NDArray[np.float32]:
    """Where the fine samples lie that `_downsampling` reads, in pixels from the centre of the side."""
    samples = np.arange(2 * side + len(SYM6) - 2)
    return ((samples - _DELAY) / 2 - (side - 1) / 2).astype(np.float32)


def _fine_index(position: jax.Array, side: int) -> jax.Array:
    """Which row of `_upsampling`, as a fraction and modulo their number, lies at a position from the centre."""
    return 2.0 * position + (side - 1 + _DELAY)


@functools.cache
def _upsampling(side: int) -> NDArray[np.float32]:
    """Sets zeros between the pixels and filters: one period of the side reflected without end, (4 (side - 1), side).

    A whole period is the margin for the worst case: no map reaches beyond it.
    """
    period = max(2 * (side - 1), 1)
    sample, tap = np.arange(2 * period)[:, None], np.arange(len(SYM6))
    pixel = (sample - tap) // 2 % period
    matrix = np.zeros((2 * period, side))
    weights = np.where((sample - tap) % 2 == 0, math.sqrt(2) * np.array(SYM6), 0.0)
    np.add.at(matrix, (sample, np.minimum(pixel, period - pixel)), weights)
    return matrix.astype(np.float32)


@functools.cache
def _downsampling(side: int) -> NDArray[np.float32]:
    """Filters, reversed, and keeps every second sample: (side, 2 side + 10)."""
    matrix = np.zeros((side, 2 * side + len(SYM6) - 2), np.float32)
    for pixel in range(side):
        matrix[pixel, 2 * pixel : 2 * pixel + len(SYM6)] = np.array(SYM6) / math.sqrt(2)
    return matrix
