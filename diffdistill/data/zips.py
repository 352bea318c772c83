"""Zip files, and so .npz files: what is damaged or meant to fill the memory is refused before it is unpacked."""

import zipfile
from pathlib import Path
from typing import IO

from diffdistill.data.contract import DataError, check_expansion, reading


def open_zip(file: Path | IO[bytes], title: object) -> zipfile.ZipFile:
    """Returns the archive. Raises DataError that names `title` for anything that cannot be listed."""
    with reading(title):
        return zipfile.ZipFile(file)


def check_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, title: object) -> None:
    """Raises DataError for an entry that would fill the memory (see `check_expansion`) or is of a rare compression.

    The directory may claim that more is stored than there is room for before it.
    """
    if entry.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):  # the others know no bound on their output
        raise DataError(
            f"{title} is compressed by method {entry.compress_type}; only stored and deflated files are read. Pack it "
            "again without a special method"
        )
    stored = max(0, min(entry.compress_size, archive.start_dir - entry.header_offset))
    check_expansion(str(title), stored, entry.file_size)


def check_entries(file: Path | IO[bytes], title: object) -> None:
    """Raises DataError for a zip file with any entry that `check_entry` refuses, or that cannot be listed."""
    with open_zip(file, title) as archive:
        for entry in archive.infolist():
            check_entry(archive, entry, f"{title}: {entry.filename}")


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, title: object) -> bytes:
    """Returns the content of an entry, never more than its size says. Raises DataError that names `title`."""
    check_entry(archive, entry, title)
    with reading(title), archive.open(entry) as file:
        return file.read(entry.file_size)
