"""Image files and arrays -> uint8 (H, W, C) of one shape. One rule for every source that holds pictures.

* Size: without `image_size`, images stay as stored and must all have one size. With it, the largest centred square is
  cut out and resized with Pillow's Lanczos filter, which averages over the whole footprint of an output pixel when it
  shrinks an image (the ADM-type preparation of ImageNet and LSUN: centre crop, antialiased).
* Channels: 1 is grey (luma of ITU-R 601), 3 is RGB, None keeps what is stored and asks that all images agree.
* Palettes become RGB. Transparent pixels are composited on white. CMYK and the like become RGB. 16-bit and
  floating-point images are refused. Orientation tags of cameras are ignored.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diffdistill.data.contract import DataError, Source
from diffdistill.data.parallel import for_each

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MOST_PIXELS = 2**27  # of one picture

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")  # Pillow has others, one of which starts Ghostscript

_GREY = ("1", "L", "LA", "La")
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_COLOUR = ("P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def _opened(file: BinaryIO, title: str) -> Image.Image:
    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{title} is no image ({', '.join(_FORMATS)}), or its beginning is damaged; replace or remove the file"
        ) from error
    except Exception as error:  # decoders raise a dozen types on damaged files
        raise DataError(f"{title} is not a readable image ({error}); replace or remove the file") from error
    if image.mode not in (*_GREY, *_ALPHA, *_COLOUR):
        raise DataError(
            f"{title} has pixels of type {image.mode!r}; only 8-bit grey, palette and colour images are read. "
            "Convert it to 8 bits per channel"
        )
    if image.width * image.height > MOST_PIXELS:
        raise DataError(
            f"{title} has {image.width}x{image.height} pixels; at most {MOST_PIXELS} are read. Make it smaller, or "
            "remove the file"
        )
    return image


# Blocks over 32 MiB go back to the system at once; of 16 MiB, the default, they stay with the thread that freed them.
Image.core.set_block_size(2**26)

_AT_ONCE = 2**30  # bytes of pictures that are decoded at the same time; a larger one is decoded alone
_changed = threading.Condition()
_bytes = 0  # of those that are being decoded


@contextmanager
def _room(size: int) -> Iterator[None]:
    """Waits until so many more bytes may be taken."""
    global _bytes
    with _changed:
        _changed.wait_for(lambda: not _bytes or _bytes + size <= _AT_ONCE)
        _bytes += size
    try:
        yield
    finally:
        with _changed:
            _bytes -= size
            _changed.notify_all()


def look(file: BinaryIO, title: str) -> tuple[int, int, int]:
    """Returns (height, width, channels) of an image file from its header. Raises DataError that names `title`."""
    image = _opened(file, title)
    return image.height, image.width, 1 if image.mode in _GREY else 3


def decode(file: BinaryIO, title: str, image_size: int | None, channels: int | None) -> NDArray[np.uint8]:
    """Returns the image (H, W, C) uint8, by the rules at the top of this file.

    Raises:
      DataError: not an image, truncated, too large or of an unsupported type; the message names `title`.
    """
    image = _opened(file, title)
    grey = image.mode in _GREY
    wanted = "L" if (channels or (1 if grey else 3)) == 1 else "RGB"
    see_through = image.mode in _ALPHA or "transparency" in image.info
    with _room(image.width * image.height * (12 if see_through else 8)):
        try:
            image.load()
            if see_through or "transparency" in image.info:  # a PNG may say so after its pixels
                if image.mode != "RGBA":
                    image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
                image = image.convert("RGB")
            elif image.mode not in (*_GREY, "RGB"):
                image = image.convert("RGB")
        except Exception as error:
            raise DataError(f"{title} is damaged or truncated ({error}); replace or remove the file") from error
        return _fitted(image if image.mode == wanted else image.convert(wanted), image_size)


def fit(image: NDArray[np.uint8], image_size: int | None, channels: int | None) -> NDArray[np.uint8]:
    """Returns an image (H, W, 1 or 3) uint8 cropped, resized and converted by the rules at the top of this file."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if channels is not None:
        picture = picture.convert("L" if channels == 1 else "RGB")
    return _fitted(picture, image_size)


