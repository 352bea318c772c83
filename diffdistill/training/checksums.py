"""Checksums of the files of a checkpoint: damage on the disk is seen before anything is learnt from it."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.json"


class Damaged(Exception):
    """A file of a checkpoint is not as it was written; the message names it."""


def write(folder: Path) -> None:
    """Writes `folder`/checksums.json with the BLAKE2b of every file below the folders of `folder`.

    When it returns everything in `folder` is on the disk, whatever happens to the power.
    """
    files = sorted(path for item in folder.iterdir() if item.is_dir() for path in item.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, files)
        sums = {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, digests, strict=True)}
        (folder / FILE).write_text(json.dumps({"blake2b": sums}, indent=1))
        for _ in pool.map(_sync, [*folder.rglob("*"), folder]):
            pass


def check(folder: Path, items: Iterable[str]) -> None:
    """Compares the files of some of the folders of `folder` with what was written.

    Does nothing without checksums.json, as in checkpoints that are older than it.

    Raises:
      Damaged: a file differs or is missing.
      OSError: a file is there and cannot be read.
    """
    try:
        sums = dict(json.loads((folder / FILE).read_text())["blake2b"])
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"its {FILE} cannot be read: {error}") from error
    wanted = set(items)
    names = [name for name in sums if name.split("/")[0] in wanted]

    def compare(name: str) -> None:
        try:
            found = _digest(folder / name)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Damaged(f"its file {name} is missing") from error
        if found != sums[name]:
            raise Damaged(f"its file {name} is not as it was written: the checksums differ")

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(compare, names):  # in this order, whichever is read first
            pass


def are_right(folder: Path) -> bool:
    """Whether all files that `folder`/checksums.json lists are there as they were written; False without it."""
    try:
        items = {name.split("/")[0] for name in json.loads((folder / FILE).read_text())["blake2b"]}
        check(folder, items)
    except (OSError, ValueError, TypeError, KeyError, Damaged):
        return False
    return True


def _sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
