"""Halving and doubling of the resolution: 2x2 mean and nearest neighbour, or a longer symmetric FIR filter."""

import functools
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp


def downsample(x: jax.Array) -> jax.Array:
    """Mean of each 2x2 square: (B, H, W, C) -> (B, H/2, W/2, C)."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour: (B, H, W, C) -> (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def fir_margin(taps: tuple[int, ...]) -> int:
    """How many pixels of each border a filter needs so that halving gives exactly half the size.

    ValueError for taps that are not an even number of symmetric weights.
    """
    if not taps or len(taps) % 2 or taps != taps[::-1] or sum(taps) <= 0:
        raise ValueError(f"resample_filter={taps}: expected an even number of symmetric taps, (1, 1) or (1, 3, 3, 1).")
    return len(taps) // 2 - 1


def fir_downsample(x: jax.Array, taps: tuple[int, ...], *, pad: bool = True) -> jax.Array:
    """Filters with `taps`, normalised, along H and W and keeps every second pixel; zeros beyond the border.

    (B, H, W, C) -> (B, H/2, W/2, C); with pad=False `x` brings its own margin of fir_margin(taps) pixels.
    """
    margin = fir_margin(taps)
    for axis in (1, 2):
        padded = _pad(x, axis, margin) if pad else x
        end = padded.shape[axis] - len(taps) + 1
        # Sums of strided slices: a depthwise convolution is slow to differentiate on most backends.
        x = _sum(
            weight / sum(taps) * jax.lax.slice_in_dim(padded, tap, tap + end, 2, axis)
            for tap, weight in enumerate(taps)
        )
    return x


def fir_upsample(x: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """Sets zeros between the pixels and filters with `taps`, unit gain: (B, H, W, C) -> (B, 2H, 2W, C)."""
    margin, half = fir_margin(taps), len(taps) // 2
    for axis in (1, 2):
        size, padded = x.shape[axis], _pad(x, axis, half)

        def phase(first: int, padded: jax.Array = padded, size: int = size, axis: int = axis) -> jax.Array:
            # Output pixel 2 m + phase sees input m - j through tap `phase + margin + 2 j`, for every j that has one.
            return _sum(
                2 * taps[tap] / sum(taps) * jax.lax.slice_in_dim(padded, half - j, half - j + size, 1, axis)
                for j in range(-half, half + 1)
                if 0 <= (tap := first + margin + 2 * j) < len(taps)
            )

        x = jnp.stack([phase(0), phase(1)], axis=axis + 1).reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x


def resample(x: jax.Array, how: str, taps: tuple[int, ...] = (1, 1)) -> jax.Array:
    """`x` itself, halved or doubled, for how = "none", "down" or "up"; (1, 1) is 2x2 mean and nearest neighbour."""
    if how == "none":
        return x
    if taps == (1, 1):
        return downsample(x) if how == "down" else upsample(x)
    return fir_downsample(x, taps) if how == "down" else fir_upsample(x, taps)


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _pad(x: jax.Array, axis: int, margin: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (margin, margin)
    return jnp.pad(x, widths)
