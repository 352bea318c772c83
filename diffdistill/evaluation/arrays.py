"""Arrays from .npz files that this program has written, and that may have been damaged or replaced since."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np


def read_npz(path: Path, most: int) -> dict[str, np.ndarray]:
    """All arrays of an .npz file by name.

    Args:
      path: the file.
      most: bytes that they may have together.

    Raises:
      ValueError: it is no such file, damaged, or holds more.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > most:
            raise ValueError(f"it holds {size} bytes, more than the {most} expected")
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("it holds something that is no array")
        return found
    except Exception as error:  # a damaged zip file raises nearly anything
        raise ValueError(f"{type(error).__name__}: {error}") from error
