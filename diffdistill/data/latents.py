"""Latents: what an encoder made of images, stored as floating-point arrays, for teachers that work in its space.

An .npz file with `latents` (N, H, W, C) float16 or float32 and, for conditional models, `labels` (N,) whole numbers;
optionally `class_names`. Layouts of other tools with the channels first, (N, C, H, W), have to be transposed. What the
network sees is (latents - shift) * scale, such that it varies about as much as images in [-1, 1] do; Stable Diffusion 1
publishes scale 0.18215 for its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffdistill.data.contract import DataError, Source, array_source, reading
from diffdistill.data.paths import existing
from diffdistill.data.zips import check_entries, open_zip

MEMBER = "latents"
_MOST_CLASSES = 100_000


def holds_latents(path: Path) -> bool:
    """Whether a path is an .npz file with an array of latents."""
    try:
        with open_zip(path, path) as archive:
            return f"{MEMBER}.npy" in archive.namelist()
    except DataError:
        return False


def open_latents(path: str | Path, split: str, image_size: int | None, channels: int | None) -> Source:
    """Returns the latents of an .npz file as float32, as stored: see `scaled`.

    Args:
      path: the file; see the top of this file.
      split: the file is one set; ignored.
      image_size, channels: must be None: latents are not resized.

    Raises:
      DataError: no such file or array, wrong shapes or types, numbers that are not finite.
    """
    del split
    path = existing(path)
    if image_size or channels:
        raise DataError("latents cannot be resized or converted; set config.data.image_size and channels to 0")
    if not holds_latents(path):
        raise DataError(f"{path} is no .npz file with an array named {MEMBER!r} (N, H, W, C); make one with np.savez")
    check_entries(path, path)
    with reading(path), np.load(path, allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name]) for name in file.files if name in (MEMBER, "labels", "class_names")}
    latents = arrays[MEMBER]
    if latents.ndim != 4 or latents.dtype not in (np.float16, np.float32):
        raise DataError(
            f"{path}: latents must be (N, H, W, C) float16 or float32, found {latents.shape} {latents.dtype}"
        )
    finite = np.isfinite(latents).all(axis=(1, 2, 3))
    if not finite.all():
        raise DataError(f"{path}: latent {int(np.argmin(finite))} is not finite; encode that image again")
    labels = arrays.get("labels", np.zeros(len(latents), np.int64))
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be whole numbers, found {labels.dtype}")
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US" or len(names) > _MOST_CLASSES):
        raise DataError(
            f"{path}: class_names must be a list of at most {_MOST_CLASSES} names, found {names.dtype} {names.shape}"
        )
    if names is None and labels.max(initial=0) >= _MOST_CLASSES:
        raise DataError(f"{path}: label {labels.max()} would make as many classes; give class_names, or smaller labels")
    if names is None:
        names = range(int(labels.max(initial=0)) + 1) if "labels" in arrays else ("all",)
    return array_source(path.stem, latents.astype(np.float32), labels, tuple(map(str, names)))


def scaled(source: Source, shift: Sequence[float], scale: float) -> Source:
    """The latents of a source as the network sees them, (latents - shift) * scale; see `scaling`."""
    offset, factor = scaling(shift, scale, source.image_shape[-1])

    def of(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return (latents - offset) * factor

    def read(index: int) -> tuple[NDArray[np.float32], int]:
        latent, label = source.read(index)
        return of(latent), label

    read_many = source.read_many
    many = None if read_many is None else (lambda indices: (of((found := read_many(indices))[0]), found[1]))
    images = None if source.images is None else of(source.images)
    return replace(source, read=read, images=images, read_many=many)


def scaling(shift: Sequence[float], scale: float, channels: int) -> tuple[NDArray[np.float32], np.float32]:
    """(shift (channels,), scale) as arrays; an empty shift is 0, one number holds for all channels.

    Raises DataError for another number of entries.
    """
    if len(shift) not in (0, 1, channels):
        raise DataError(
            f"config.data.latent_shift has {len(shift)} entries; give none, one or one for each of the {channels} "
            "channels"
        )
    return np.broadcast_to(np.asarray(shift or 0.0, np.float32), (channels,)), np.float32(scale)
