"""The plots of a report, which are drawn again only where what they show, or what draws them, has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffdistill.evaluation import program
from diffdistill.evaluation.files import write_atomically


class Drawings:
    """PNG files in `folder`. Where all that they depend on is as it was when they were drawn, they are read instead.

    Args:
      folder: of the plots alone.
      of: what they show; anything that JSON knows.
    """

    def __init__(self, folder: Path, of: Any) -> None:
        self._folder, self._note = folder, folder / ".drawn"
        drawer = [program.versions(), program.revision()]
        self._key = hashlib.sha256(json.dumps([of, drawer], sort_keys=True).encode()).hexdigest()
        if program.revision().endswith("-dirty"):  # whatever draws them may have changed
            self._key = ""
        self._kept = bool(self._key) and self._note.exists() and self._note.read_bytes() == self._key.encode()
        if not self._kept:
            self._note.unlink(missing_ok=True)

    def png(self, name: str, draw: Callable[..., bytes], *arguments: Any) -> bytes:
        """The picture called `name`, as draw(*arguments) makes it."""
        file = self._folder / name
        if self._kept and file.exists():
            return file.read_bytes()
        content = draw(*arguments)
        write_atomically(file, lambda stream: stream.write(content))
        return content

    def finished(self) -> None:
        """Notes that all of them are drawn."""
        if self._key and not self._kept:
            write_atomically(self._note, lambda stream: stream.write(self._key.encode()))