def _fitted(image: Image.Image, image_size: int | None) -> NDArray[np.uint8]:
    if image_size is not None and image.size != (image_size, image_size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Two steps: the box argument of resize would let the filter look at pixels outside the square.
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def fitted(source: Source, image_size: int | None, channels: int | None) -> Source:
    """Returns the source with every image cropped, resized and converted; the source itself where nothing changes."""
    height, width, stored = source.image_shape
    shape = (image_size or height, image_size or width, channels or stored)
    if shape == source.image_shape:
        return source
    if stored not in (1, 3) or source.dtype != np.uint8:
        raise DataError(
            f"{source.name}: {source.dtype} images of {stored} channels cannot be resized or converted; uint8 of 1 or "
            "3 channels can"
        )

    def read(index: int) -> tuple[NDArray[np.uint8], int]:
        image, label = source.read(index)
        return fit(image, image_size, channels), label

    return replace(source, image_shape=shape, read=read, images=None, labels=None, read_many=None)


def encoded_source(
    *,
    name: str,
    class_names: tuple[str, ...],
    length: int,
    fetch: Callable[[int], tuple[BinaryIO, int]],
    title: Callable[[int], str],
    digest: Callable[[], str],
    image_size: int | None,
    channels: int | None,
) -> Source:
    """Returns a source over encoded images (PNG, JPEG, ...).

    Unless both `image_size` and `channels` are given, the header of every image is read once, here, to make sure that
    all are alike.

    Args:
      name, class_names, length, digest: as in `Source`.
      fetch: number -> (open file, label).
      title: number -> what to call the image in messages.
      image_size, channels: see the top of this file.

    Raises:
      DataError: images of several sizes, or grey and colour mixed; the message names two of them and what to do.
    """
    if image_size is not None and channels is not None:
        shape = (image_size, image_size, channels)
    else:
        looks = np.zeros((length, 3), np.int64)

        def note(index: int) -> None:
            file, _ = fetch(index)
            with file:
                looks[index] = look(file, title(index))

        for_each(note, length, f"looking at {name}")
        if image_size is None:
            _demand_alike(looks[:, :2], title, lambda hw: f"{hw[1]}x{hw[0]} (width x height)", "image_size=<pixels>")
        if channels is None:
            _demand_alike(looks[:, 2:], title, lambda c: "grey" if c[0] == 1 else "colour", "channels=3 (or 1)")
        height, width, stored = (int(number) for number in looks[0])
        shape = (image_size or height, image_size or width, channels or stored)

    def read(index: int) -> tuple[NDArray[np.uint8], int]:
        file, label = fetch(index)
        with file:
            image = decode(file, title(index), image_size, channels)
        if image.shape != shape:
            raise DataError(
                f"{title(index)} has become {image.shape}, was {shape} at the start; do not change the data"
            )
        return image, label

    return Source(name, shape, class_names, length, read, digest)


def _demand_alike(
    looks: NDArray[np.int64], title: Callable[[int], str], words: Callable[[NDArray[np.int64]], str], setting: str
) -> None:
    others = np.flatnonzero((looks != looks[0]).any(axis=1))
    if len(others):
        other = int(others[0])
        raise DataError(
            f"images are not alike: {title(0)} is {words(looks[0])}, {title(other)} is {words(looks[other])} "
            f"({len(others)} of {len(looks)} differ from the first). Set config.data.{setting} to make them alike"
        )


def listing_digest(sizes: dict[str, int]) -> str:
    """Returns the sha256 (hex) of file names and sizes."""
    content = hashlib.sha256()
    for name, size in sorted(sizes.items()):
        content.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return content.hexdigest()
