"""Pictures in a folder, a zip file or a tar file, one folder per class.

Two layouts: `<split>/<class>/picture.png`, the splits among train, test, val, valid, validation; or, without splits,
`<class>/picture.png`. Classes are numbered in sorted order of their names. Pictures may lie in further folders below
their class. Pictures without any class folder form one class called "all". One folder wrapped around everything (as
archives often have) is looked through. Hidden files and files that are not pictures are ignored.
"""

import posixpath
from pathlib import Path
from typing import BinaryIO

from diffdistill.data.containers import Container, open_container
from diffdistill.data.contract import DataError, Source
from diffdistill.data.pixels import SUFFIXES, encoded_source, listing_digest

_SPLITS = ("train", "test", "val", "valid", "validation")
_WITHOUT_CLASSES = "all"


def open_images(path: str | Path, split: str, image_size: int | None, channels: int | None) -> Source:
    """Returns the pictures of one split; see the top of this file and of pixels.py.

    Raises:
      DataError: nothing there, no pictures, an unknown split, an empty class folder, pictures beside class folders,
        pictures that are not alike.
    """
    return images_in(open_container(path), split, image_size, channels)


def images_in(container: Container, split: str, image_size: int | None, channels: int | None) -> Source:
    """The same for an open container."""
    prefix, splits = _layout(container)
    if splits and split not in splits:
        raise DataError(f"{container.path} has no split {split!r}; it has {', '.join(splits)}. Set config.data.split")
    if not splits and split != "train":
        raise DataError(
            f"{container.path} has no split {split!r}: its class folders are not inside folders named train, test, ... "
            "Set config.data.split='train' to read them all"
        )
    root = f"{prefix}{split}/" if splits else prefix
    class_names, files = _classes(container, root)
    sizes = {name.removeprefix(root): container.sizes[name] for name, _ in files}

    def fetch(index: int) -> tuple[BinaryIO, int]:
        name, label = files[index]
        return container.open(name), label

    return encoded_source(
        name=f"{container.name}:{split}" if splits else container.name,
        class_names=class_names,
        length=len(files),
        fetch=fetch,
        title=lambda index: str(container.path / files[index][0]),
        digest=lambda: listing_digest(sizes),
        image_size=image_size,
        channels=channels,
    )


def splits_of(container: Container) -> tuple[str, ...]:
    """Returns the splits found; ("train",) where pictures are not divided."""
    return _layout(container)[1] or ("train",)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_picture(name: str) -> bool:
    """Whether a file of a container is a picture by its name, and not hidden."""
    return name.lower().endswith(SUFFIXES) and not _hidden(name)


def _inside(container: Container, prefix: str) -> tuple[list[str], list[str]]:
    """Returns (names of folders, names of pictures) directly inside `prefix`, which is "" or ends with "/"."""
    parent = prefix.rstrip("/")
    folders = [f for f in container.folders if posixpath.dirname(f) == parent and f != parent and not _hidden(f)]
    pictures = [name for name in container.sizes if posixpath.dirname(name) == parent and is_picture(name)]
    return sorted(posixpath.basename(folder) for folder in folders), pictures


def _layout(container: Container) -> tuple[str, tuple[str, ...]]:
    """Returns (prefix of everything, splits found there)."""
    prefix = ""
    while True:
        folders, pictures = _inside(container, prefix)
        if not pictures and folders and all(folder in _SPLITS for folder in folders):
            return prefix, tuple(folders)
        if pictures or len(folders) != 1:
            return prefix, ()
        below, pictures = _inside(container, f"{prefix}{folders[0]}/")
        if pictures or not below:
            return prefix, ()  # the single folder is a class, not a wrapper
        prefix = f"{prefix}{folders[0]}/"


def _classes(container: Container, root: str) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Returns class names and (file, label) for the pictures below `root`."""
    folders, loose = _inside(container, root)
    where = container.path / root
    if folders and loose:
        raise DataError(
            f"{where}: the picture {posixpath.basename(loose[0])} lies beside class folders ({', '.join(folders[:5])}"
            f"{', ...' if len(folders) > 5 else ''}); move every picture into the folder of its class"
        )
    if loose:
        return (_WITHOUT_CLASSES,), [(name, 0) for name in loose]
    labels = {folder: number for number, folder in enumerate(folders)}
    counts = [0] * len(folders)
    files = []
    for name in container.sizes:
        if name.startswith(root) and is_picture(name):
            label = labels[name[len(root) :].split("/", 1)[0]]
            counts[label] += 1
            files.append((name, label))
    if not files:
        found = ", ".join(list(container.sizes)[:3]) or "nothing at all"
        raise DataError(
            f"{where} holds no pictures ({', '.join(SUFFIXES)}); found {found}. Expected <class>/<picture>. Archives "
            "of batches (CIFAR-10, downsampled ImageNet) are turned into ArrayRecord by --mode=prepare"
        )
    empty = [folder for folder, count in zip(folders, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"class folder {where / empty[0]} holds no pictures; fill it or remove it")
    return tuple(folders), files
