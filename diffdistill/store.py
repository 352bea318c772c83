"""A run at an address such as gs://bucket/run: a workdir on this machine, copied there while it grows.

Programs work in the folder; a thread copies what is new, every half minute and at the end. What lies at the address is
at any moment a run that can be continued elsewhere: a checkpoint counts there, as here, from the moment that its mark
is there, which goes up last and is deleted first, and after everything that was written before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import posixpath
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffdistill import places
from diffdistill.data import remote
from diffdistill.evaluation.files import write_atomically
from diffdistill.training import processes
from diffdistill.training.checkpoints import COMMITTED

PERIOD = 30.0  # seconds between two copies
ATTEMPTS = 3  # at the last copy
_SESSION = ".diffdistill-session"
_THREADS = 8
_CHECKPOINT = re.compile(r"(?P<folder>[^/]+/\d+)/.+")

Facts = tuple[int, int]
"""Size and time of change (ns) of a file."""
_UNKNOWN: Facts = (-1, -1)


class StoreError(RuntimeError):
    """A run that cannot be fetched from its address or copied there; the message says what to do."""


@contextlib.contextmanager
def kept(workdir: str, say: Callable[[str], Any] = print) -> Iterator[str]:
    """The workdir to work in: `workdir` itself, or, of an address, a folder that is copied there until the block ends.

    What is at the address already is fetched, unless this machine was the last to work on it: then the folder has all
    of that, and perhaps more. Of several processes all call it, and only the main one fetches and copies.

    Raises:
      DataError, StoreError: no such store, no access, files that are no run, or a run that another machine works on.
    """
    if not remote.is_remote(workdir):
        yield workdir
        return
    store = Store(workdir)
    processes.on_main(store.open)
    if not processes.is_main():
        yield str(store.folder)
        return
    say(f"{workdir} is worked on in {store.folder}")
    try:
        yield str(store.folder)
    except BaseException:
        try:
            store.close(say)  # what there is, before the message of what went wrong
        except StoreError as error:
            _warn(error)
        raise
    store.close(say)


class Store:
    """The folder of one address; `open` it before and `close` it after it is worked in."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._place = places.cache() / "runs" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = self._place / (posixpath.basename(self.url) or "run")
        self._files: Any = None
        self._root = ""
        self._lock: Any = None
        self._session = ""
        self._copied: dict[str, Facts] = {}  # what lies at the address, as it was here
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="diffdistill-store", daemon=True)
        self._failing = ""

    def open(self) -> None:
        """Fetches the run, where there is one that this machine has not, and begins to copy."""
        self._files, self._root, found = remote.connect(self.url)
        with self._explained(f"{self.url} cannot be opened"):
            self._place.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            known = _read(self._place / "record.json")
            at_address = self._read_session()
            session = uuid.uuid4().hex
            if not (at_address and at_address in known["sessions"] and self.folder.is_dir()):
                known = {"sessions": [at_address], "copied": self._fetch(found)}
            self._copied = {name: (int(size), int(when)) for name, (size, when) in known["copied"].items()}
            # Whichever of the two is found at the address next time, nobody else was there in between.
            self._record([at_address, session])
            self._files.pipe_file(self._address(_SESSION), session.encode())
            self._session = session
            self._record([session])
        self._thread.start()

    def close(self, say: Callable[[str], Any] = print) -> None:
        """Copies what is new a last time."""
        self._stop.set()
        self._thread.join()
        try:
            for attempt in range(ATTEMPTS):
                try:
                    self.copy()
                    break
                except StoreError:
                    if attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(2.0**attempt)
        finally:
            self._lock.close()
        say(f"{self.url}: everything is copied")

    def copy(self) -> None:
        """Makes the address hold what the folder holds. Raises StoreError."""
        with self._explained(f"The run cannot be copied to {self.url}"):
            if (found := self._read_session()) != self._session:
                raise StoreError(
                    f"Another program has opened {self.url} ({found[:8] or 'or deleted it'}): nothing more is copied "
                    f"there from {self.folder}. Let only one of them work on it; start this one again to go on from "
                    "what is there."
                )
            here, checkpoints = _files_of(self.folder)
            if "config.json" not in here and "config.json" in self._copied:
                raise StoreError(
                    f"{self.folder} has lost its config.json, so that nothing more is copied to {self.url}, where the "
                    "run is whole. Delete that folder and start the same command again, which fetches it."
                )
            changed = [name for name, facts in here.items() if self._copied.get(name) != facts]
            # A checkpoint that has lost a file is being deleted or damaged: what is there of it is not touched.
            gone = [name for name in self._copied.keys() - here.keys() if _checkpoint(name) not in checkpoints]
            self._delete([name for name in changed if _is_mark(name) and name in self._copied])  # another one by now
            self._put(here, changed)
            self._delete(gone)

    def _put(self, here: dict[str, Facts], changed: list[str]) -> None:
        """First what checkpoints may not be older than, then they, then their marks."""
        staged = self._place / "staged"
        shutil.rmtree(staged, ignore_errors=True)
        ready: tuple[list[str], list[str], list[str]] = ([], [], [])
        broken: set[str] = set()
        for name in sorted(changed, key=lambda name: not _checkpoint(name)):  # checkpoints first: the rest is newer
            if not _stage(self.folder / name, staged / name, link=bool(_checkpoint(name))):
                broken.add(_checkpoint(name) or name)  # deleted meanwhile
        for name in changed:
            if (_checkpoint(name) or name) not in broken:
                ready[0 if not _checkpoint(name) else 1 if not _is_mark(name) else 2].append(name)

        for name in itertools.chain(*ready):
            self._copied.setdefault(name, _UNKNOWN)
        self._record([self._session])

        def put(name: str) -> None:
            self._files.put_file(str(staged / name), self._address(name))
            self._copied[name] = here[name]

        for names in ready:
            _in_parallel(put, names)
        self._record([self._session])
        shutil.rmtree(staged, ignore_errors=True)

    def _delete(self, gone: Iterable[str]) -> None:
        def delete(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._address(name))
            del self._copied[name]

        marks = [name for name in gone if _is_mark(name)]
        for names in (marks, [name for name in gone if not _is_mark(name)]):
            _in_parallel(delete, names)
        self._record([self._session])

    def _fetch(self, found: dict[str, list[Any]]) -> dict[str, Facts]:
        """Replaces the folder by what lies at the address; returns the facts of what was fetched."""
        found = {name: facts for name, facts in found.items() if name not in ("", _SESSION)}
        if not found and (self.folder / "config.json").exists():
            raise StoreError(
                f"Nothing is at {self.url} any more, but {self.folder} holds the run that was copied there. Delete "
                "that folder to start anew, or go on in it with --workdir."
            )
        if found and "config.json" not in found:
            raise StoreError(
                f"{self.url} holds files, such as {min(found)}, but no run: there is no config.json among them. Give "
                "the address of a run, or one where nothing is."
            )
        whole = {_checkpoint(name) for name in found if _is_mark(name)} | {""}
        whole_names = {name for name in found if _checkpoint(name) in whole}
        fresh = self._place / "fetched"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        _in_parallel(
            lambda name: remote.get(self._files, self._address(name), found[name][0], fresh / name), whole_names
        )
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(fresh, self.folder)
        # What was copied in part goes with the first copy.
        return {name: _facts(self.folder / name) if name in whole_names else _UNKNOWN for name in found}

    def _work(self) -> None:
        """Copies until it is told to stop; what cannot be copied now may be later."""
        while not self._stop.wait(PERIOD):
            try:
                self.copy()
                self._failing = ""
            except StoreError as error:
                if str(error) != self._failing:
                    _warn(error)
                self._failing = str(error)

    def _take_lock(self) -> None:
        self._lock = (self._place / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"Another program on this machine works on {self.url}. Wait until it ends.") from error

    def _read_session(self) -> str:
        try:
            return self._files.cat_file(self._address(_SESSION)).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _record(self, sessions: list[str]) -> None:
        text = json.dumps({"sessions": sessions, "copied": self._copied})
        write_atomically(self._place / "record.json", lambda file: file.write(text.encode()))

    def _address(self, name: str) -> str:
        return posixpath.join(self._root, name)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # every store has its own errors
            raise StoreError(
                f"{what} ({type(error).__name__}: {error}). Check the address, the network, the credentials and the "
                f"disk; the same command on this machine goes on with what is in {self.folder}."
            ) from error


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {"sessions": [], "copied": {}}


