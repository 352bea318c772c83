"""IDX files, the format of MNIST and its family (Fashion-MNIST, KMNIST, EMNIST), gzipped or not.

Format: two zero bytes, the type (8 = uint8), the number of dimensions, each dimension as a big-endian uint32, the data
(http://yann.lecun.com/exdb/mnist, "FILE FORMATS").
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from diffdistill.data.contract import DataError, Source, array_source, check_expansion
from diffdistill.data.paths import existing
from diffdistill.data.pixels import fitted

_PREFIX = {"train": "train", "test": "t10k"}
_UINT8 = 8


def open_idx(path: str | Path, split: str, image_size: int | None, channels: int | None) -> Source:
    """Returns the images of a folder with e.g. train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz.

    Args:
      path: the folder.
      split: "train", or "test" for the files that begin with t10k (or test).
      image_size, channels: see pixels.py; stored images are (28, 28, 1) in the whole family.

    Raises:
      DataError: files missing, ambiguous, damaged, of another type, or counts that do not agree.
    """
    folder = existing(path)
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give the folder that holds the IDX files")
    if split not in _PREFIX:
        raise DataError(f"IDX files have the splits train and test; {split!r} was asked")
    images_file, labels_file = _find(folder, split, "images"), _find(folder, split, "labels")
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_file} holds {len(images)} images, {labels_file} {len(labels)} labels; both must belong to one set"
        )
    names = tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
    return fitted(
        array_source(f"{folder.resolve().name}:{split}", images[..., None], labels, names), image_size, channels
    )


def _find(folder: Path, split: str, what: str) -> Path:
    begins = {split, _PREFIX[split]}
    found = sorted(
        file
        for file in folder.iterdir()
        if any(f"{begin}-{what}" in file.name for begin in begins) and "ubyte" in file.name and file.is_file()
    )
    stems = {file.name.removesuffix(".gz") for file in found}
    if not found:
        raise DataError(
            f"{folder} holds no {_PREFIX[split]}-{what}-idx{3 if what == 'images' else 1}-ubyte(.gz); found "
            f"{', '.join(sorted(file.name for file in folder.iterdir())[:6]) or 'nothing'}"
        )
    if len(stems) > 1:
        raise DataError(f"{folder} holds several sets ({', '.join(sorted(stems))}); give each its own folder")
    return found[0]  # the plain file sorts before its .gz


def read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """Returns the array of one IDX file of uint8. Raises DataError on another type, rank or length."""
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with cast(IO[bytes], gzip.open(file) if packed else file.open("rb")) as stream:
            return _read_array(file, stream, dimensions, packed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is damaged or truncated ({error}); fetch it again") from error


def _read_array(file: Path, stream: IO[bytes], dimensions: int, packed: bool) -> NDArray[np.uint8]:
    magic, start = bytes((0, 0, _UINT8, dimensions)), stream.read(4 + 4 * dimensions)
    if start[:4] != magic:
        raise DataError(f"{file} begins with {start[:4].hex(' ')}, expected {magic.hex(' ')}: not such an IDX file")
    if len(start) < 4 + 4 * dimensions:
        raise DataError(f"{file} ends inside its header ({len(start)} bytes): truncated; fetch it again")
    shape = struct.unpack_from(f">{dimensions}I", start, 4)
    expected, stored = math.prod(shape), file.stat().st_size
    if packed:
        check_expansion(str(file), stored, expected)
    # Never more than the file can hold, whatever its header says.
    content = stream.read((expected if packed else min(expected, stored)) + 1)
    if len(content) != expected:
        found = f"more than {expected}" if len(content) > expected else str(len(content))
        raise DataError(
            f"{file} holds {found} bytes after its header, which says {expected}; truncated or not this file; fetch it "
            "again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
