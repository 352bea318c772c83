"""The cache of compiled programs on disk: what took long to compile is not compiled again by a later start."""

from __future__ import annotations

import collections
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from diffdistill import places

FOLDER, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_SECONDS = 0.2  # programs that are compiled faster are not kept
_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
_counts: collections.Counter[str] = collections.Counter()


def use_cache() -> None:
    """Lets JAX keep compiled programs below `places.cache()`, unless the user says where, and counts them.

    The environment variable FOLDER names another folder; empty, it means none. For a single process: those of a job
    that find different programs in caches of their own may wait for each other while they compile.
    """
    if FOLDER not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(places.cache() / f"programs-{_processor()}"))
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
