"""The front door of the data room: one function that opens any kind of source by name.

| source       | path                                                         | file       |
|--------------|--------------------------------------------------------------|------------|
| digits       | none: embedded                                               | digits.py  |
| idx          | folder of IDX files (MNIST, Fashion-MNIST, ...)              | idx.py     |
| images       | folder, zip or tar of pictures, one folder per class         | images.py  |
| tfds         | name or folder of a prepared TensorFlow dataset              | tfds.py    |
| array_record | folder written by --mode=prepare                             | records.py |
| latents      | .npz file of float arrays                                    | latents.py |

A new kind of data is one function (path, split, image_size, channels) -> Source and one line in SOURCES.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from diffdistill.data.contract import DataError, Source
from diffdistill.data.digits import digits
from diffdistill.data.idx import open_idx
from diffdistill.data.images import open_images
from diffdistill.data.latents import open_latents
from diffdistill.data.pixels import fitted
from diffdistill.data.records import open_records
from diffdistill.data.tfds import open_tfds

SOURCES: dict[str, Callable[[str, str, int | None, int | None], Source]] = {
    "digits": lambda path, split, image_size, channels: _digits(path, image_size, channels),
    "idx": open_idx,
    "images": open_images,
    "tfds": open_tfds,
    "array_record": open_records,
    "latents": open_latents,
}


def open_source(
    *,
    source: str = "digits",
    path: str | Path | None = None,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
) -> Source:
    """Returns a source of images by the name of its kind.

    Args:
      source: a name of the table at the top of this file.
      path: where the data lies, by kind; None or "" only for the digits.
      split: "train", "test", ...; the digits are one set and ignore it.
      image_size: pixels per side; None or 0 keeps the stored size, which all images must then share.
      channels: 1 (grey) or 3 (RGB); None or 0 keeps what is stored, which all images must then share.

    Raises:
      DataError: unknown kind, missing or unusable data; the message says what to do.
    """
    if source not in SOURCES:
        nearest = difflib.get_close_matches(source, SOURCES, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise DataError(f"unknown data source {source!r}, expected one of {', '.join(SOURCES)}{hint}")
    if image_size is not None and image_size < 0:
        raise DataError(f"image size {image_size}; give the pixels per side, or 0 to keep the stored size")
    if channels not in (None, 0, 1, 3):
        raise DataError(f"{channels} channels; give 1 (grey), 3 (RGB) or 0 to keep what is stored")
    path = "" if path is None else str(path)
    if not path and source != "digits":
        raise DataError(f"data source {source!r} needs a path; set config.data.path")
    return SOURCES[source](path, split, image_size or None, channels or None)


def _digits(path: str, image_size: int | None, channels: int | None) -> Source:
    if path:
        raise DataError(f"the digits are part of the package, but path {path!r} was given; set config.data.source too")
    return fitted(digits(), image_size, channels)
