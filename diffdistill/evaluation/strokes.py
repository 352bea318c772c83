"""Slant and thickness of bright strokes on a dark ground, such as digits: what should survive a change of class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def slant(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 1) uint8 -> (N,) float64: how far right a stroke moves for each pixel down, by second moments.

    0 for an image without ink.
    """
    ink = images[..., 0].astype(np.float64)
    _, height, width = ink.shape
    y, x = np.mgrid[:height, :width]
    total = np.maximum(ink.sum((1, 2)), 1e-12)
    dx = x - ((ink * x).sum((1, 2)) / total)[:, None, None]
    dy = y - ((ink * y).sum((1, 2)) / total)[:, None, None]
    return (ink * dx * dy).sum((1, 2)) / np.maximum((ink * dy * dy).sum((1, 2)), 1e-12)


def thickness(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 1) uint8 -> (N,) float64: the mean brightness, 0 to 1, to which thick strokes add more."""
    return images.astype(np.float64).mean((1, 2, 3)) / 255.0


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"slant": slant, "thickness": thickness}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two arrays (N,); 0 where either is constant."""
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale > 0 else 0.0
