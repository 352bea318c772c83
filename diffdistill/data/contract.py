"""What every source of images is: random access to uint8 images, or float32 latents, with labels.

A source is one frozen record, `Source`, made by one function per kind of data (digits, idx, images, tfds, records).
Mistakes a user can make (a wrong path, images of several sizes, a damaged file) raise `DataError`, whose message says
what was found, what was expected and what to do.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

UINT8 = np.dtype(np.uint8)


class DataError(ValueError):
    """The data cannot be used as asked; the message is meant for the person who started the program."""


@contextmanager
def reading(title: object) -> Iterator[None]:
    """Makes one DataError that names the file out of whatever a damaged or hostile one raises inside."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{title} asks for more memory than there is: it is damaged, or too large for this machine"
        ) from error
    except Exception as error:  # readers raise nearly anything: MemoryError, RecursionError, UnicodeDecodeError, ...
        if isinstance(error, OSError) and error.errno is not None:  # the system's: permissions, a full disk
            raise DataError(f"{title} cannot be read or unpacked: {error}") from error
        reason = str(error).strip()[:200] or type(error).__name__
        raise DataError(
            f"{title} is truncated, damaged or of another kind ({reason}); fetch or make it again"
        ) from error


def check_expansion(title: str, stored: int, size: int) -> None:
    """Refuses what would fill the memory out of a small file: DataError for over 256 MiB, 100 times what is stored.

    Args:
      title: of the file, for the message.
      stored, size: bytes before and after decompression.
    """
    if size > 2**28 and size > 100 * stored:
        raise DataError(
            f"{title} would unpack {stored} bytes to {size}, more than images and arrays ever do; it is damaged or "
            "meant to fill the memory. Unpack it by hand if it is neither"
        )


class Example(TypedDict):
    """One image (H, W, C), uint8 in 0..255 or a float32 latent, and its class number."""

    image: NDArray[Any]
    label: int


@dataclass(frozen=True, eq=False)
class Source:
    """Images and labels by number.

    `read(i)` returns (image (H, W, C), label) for 0 <= i < length, is a function of i alone and may be called from
    several threads. `digest()` is the sha256 (hex) of the content or of the file listing. `images` (length, H, W, C)
    and `labels` (length,) int32 are present when everything already lies in memory. `read_many(indices (B,))` ->
    (images (B, H, W, C), labels (B,)) is present where reading many at once is much faster than one by one. All images
    are of type `dtype`: uint8, or float32 for latents (latents.py).
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    length: int
    read: Callable[[int], tuple[NDArray[Any], int]]
    digest: Callable[[], str]
    images: NDArray[Any] | None = None
    labels: NDArray[np.int32] | None = None
    read_many: Callable[[NDArray[np.int64]], tuple[NDArray[Any], NDArray[np.int32]]] | None = None
    dtype: np.dtype[Any] = UINT8

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_bytes(self) -> int:
        """What all images take once decoded."""
        height, width, channels = self.image_shape
        return self.length * height * width * channels * self.dtype.itemsize

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        """Returns example number `index`, 0 <= index < len(self). Raises IndexError outside."""
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} asked of {self.name}, which has examples 0..{self.length - 1}")
        image, label = self.read(index)
        return {"image": image, "label": label}

    def fingerprint(self) -> str:
        """Returns a sha256 (hex) that changes with the data, with the classes and with the image shape."""
        facts = f"{self.digest()} {self.length} {self.image_shape} {self.class_names}"
        return hashlib.sha256(facts.encode()).hexdigest()


def array_source(name: str, images: NDArray[Any], labels: NDArray[np.integer], class_names: tuple[str, ...]) -> Source:
    """Returns a source over arrays in memory.

    Args:
      name: how messages call it.
      images: (N, H, W, C) uint8, or float32 latents.
      labels: (N,) integers in 0..len(class_names)-1.
      class_names: one name per class.
    """
    if images.dtype not in (np.uint8, np.float32) or images.ndim != 4:
        raise DataError(f"{name}: images must be (N, H, W, C) uint8, found {images.shape} {images.dtype}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{name}: {len(images)} images but labels of shape {labels.shape}; give one label per image")
    if images.size == 0:
        raise DataError(f"{name}: no images, or images without pixels {images.shape}; give at least one")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(
            f"{name}: labels run from {labels.min()} to {labels.max()}, expected 0..{len(class_names) - 1} "
            f"for the {len(class_names)} classes"
        )
    images = np.ascontiguousarray(images)
    classes = labels.astype(np.int32)

    def digest() -> str:
        content = hashlib.sha256(images.data)
        content.update(classes.astype("<i4").data)
        return content.hexdigest()

    return Source(
        name=name,
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        class_names=class_names,
        length=len(images),
        read=lambda index: (images[index], int(classes[index])),
        digest=digest,
        images=images,
        labels=classes,
        dtype=images.dtype,
    )
