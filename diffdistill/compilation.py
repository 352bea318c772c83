"""The cache of compiled programs on disk: what took long to compile is not compiled again by a later start."""

from __future__ import annotations

import atexit
import collections
import contextlib
import fcntl
import hashlib
import os
import platform
import uuid
import zlib
from pathlib import Path
from typing import IO, Any

import jax

from diffdistill import places

FOLDER, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_SECONDS = 0.2  # programs that are compiled faster are not kept
LIMIT = 4 * 2**30  # bytes of programs that are kept
_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
_counts: collections.Counter[str] = collections.Counter()
_listening: list[bool] = []
_notes: list[IO[str]] = []  # open, and so locked, while this process runs


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
    _listen()


def hits() -> int:
    """How many programs the cache had, where there is one, since the first call of this function or of `use_cache`."""
    _listen()
    return _counts["hits"]


def counted() -> str:
    """How many programs the cache had and how many were added to it, in a sentence; empty where it was not asked."""
    if not _counts:
        return ""
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    return f"Compiled programs: {_counts['hits']} from {folder}, {_counts['misses']} added to it."


def _tidy(folder: Path, limit: int = LIMIT) -> None:
    """Deletes what killed processes wrote in part, and the oldest programs where there are too many.

    JAX writes a program in place, and never again where one is: a torn one would be refused at every start. Each
    process holds the lock of a note while it runs, which says since when programs may have been torn.
    """
    programs = sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime)
    for note in folder.glob(".running-*"):
        with contextlib.suppress(OSError), note.open("r+") as file:  # held by a process that runs, or gone by now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            begun = note.stat().st_mtime
            note.unlink()
            for path in [path for path in programs if path.stat().st_mtime >= begun and not _is_whole(path)]:
                programs.remove(path)
                path.unlink()
    size = sum(path.stat().st_size for path in programs)
    for path in programs:
        if size <= limit:
            break
        size -= path.stat().st_size
        path.unlink()
    note = folder / f".running-{uuid.uuid4().hex}"
    _notes.append(note.open("w"))
    fcntl.flock(_notes[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    atexit.register(note.unlink, missing_ok=True)


def _is_whole(program: Path) -> bool:
    """Whether a program can be unpacked; where JAX packs otherwise than with zlib nobody knows."""
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(program.read_bytes())
    except zlib.error:
        return False
    return unpacker.eof


def _listen() -> None:
    if not _listening:
        _listening.append(True)
        jax.monitoring.register_event_listener(_note)


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
