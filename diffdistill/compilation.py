"""The cache of compiled programs on disk: a second start of the same programs compiles nothing."""

from __future__ import annotations

import collections
import hashlib
import os
import platform
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
_counts: collections.Counter[str] = collections.Counter()


def use_cache() -> None:
    """Lets JAX keep compiled programs in ~/.cache/diffdistill (or $XDG_CACHE_HOME), unless the user says where.

    Call before jax is imported. JAX_COMPILATION_CACHE_DIR names another folder; empty, it means none.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(VARIABLE, str(home / "diffdistill" / f"programs-{_processor()}"))


def count() -> None:
    """From here on, counts the programs that the cache has and those that are compiled. Imports jax."""
    import jax

    def note(event: str, **_: object) -> None:
        if event in _EVENTS:
            _counts[_EVENTS[event]] += 1

    jax.monitoring.register_event_listener(note)


def counted() -> str:
    """What `count` has seen, in a sentence; empty where no program was long enough to be kept."""
    folder = os.environ.get(VARIABLE)
    if not folder or not _counts:
        return ""
    return f"Compiled programs: {_counts['hits']} from {folder}, {_counts['misses']} new."


def _processor() -> str:
    """A name for processors that run the same programs: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.blake2b(f"{platform.machine()} {features}".encode(), digest_size=4).hexdigest()
