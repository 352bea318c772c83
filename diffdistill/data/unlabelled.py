"""Images made elsewhere, as one set without classes: what an evaluation measures, or compares with.

* A folder, zip or tar: every picture in it, wherever it lies (flat, in class folders, in numbered folders as EDM writes
  them), in sorted order of the whole names. Hidden files and files that are not pictures are ignored.
* An .npz file with `images` (ours) or `arr_0` (ADM's), or an .npy file: (N, H, W, 1 or 3) uint8. Rows are read as they
  are asked for, so that tens of gigabytes pass through little memory. Reading in rising order is fast; a step back in a
  compressed file starts again at its beginning.

Labels are not looked at. As everywhere, images without classes form one class called "all".
"""

import functools
import hashlib
import math
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import NDArray

from diffdistill.data.containers import Container, open_container
from diffdistill.data.contract import DataError, Source, reading
from diffdistill.data.images import is_picture
from diffdistill.data.paths import existing
from diffdistill.data.pixels import MOST_PIXELS, SUFFIXES, encoded_source, fit, listing_digest
from diffdistill.data.zips import check_entry, open_zip

_CLASSES = ("all",)
_MEMBERS = ("images", "arr_0")
_LOOKED_INTO = 100  # pictures whose content the fingerprint of a large set covers
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def open_unlabelled(path: str | Path, image_size: int | None = None, channels: int | None = None) -> Source:
    """Returns the images of a folder, zip, tar, .npz or .npy file; see the top of this file.

    Args:
      path: what to open; the kind is told from the content, not from the name.
      image_size: pixels per side; None or 0 keeps the stored size, which all images must then share.
      channels: 1 (grey) or 3 (RGB); None or 0 keeps what is stored, which all images must then share.

    Raises:
      DataError: nothing there, fewer than two images, images that are not alike or not bytes, a damaged file.
    """
    path = existing(path)
    image_size, channels = image_size or None, channels or None
    if path.is_dir():
        return _pictures(open_container(path), image_size, channels)
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if start == np.lib.format.MAGIC_PREFIX:
        return _array(
            path, lambda: path.open("rb"), path.stat().st_size, lambda: _file_digest(path), image_size, channels
        )
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is a truncated zip file (an .npz file is one too); fetch or make it again")
        container = open_container(path)
        if any(name.endswith(".npy") for name in container.sizes) and not any(map(is_picture, container.sizes)):
            return _member(path, image_size, channels)
        return _pictures(container, image_size, channels)
    return _pictures(open_container(path), image_size, channels)


def _pictures(container: Container, image_size: int | None, channels: int | None) -> Source:
    files = [name for name in container.sizes if is_picture(name)]
    if len(files) < 2:
        found = ", ".join(list(container.sizes)[:3]) or "nothing at all"
        raise DataError(
            f"{container.path} holds fewer than 2 pictures ({', '.join(SUFFIXES)}), too few for statistics; found "
            f"{found}. Give a folder, zip or tar of pictures, or an .npz or .npy file of uint8 images"
        )

    def fetch(index: int) -> tuple[BinaryIO, int]:
        return container.open(files[index]), 0

    @functools.cache
    def digest() -> str:
        # Names and sizes alone are equal for any two sets of BMP files; some content tells samples of two models apart.
        content = hashlib.sha256(listing_digest({name: container.sizes[name] for name in files}).encode())
        for index in np.linspace(0, len(files) - 1, min(len(files), _LOOKED_INTO)).astype(int):
            with container.open(files[index]) as file:
                content.update(file.read())
        return content.hexdigest()

    return encoded_source(
        name=container.name,
        class_names=_CLASSES,
        length=len(files),
        fetch=fetch,
        title=lambda index: str(container.path / files[index]),
        digest=digest,
        image_size=image_size,
        channels=channels,
    )


