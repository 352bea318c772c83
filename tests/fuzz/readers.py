"""Every reader of files from outside: valid files for it, hostile ones, and what it may raise."""

from __future__ import annotations

from pathlib import Path

import readers_data
import readers_runs
import readers_weights
from reader import Reader


def known(owned: Path) -> dict[str, Reader]:
    """All of them by name. owned: the file whose existence would show that code was executed."""
    return {**readers_weights.known(owned), **readers_data.known(owned), **readers_runs.known(owned)}
