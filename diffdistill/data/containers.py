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
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self, cast

from diffdistill.data.contract import DataError, check_expansion, reading
from diffdistill.data.paths import existing
from diffdistill.data.zips import open_zip, read_entry

MEMORY_LIMIT = 512 * 2**20

_LONGEST_NAME, _MOST_FOLDERS = 4096, 64  # characters of a name in an archive, folders within each other
_FOLDERS_LIMIT = 2**27  # characters that the names of all folders take
_BLOCK = 512  # bytes of a tar header
_HEADER_LIMIT = 2**20  # bytes of a long name or of the properties of one file
_COMMON_LIMIT = 2**14  # bytes of properties common to all files

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
    with reading(path):
        with path.open("rb") as file:
            start = file.read(8)
        if zipfile.is_zipfile(path):
            return _zip(path)
        for magic, opener in _COMPRESSED.items():
            if start.startswith(magic):
                return _compressed_tar(path, partial(_uncompressed, opener, path), unpack_to)
        if _is_tar(path):
            return _tar(path, path)
    raise DataError(f"{path} is neither a folder nor a zip file nor a tar file (plain, gz, bz2 or xz)")


def _container(path: Path, sizes: dict[str, int], folders: set[str], opener: Callable[[str], BinaryIO]) -> Container:
    length = 0
    for name in sizes:
        parent = posixpath.dirname(name)
        while parent and parent not in folders:
            folders.add(parent)
            length += len(parent)
            parent = posixpath.dirname(parent)
        if length > _FOLDERS_LIMIT:
            raise DataError(f"{path} has more folders within folders than memory should hold; pack it flat")
    return Container(path, dict(sorted(sizes.items())), frozenset(folders), opener)


def _inside(path: Path, name: str) -> str:
    """The name of a file of an archive, without slashes around it.

    DataError where it leads out of the archive, or is longer or deeper than file systems take.
    """
    if len(name) > _LONGEST_NAME or name.count("/") > _MOST_FOLDERS:
        raise DataError(
            f"{path} holds a file named {name[:40]!r}... of {len(name)} characters in {name.count('/')} folders; at "
            f"most {_LONGEST_NAME} and {_MOST_FOLDERS} are read. Pack it with shorter names"
        )
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
    archive = open_zip(path, path)  # locks its file by itself: safe from several threads
    listed = [entry for entry in archive.infolist() if entry.filename]  # one without a name is damage
    entries = {_inside(path, entry.filename): entry for entry in listed if not entry.is_dir()}
    sizes = {name: entry.file_size for name, entry in entries.items()}
    folders = {_inside(path, entry.filename) for entry in listed if entry.is_dir()}

    def opener(name: str) -> BinaryIO:
        return io.BytesIO(read_entry(archive, entries[name], path / name))

    return _container(path, sizes, folders, opener)


def _uncompressed(opener: Callable[..., object], path: Path) -> BinaryIO:
    return cast(BinaryIO, opener(path, "rb"))


def _compressed_tar(path: Path, opener: Callable[[], BinaryIO], unpack_to: Path | None) -> Container:
    if unpack_to is not None:
        if not unpack_to.exists():
            part = unpack_to.with_name(unpack_to.name + ".part")
            try:
                with part.open("wb") as plain:
                    plain.writelines(_unpacked(path, opener))
                part.replace(unpack_to)
            finally:
                part.unlink(missing_ok=True)  # after a full disk, give the space back
        return _tar(path, unpack_to)
    content = io.BytesIO()
    for block in _unpacked(path, opener):
        content.write(block)
        if content.tell() > MEMORY_LIMIT:
            raise DataError(
                f"{path} is a compressed tar of more than {MEMORY_LIMIT // 2**20} MiB, which has no random access. Run "
                f"--mode=prepare once to turn it into ArrayRecord, or unpack it"
            )
    return _tar(path, content.getvalue())


def _unpacked(path: Path, opener: Callable[[], BinaryIO]) -> Iterator[bytes]:
    """What is compressed in a file, in blocks. Raises DataError where that would be far more than the file."""
    stored, size = path.stat().st_size, 0
    with opener() as file:
        while block := file.read(2**20):
            size += len(block)
            check_expansion(str(path), stored, size)
            yield block


class _Member(tarfile.TarInfo):
    """A header of a tar file, looked at before tarfile believes it: its sizes may be negative, huge or endless."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        file = cast(BinaryIO, archive.fileobj)
        begin = file.tell()
        header = file.read(_BLOCK)
        kind = header[156:157]
        try:
            size = tarfile.nti(header[124:136]) if len(header) == _BLOCK else 0  # pyright: ignore
        except tarfile.HeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            size = 0  # tarfile says what is wrong
        limit = _HEADER_LIMIT
        if kind == tarfile.XGLTYPE:  # tarfile copies what is common to all files for each of them
            limit = _COMMON_LIMIT - sum(len(name) + len(value) for name, value in archive.pax_headers.items())
        if size < 0 or (kind in _EXTENDED and size > limit):
            raise DataError(
                f"{archive.name}: the header at byte {begin} says that {size} bytes follow, which no tar does; it is "
                "damaged: fetch it again"
            )
        # Python before 3.11.10 takes a minute for each such header (CVE-2024-6232).
        if kind in _EXTENDED and re.search(rb"\d{100}", file.read(size)):
            raise DataError(f"{archive.name} holds damaged properties of a file at byte {begin}; fetch it again")
        file.seek(begin)
        return super().fromtarfile(archive)

    def _proc_gnusparse_10(self, _next: object, _headers: object, archive: tarfile.TarFile) -> None:
        raise DataError(  # before tarfile reads a list of holes that may be as long as the file
            f"{archive.name} holds a file with holes; pack it again without --sparse"
        )


_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _is_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:", tarinfo=_Member).close()
    except tarfile.ReadError:
        return False
    except DataError:
        with path.open("rb") as file:
            if b"ustar" not in file.read(_BLOCK)[257:263]:  # nor does it look like one
                return False
        raise
    return True


def _tar(path: Path, plain: Path | bytes) -> Container:
    places: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    links: dict[str, str] = {}
    named, file = (path, io.BytesIO(plain)) if isinstance(plain, bytes) else (plain, None)
    with tarfile.open(named, "r:", file, tarinfo=_Member) as archive:  # "r:": what is unpacked is not unpacked again
        position = -1
        while (member := archive.next()) is not None:
            if member.size < 0 or archive.offset <= position:  # CVE-2025-8194
                raise DataError(f"{path} leads back to its own byte {archive.offset}: damaged; fetch it again")
            position = archive.offset
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
