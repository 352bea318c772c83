"""Where the program keeps what it fetches and compiles."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache() -> Path:
    """$XDG_CACHE_HOME/diffdistill, by default ~/.cache/diffdistill; in the system's temporary folder without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user whom the system does not know, as in some containers
        home = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return home / "diffdistill"
