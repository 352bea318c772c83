"""Published archives that are not folders of pictures: CIFAR-10 (Python and binary version), downsampled ImageNet.

* cifar-10-python.tar.gz: pickles data_batch_1..5 and test_batch, names in batches.meta.
* cifar-10-binary.tar.gz: data_batch_1..5.bin and test_batch.bin, each record one label byte and 3072 bytes of image;
  names in batches.meta.txt. (https://www.cs.toronto.edu/~kriz/cifar.html)
* Downsampled ImageNet (Chrabaszcz, Loshchilov and Hutter 2017): train_data_batch_1..10 and val_data, as pickles or as
  .npz, keys data and labels; labels run from 1. Zip files of several parts must be unpacked into one folder.

All hold images as rows of channels, height, width.
"""

import io
import math
import posixpath
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffdistill.data import pickles
from diffdistill.data.containers import Container
from diffdistill.data.contract import DataError, Source, reading
from diffdistill.data.pixels import listing_digest
from diffdistill.data.zips import check_entries

_CIFAR_BYTES = 3 * 32 * 32
_IMAGENET_CLASSES = 1000


class _Part(NamedTuple):
    """One batch file: images (N, 3, S, S) uint8 and labels (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def archive_splits(container: Container) -> dict[str, Callable[[], Source]]:
    """Returns split -> a function that opens it, or nothing if the container is no such archive.

    Raises:
      DataError: parts of the archive are missing.
    """
    files = {posixpath.basename(name): name for name in container.sizes}
    meta = files.get("batches.meta") or files.get("batches.meta.txt")
    for suffix in ("", ".bin"):
        if f"data_batch_1{suffix}" in files and meta is not None:
            train = _numbered(container, files, "data_batch_", suffix, 5)
            parts = {"train": train, "test": [_needed(container, files, f"test_batch{suffix}")]}
            return {split: _opener(container, split, names, _cifar_part, meta) for split, names in parts.items()}
    for suffix in ("", ".npz"):
        parts = {}
        if any(re.fullmatch(rf"train_data_batch_\d+{re.escape(suffix)}", name) for name in files):
            parts["train"] = _numbered(container, files, "train_data_batch_", suffix, 10)
        if f"val_data{suffix}" in files:
            parts["val"] = [files[f"val_data{suffix}"]]
        if parts:
            return {split: _opener(container, split, names, _imagenet_part, None) for split, names in parts.items()}
    return {}


def _needed(container: Container, files: dict[str, str], name: str) -> str:
    if name not in files:
        raise DataError(
            f"{container.path} lacks {name}; put all parts of the archive into one folder or fetch it again"
        )
    return files[name]


def _numbered(container: Container, files: dict[str, str], begin: str, suffix: str, count: int) -> list[str]:
    return [_needed(container, files, f"{begin}{number}{suffix}") for number in range(1, count + 1)]


def _opener(
    container: Container, split: str, names: list[str], load: Callable[[Container, str], _Part], meta: str | None
) -> Callable[[], Source]:
    return lambda: _open(container, split, names, load, meta)


def _open(
    container: Container, split: str, names: list[str], load: Callable[[Container, str], _Part], meta: str | None
) -> Source:
    from tqdm import tqdm

    class_names = _cifar_names(container, meta) if meta else tuple(str(n) for n in range(_IMAGENET_CLASSES))
    lengths, shapes = [], set()
    for name in tqdm(names, desc=f"looking at {container.name}:{split}", unit="file", delay=2, disable=None):
        part = load(container, name)
        lengths.append(len(part.labels))
        shapes.add(part.images.shape[1:])
        _check_labels(container, name, part.labels, len(class_names))
    if len(shapes) != 1:
        raise DataError(f"{container.path}: batches of several image shapes {sorted(shapes)}; keep one resolution")
    channels, height, width = shapes.pop()
    starts = np.cumsum([0, *lengths])

    # The batches of ImageNet 64x64 take 1.6 GB each: keep the one being read and its neighbour.
    recent: OrderedDict[int, _Part] = OrderedDict()
    lock = threading.Lock()

    def part_number(number: int) -> _Part:
        with lock:
            if number not in recent:
                while len(recent) > 1:
                    recent.popitem(last=False)
                recent[number] = load(container, names[number])
            recent.move_to_end(number)
            return recent[number]

    def read(index: int) -> tuple[NDArray[np.uint8], int]:
        number = int(np.searchsorted(starts, index, "right")) - 1
        part, row = part_number(number), index - int(starts[number])
        return np.ascontiguousarray(part.images[row].transpose(1, 2, 0)), int(part.labels[row])

    sizes = {posixpath.basename(name): container.sizes[name] for name in names}
    return Source(
        name=f"{container.name}:{split}",
        image_shape=(height, width, channels),
        class_names=class_names,
        length=int(starts[-1]),
        read=read,
        digest=lambda: listing_digest(sizes),
    )


def _check_labels(container: Container, name: str, labels: NDArray[np.int64], num_classes: int) -> None:
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        found = f"{labels.min()}..{labels.max()}" if len(labels) else "none"
        raise DataError(f"{container.path}: {name} holds labels {found}, expected 0..{num_classes - 1}; fetch it again")


def _cifar_names(container: Container, meta: str) -> tuple[str, ...]:
    title = f"{container.path}: {meta}"
    with container.open(meta) as file, reading(title):
        if meta.endswith(".txt"):
            return tuple(line.strip() for line in file.read().decode().splitlines() if line.strip())
        names = pickles.load(file, title).get("label_names")
        if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
            raise DataError(f"{title} has no list of 'label_names'; fetch the archive again")
        return tuple(name.decode() if isinstance(name, bytes) else name for name in names)


def _cifar_part(container: Container, name: str) -> _Part:
    if not name.endswith(".bin"):
        return _pickled(container, name)
    with container.open(name) as file:
        content = np.frombuffer(file.read(), np.uint8)
    if len(content) % (1 + _CIFAR_BYTES):
        raise DataError(f"{container.path}: {name} is truncated ({len(content)} bytes); fetch the archive again")
    rows = content.reshape(-1, 1 + _CIFAR_BYTES)
    return _Part(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64))


def _imagenet_part(container: Container, name: str) -> _Part:
    part = _pickled(container, name)
    return _Part(part.images, part.labels - 1)  # published labels run from 1 to 1000


def _pickled(container: Container, name: str) -> _Part:
    """Returns the part in a pickle or .npz with the keys data (N, 3 * S * S) uint8 and labels."""
    title = f"{container.path}: {name}"
    with container.open(name) as file:
        content: dict[str, Any]
        if name.endswith(".npz"):
            whole = file if file.seekable() else io.BytesIO(file.read())
            check_entries(whole, title)
            whole.seek(0)
            with reading(title), np.load(whole, allow_pickle=False) as stored:
                content = {key: stored[key] for key in ("data", "labels") if key in stored}
        else:
            content = pickles.load(file, title)
    data, labels = content.get("data"), content.get("labels")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.dtype != np.uint8 or not data.size:
        raise DataError(f"{title} has no 'data' (N, 3 * size * size) uint8; found {str(sorted(content))[:200]}")
    with reading(f"{title}: labels"):
        labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{title} has no 'labels' (N,) of whole numbers, but {labels.dtype} {labels.shape}")
    side = math.isqrt(data.shape[1] // 3)
    if 3 * side * side != data.shape[1] or len(labels) != len(data):
        raise DataError(f"{title}: rows of {data.shape[1]} bytes and {len(labels)} labels for {len(data)} images")
    return _Part(data.reshape(-1, 3, side, side), labels.astype(np.int64))
