"""Grids, PNG files and sample archives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffdistill.evaluation.files import write_atomically

TILE = 40  # the least side of a tile in pixels: an 8x8 digit is shown at 40x40, a 28x28 one at 56x56
BACKGROUND = 255


def enlargement(height: int, width: int, at_least: int = TILE) -> int:
    """The whole factor that brings the shorter side of an image to `at_least` pixels or more."""
    return max(1, -(-at_least // min(height, width)))


def grid(
    images: np.ndarray,
    rows: int,
    columns: int,
    gap: int | None = None,
    scale: int | None = None,
    row_labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Tiles images (N, H, W, C) uint8, row by row, into one picture, uint8 (height, width, C).

    Between tiles and around them lie `gap` white pixels (a tenth of a tile, unless given). Images are enlarged by
    the whole factor `scale` with hard edges, by default until they are at least `TILE` pixels. Places without an
    image stay white. `row_labels` (one per row) are written in a margin on the left.
    Raises ValueError when the images do not fit.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        raise ValueError(f"a grid needs uint8 images (N, H, W, 1 or 3); given {images.dtype} {images.shape}")
    count, height, width, channels = images.shape
    if rows < 1 or columns < 1 or count > rows * columns:
        raise ValueError(f"{count} images do not fit into a grid of {rows} rows and {columns} columns")
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"expected {rows} row labels, one per row; given {len(row_labels)}")
    scale = enlargement(height, width) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale is a whole factor of at least 1; given {scale}")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    gap = max(2, min(height, width) // 10) if gap is None else gap

    picture = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), BACKGROUND, np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    if row_labels is None:
        return picture
    return np.concatenate([_margin(row_labels, picture.shape, height, gap), picture], axis=1)


def _margin(labels: Sequence[str], shape: tuple[int, ...], height: int, gap: int) -> np.ndarray:
    """A white strip with every label right-aligned at the middle of its row."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=max(11, min(16, height // 3)))
    margin = gap + max(2, gap)
    width = max(int(font.getlength(label)) for label in labels) + 2 * margin
    strip = Image.new("L", (width, shape[0]), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for row, label in enumerate(labels):
        middle = gap + row * (height + gap) + height / 2
        draw.text((width - margin, middle), label, fill=60, font=font, anchor="rm")
    return np.repeat(np.asarray(strip)[:, :, None], shape[2], axis=2)


def save_png(path: str | os.PathLike[str], picture: np.ndarray) -> Path:
    """Writes one picture (H, W, 1 or 3) uint8 as PNG, whole or not at all."""
    from PIL import Image

    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.dtype != np.uint8 or picture.shape[2] not in (1, 3):
        raise ValueError(f"expected a uint8 picture (H, W, 1 or 3); given {picture.dtype} {picture.shape}")
    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    return write_atomically(path, lambda file: image.save(file, format="PNG", optimize=True))


def save_npz(
    path: str | os.PathLike[str],
    images: np.ndarray,
    labels: np.ndarray | None = None,
    seeds: np.ndarray | None = None,
    **more: np.ndarray,
) -> Path:
    """Writes images (N, H, W, C) uint8 or float32 with labels (N,), seeds (N,) and more, whole or not at all."""
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise ValueError(f"expected uint8 or float32 images (N, H, W, C); given {images.dtype} {images.shape}")
    arrays: dict[str, Any] = {"images": images}
    for name, value in (("labels", labels), ("seeds", seeds)):
        if value is not None:
            arrays[name] = np.asarray(value)
            if arrays[name].shape[:1] != images.shape[:1]:
                raise ValueError(f"expected {len(images)} {name}, one per image; given {arrays[name].shape}")
    arrays |= {name: np.asarray(value) for name, value in more.items()}
    return write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