def _files_of(folder: Path) -> tuple[dict[str, Facts], set[str]]:
    """(facts of the files of a run by name, but for those of checkpoints without their mark; all checkpoints).

    What is hidden, and Orbax's checkpoints in the making, are not of the run.
    """
    found: dict[str, Facts] = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and ".orbax-checkpoint-tmp" not in name]
        for name in names:
            if not name.startswith(".") and not name.endswith(".tmp"):
                file = Path(path) / name
                with contextlib.suppress(FileNotFoundError):
                    found[file.relative_to(folder).as_posix()] = _facts(file)
    there = {_checkpoint(name) for name in found} - {""}
    torn = there - {_checkpoint(name) for name in found if _is_mark(name)}
    return {name: facts for name, facts in found.items() if _checkpoint(name) not in torn}, there


def _facts(path: Path) -> Facts:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _checkpoint(name: str) -> str:
    """stage/update of a file of a checkpoint; empty for any other."""
    match = _CHECKPOINT.fullmatch(name)
    return match["folder"] if match else ""


def _is_mark(name: str) -> bool:
    return name == f"{_checkpoint(name)}/{COMMITTED}"


def _stage(file: Path, copy: Path, *, link: bool) -> bool:
    """A copy of a file that stays as it is whatever happens to the file; False where it has been deleted."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        if link:  # files of checkpoints are written once
            with contextlib.suppress(OSError):  # of a file system without links
                os.link(file, copy)
        if not copy.exists():
            shutil.copyfile(file, copy)
    except FileNotFoundError:
        return False
    return True


def _warn(error: StoreError) -> None:
    print(f"Warning: {error}", file=sys.stderr, flush=True)


def _in_parallel(function: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(function, names):
            pass