def _member(path: Path, image_size: int | None, channels: int | None) -> Source:
    """The images of an .npz file."""
    archive = open_zip(path, path)
    members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
    name = next((name for name in _MEMBERS if name in members), None)
    if name is None:
        advice = "; give these statistics to --reference" if "mu" in members else ""
        raise DataError(
            f"{path} holds {', '.join(list(members)[:6])}, but no images: an array named {' or '.join(_MEMBERS)} is "
            f"expected{advice}"
        )
    entry = members[name]
    check_entry(archive, entry, f"{path}: {entry.filename}")

    def digest() -> str:  # checksums of the whole content, without reading it
        return hashlib.sha256(f"{entry.CRC} {entry.file_size}".encode()).hexdigest()

    return _array(path, lambda: archive.open(entry), entry.file_size, digest, image_size, channels)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _array(
    path: Path,
    open_file: Callable[[], IO[bytes]],
    num_bytes: int,
    digest: Callable[[], str],
    image_size: int | None,
    channels: int | None,
) -> Source:
    """The images of an array in NumPy's format; the file stays open as long as the process."""
    with reading(path):
        file = open_file()
        version = np.lib.format.read_magic(file)
        shape, is_fortran, dtype = _HEADERS[version](file)
        begin = file.tell()
    _check_array(path, shape, dtype, is_fortran)
    row_shape = shape[1:]
    row_bytes = math.prod(row_shape)
    if num_bytes - begin != shape[0] * row_bytes:
        raise DataError(
            f"{path} is truncated: {shape[0]} images {row_shape} take {shape[0] * row_bytes} bytes, found "
            f"{num_bytes - begin}; fetch or make it again"
        )
    height, width, stored = row_shape
    target = (image_size or height, image_size or width, channels or stored)
    lock = threading.Lock()

    def run(first: int, stop: int) -> NDArray[np.uint8]:
        """Rows first, ..., stop - 1."""
        size = (stop - first) * row_bytes
        try:
            file.seek(begin + first * row_bytes)
            content = file.read(size)
        except Exception as error:  # a damaged zip raises nearly anything
            raise DataError(f"{path} is damaged near image {first} ({error}); fetch or make it again") from error
        if len(content) != size:
            raise DataError(f"{path} ends inside image {first + len(content) // row_bytes}; fetch or make it again")
        return np.frombuffer(content, np.uint8).reshape(-1, *row_shape)

    def read_many(indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        rows, places = np.unique(indices, return_inverse=True)
        images = np.empty((len(rows), *row_shape), np.uint8)
        with lock:
            for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) > 1) + 1):
                images[part] = run(int(rows[part[0]]), int(rows[part[-1]]) + 1)
        if target != row_shape:
            images = np.stack([fit(image, image_size, channels) for image in images])
        return images[places], np.zeros(len(indices), np.int32)

    def read(index: int) -> tuple[NDArray[np.uint8], int]:
        return read_many(np.array([index], np.int64))[0][0], 0

    name = path.absolute().name
    return Source(name, target, _CLASSES, shape[0], read, functools.cache(digest), read_many=read_many)


def _check_array(path: Path, shape: tuple[int, ...], dtype: np.dtype, is_fortran: bool) -> None:
    if dtype != np.uint8:
        raise DataError(
            f"{path} holds {dtype} numbers {shape}; images are expected as bytes, 0 (black) to 255, in an array "
            "(N, H, W, C) uint8. Quantise them where they were made"
        )
    if len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
        moved = len(shape) == 4 and shape[1] in (1, 3)
        advice = "Move the channels to the end" if moved else "Save them in this shape"
        raise DataError(f"{path} holds an array {shape}; images are expected as (N, H, W, 1 or 3). {advice}")
    if shape[1] * shape[2] > MOST_PIXELS:
        raise DataError(f"{path} holds images of {shape[2]}x{shape[1]} pixels; at most {MOST_PIXELS} are read")
    if is_fortran:
        raise DataError(f"{path} is stored column by column; save np.ascontiguousarray of its images")
    if shape[0] < 2:
        raise DataError(f"{path} holds {shape[0]} image; statistics need at least 2")
