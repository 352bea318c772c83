"""Folders, zip files and tar files seen alike: named files that can be opened in any order from several threads.

A plain tar is indexed once and read at offsets. A compressed tar has no random access: it is unpacked into memory when
its contents take at most MEMORY_LIMIT bytes, and refused otherwise with the advice to run --mode=prepare, which unpacks
it into a plain tar on disk.
"""

import bz2
import gzip
import io
import lzma
import os
import posixpath
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from diffdistill.data.contract import DataError, check_expansion
from diffdistill.data.paths import existing

MEMORY_LIMIT = 512 * 2**20

_COMPRESSED: dict[bytes, Callable[..., object]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


@dataclass(frozen=True)
class Container:
    """Files by name (with "/" between folders), in sorted order, and all folders, also the empty ones."""

    path: Path
    sizes: dict[str, int]
    folders: frozenset[str]
    open: Callable[[str], BinaryIO]

    @property
    def name(self) -> str:
        """The name of the folder or file, also for a path like "." """
        return os.path.basename(os.path.abspath(self.path))


def open_container(path: str | Path, unpack_to: Path | None = None) -> Container:
    """Returns the contents of a folder, a zip file or a tar file (plain, gz, bz2, xz).

    Args:
      path: what to open; the kind is told from the content, not from the name.
      unpack_to: where a compressed tar may be unpacked into a plain one, which is kept and found by the next call.

    Raises:
      DataError: nothing there, not a container, damaged, or a compressed tar too large for memory.
    """
    path = existing(path)
    if path.is_dir():
        return _folder(path)
    with _damage(path):
        with path.open("rb") as file:
            start = file.read(8)
        if zipfile.is_zipfile(path):
            return _zip(path)
        for magic, opener in _COMPRESSED.items():
            if start.startswith(magic):
                return _compressed_tar(path, partial(_uncompressed, opener, path), unpack_to)
        if tarfile.is_tarfile(path):
            return _tar(path, path)
    raise DataError(f"{path} is neither a folder nor a zip file nor a tar file (plain, gz, bz2 or xz)")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's: permissions, a full disk
            raise DataError(f"{path} cannot be read or unpacked: {error}") from error
        raise DataError(f"{path} is truncated, damaged or no archive ({error}); fetch it again") from error


def _container(path: Path, sizes: dict[str, int], folders: set[str], opener: Callable[[str], BinaryIO]) -> Container:
    for name in sizes:
        parent = posixpath.dirname(name)
        while parent and parent not in folders:
            folders.add(parent)
            parent = posixpath.dirname(parent)
    return Container(path, dict(sorted(sizes.items())), frozenset(folders), opener)


def _inside(path: Path, name: str) -> str:
    """The name of a file of an archive, without slashes around it. DataError where it leads out of the archive."""
    inside = posixpath.normpath(name.strip("/"))
    if inside == ".." or inside.startswith("../"):
        raise DataError(f"{path} holds a file named {name!r}, which leads out of it; unpack it by hand if you trust it")
    return inside


def _folder(root: Path) -> Container:
    sizes: dict[str, int] = {}
    folders: set[str] = set()
    waiting, seen = [(root, "")], set()
    while waiting:  # links to folders are followed, but no folder is visited twice along the way
        folder, prefix = waiting.pop()
        if (identity := os.path.realpath(folder)) in seen:
            continue
        seen.add(identity)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"folder {folder} cannot be listed: {error.strerror}") from error
        for entry in entries:
            if entry.is_dir():
                folders.add(prefix + entry.name)
                waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))
            elif entry.is_file():
                sizes[prefix + entry.name] = entry.stat().st_size

    def opener(name: str) -> BinaryIO:
        try:
            return (root / name).open("rb")
        except OSError as error:
            raise DataError(f"{root / name} cannot be read: {error.strerror}") from error

    return _container(root, sizes, folders, opener)


def _zip(path: Path) -> Container:
    archive = zipfile.ZipFile(path)  # locks its file by itself: safe from several threads
    listed = [entry for entry in archive.infolist() if entry.filename]  # one without a name is damage
    entries = {_inside(path, entry.filename): entry for entry in listed if not entry.is_dir()}
    sizes = {name: entry.file_size for name, entry in entries.items()}
    folders = {_inside(path, entry.filename) for entry in listed if entry.is_dir()}

    def opener(name: str) -> BinaryIO:
        entry = entries[name]
        check_expansion(f"{path / name}", entry.compress_size, entry.file_size)
        with _damage(path):
            try:
                return io.BytesIO(archive.read(entry))
            except RuntimeError as error:  # a password, or a compression this Python lacks
                raise DataError(f"{path}: {name} cannot be read ({error})") from error

    return _container(path, sizes, folders, opener)


def _uncompressed(opener: Callable[..., object], path: Path) -> BinaryIO:
    return cast(BinaryIO, opener(path, "rb"))


def _compressed_tar(path: Path, opener: Callable[[], BinaryIO], unpack_to: Path | None) -> Container:
    if unpack_to is not None:
        if not unpack_to.exists():
            part = unpack_to.with_name(unpack_to.name + ".part")
            try:
                with opener() as file, part.open("wb") as plain:
                    shutil.copyfileobj(file, plain, 2**20)
                part.replace(unpack_to)
            finally:
                part.unlink(missing_ok=True)  # after a full disk, give the space back
        return _tar(path, unpack_to)
    with opener() as file:
        content = file.read(MEMORY_LIMIT + 1)
    if len(content) > MEMORY_LIMIT:
        raise DataError(
            f"{path} is a compressed tar of more than {MEMORY_LIMIT // 2**20} MiB, which has no random access. Run "
            f"--mode=prepare once to turn it into ArrayRecord, or unpack it"
        )
    return _tar(path, content)


def _tar(path: Path, plain: Path | bytes) -> Container:
    places: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    links: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(plain)) if isinstance(plain, bytes) else tarfile.open(plain, "r:") as archive:
        while (member := archive.next()) is not None:
            name = _inside(path, member.name)
            if member.isreg() and not member.issparse():
                places[name] = (member.offset_data, member.size)
            elif member.isdir() and name != ".":
                folders.add(name)
            elif member.islnk() or member.issym():
                base = posixpath.dirname(name) if member.issym() else ""
                links[name] = posixpath.normpath(posixpath.join(base, member.linkname))
            cast(list, vars(archive)["members"]).clear()  # tarfile keeps every header: a gigabyte for a million files
    for name, target in links.items():
        if target in places:
            places[name] = places[target]
    sizes = {name: size for name, (_, size) in places.items()}
    if isinstance(plain, bytes):
        return _container(path, sizes, folders, lambda name: io.BytesIO(_slice(plain, *places[name])))
    handle = os.open(plain, os.O_RDONLY)  # kept open as long as the process: reads at offsets need no lock
    return _container(path, sizes, folders, lambda name: io.BytesIO(_read(handle, path, name, *places[name])))


def _slice(content: bytes, offset: int, size: int) -> bytes:
    return content[offset : offset + size]


def _read(handle: int, path: Path, name: str, offset: int, size: int) -> bytes:
    content = os.pread(handle, size, offset)
    while len(content) < size:  # one read returns at most 2 GiB
        more = os.pread(handle, size - len(content), offset + len(content))
        if not more:
            raise DataError(f"{path} ends inside {name}: the file is truncated; fetch it again")
        content += more
    return content
