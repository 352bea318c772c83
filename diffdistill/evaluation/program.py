"""What wrote a file: versions, revision of the sources, command line."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("diffdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


@functools.cache
def versions() -> dict[str, str]:
    """Version by package, Python's own included; "not installed" where a checkout was never installed."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@functools.cache
def revision() -> str:
    """The commit of this checkout, with -dirty where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return shown.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def about() -> dict[str, Any]:
    """All of it, as it stands beside what is written."""
    return {"versions": versions(), "git_revision": revision(), "command_line": list(sys.argv)}
