"""Checksums of the files of a checkpoint: damage on the disk is seen before anything is learnt from it."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffdistill.training.json_files import read_json

FILE = "checksums.json"


class Damaged(Exception):
    """A file of a checkpoint is not as it was written; the message names it."""


def write(folder: Path) -> None:
    """Writes `folder`/checksums.json with the BLAKE2b of every file below the folders of `folder`.

    When it returns all of them, and what else is in `folder`, are on the disk, whatever happens to the power.
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
      Damaged: a file differs, is missing or is no file, or checksums.json itself is damaged or names files elsewhere.
      OSError: a file is there and cannot be read.
    """
    try:
        sums = read(folder)
    except FileNotFoundError:
        return
    wanted = set(items)
    names = [name for name in sums if name.split("/")[0] in wanted]

    def compare(name: str) -> None:
        try:
            if not stat.S_ISREG((folder / name).stat().st_mode):  # a device, for one, need not end
                raise Damaged(f"its file {name} is no file")
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
        check(folder, {name.split("/")[0] for name in read(folder)})
    except (OSError, Damaged):
        return False
    return True


def read(folder: Path) -> dict[str, str]:
    """The checksums in `folder` by the names of files below it. Raises Damaged, or OSError where there are none."""
    try:
        sums = read_json(folder / FILE)["blake2b"]
        if not isinstance(sums, dict):
            raise ValueError("it holds no checksums by the names of files")
        for name in sums:
            if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise ValueError(f"it names {name[:200]!r}, which is no file of a checkpoint")
    except (ValueError, KeyError) as error:
        raise Damaged(f"its {FILE} cannot be read: {error}") from error
    return sums


def _sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise  # some file systems do so for folders alone, and know nothing better
    finally:
        os.close(number)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
