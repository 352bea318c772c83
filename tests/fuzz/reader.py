"""What a reader of files from outside is to the fuzzer."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "tests" / "weights"
sys.path.insert(0, str(ROOT))


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files from outside.

    seeds: () -> valid files by name, each read alone. hostile: () -> files made by hand, by name.
    read: reads a file at a path. errors: what it may raise. complete: whether it accepts the seeds.
    """

    seeds: Callable[[], dict[str, bytes]]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    hostile: Callable[[], dict[str, bytes]] = dict
    complete: bool = True


def in_folder(name: str, read: Callable[[Path], Any], others: Callable[[], dict[str, bytes]] = dict) -> Any:
    """Reads the folder in which the file has that name, beside others."""

    def reading(path: Path) -> None:
        folder = path.with_name("folder")
        target = folder / name
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
        for other, content in others().items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)
        read(folder)

    return reading
