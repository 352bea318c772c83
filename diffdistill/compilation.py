"""The cache of compiled programs on disk: what took long to compile is not compiled again by a later start."""

from __future__ import annotations

import atexit
import collections
import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from diffdistill import places

FOLDER, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_SECONDS = 0.2  # programs that are compiled faster are not kept
LIMIT = 4 * 2**30  # bytes of programs that are kept
_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
_counts: collections.Counter[str] = collections.Counter()


def use_cache() -> None:
    """Lets JAX keep compiled programs below `places.cache()`, unless the user says where, and counts them.

    The environment variable FOLDER names another folder; empty, it means none. For a single process: those of a job
    that find different programs in caches of their own may wait for each other while they compile.
    """
    if FOLDER not in os.environ:
        folder = places.cache() / f"programs-{_processor()}"
        with contextlib.suppress(OSError):  # JAX says itself where it cannot keep anything
            folder.mkdir(parents=True, exist_ok=True)
            _tidy(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if LEAST not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
    jax.monitoring.register_event_listener(_note)


def counted() -> str:
    """How many programs the cache had and how many were added to it, in a sentence; empty where it was not asked."""
    if not _counts:
        return ""
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    return f"Compiled programs: {_counts['hits']} from {folder}, {_counts['misses']} added to it."


def _tidy(folder: Path, limit: int = LIMIT) -> None:
    """Deletes what a killed process may have written in part, and the oldest programs where there are too many.

    JAX writes a program in place, and never again where one is: a torn one would be refused at every start.
    """
    programs = sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime)
    for note in folder.glob(f".running-{platform.node()}-*"):
        if not _runs(int(note.name.rpartition("-")[2])):
            begun = note.stat().st_mtime
            note.unlink()
            if programs and programs[-1].stat().st_mtime >= begun:
                programs.pop().unlink()
    size = sum(path.stat().st_size for path in programs)
    for path in programs:
        if size <= limit:
            break
        size -= path.stat().st_size
        path.unlink()
    note = folder / f".running-{platform.node()}-{os.getpid()}"
    note.touch()
    atexit.register(note.unlink, missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _note(event: str, **_: object) -> None:
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1


def _processor() -> str:
    """A name for processors that run the same programs: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.blake2b(f"{platform.machine()} {features}".encode(), digest_size=4).hexdigest()
