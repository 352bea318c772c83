"""A run at an address such as gs://bucket/run: a workdir on this machine, copied there while it grows.

Programs work in the folder; a thread copies what is new, every half minute and at the end. What lies at the address is
at any moment a run that can be continued elsewhere: a checkpoint counts there, as here, from the moment that its mark
is there, which goes up last and is deleted first, and after everything that was written before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import posixpath
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffdistill import places
from diffdistill.data import remote
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.stream import EvaluationInterrupted
from diffdistill.training import checksums, processes
from diffdistill.training.checkpoints import COMMITTED
from diffdistill.training.errors import Interrupted, NonFiniteLoss, OtherProcessFailed
from diffdistill.training.interrupt import Interrupt

PERIOD = 30.0  # seconds between two copies
ATTEMPTS = 3  # at the last copy
_SESSION = ".diffdistill-session"
_CLOSED, _LOST = "the store is closed", "lost"
_THREADS = 8
_CHECKPOINT = re.compile(r"(?P<folder>[^/]+/\d+)/.+")

Facts = tuple[int, int]
"""Size and time of change (ns) of a file."""
_UNKNOWN: Facts = (-1, -1)


class StoreError(RuntimeError):
    """A run that cannot be fetched from its address or copied there; the message says what to do."""


class Lost(StoreError):
    """Another program has opened the run at its address."""


@contextlib.contextmanager
def kept(workdir: str, interrupt: Interrupt | None = None, say: Callable[[str], Any] = print) -> Iterator[str]:
    """The workdir to work in: `workdir` itself, or, of an address, a folder that is copied there until the block ends.

    What is at the address already is fetched, unless this machine was the last to work on it: then the folder has all
    of that, and perhaps more. Of several processes all call it, and only the main one fetches and copies; the others
    wait for it at the end.

    Args:
      workdir: a path, or an address that fsspec knows.
      interrupt: asked to stop when another program opens the run.
      say: told where the work is done.

    Raises:
      DataError, StoreError: no such store, no access, files that are no run, or a run that another program works on.
    """
    if not remote.is_remote(workdir):
        yield workdir
        return
    store = Store(workdir, interrupt)
    processes.on_main(store.open)
    if not processes.is_main():
        try:
            yield str(store.folder)
        except BaseException as end:
            if _ends_all(end) and processes.told(_CLOSED) == _LOST:
                raise OtherProcessFailed from end
            raise
        if processes.told(_CLOSED) == _LOST:
            raise OtherProcessFailed
        return
    say(f"{workdir} is worked on in {store.folder}")
    end = ""
    try:
        try:
            yield str(store.folder)
        except BaseException:
            try:
                store.close(say)
            except Lost:
                raise
            except StoreError as error:
                _warn(str(error))  # what went wrong before is what ends the program
            raise
        store.close(say)
    except Lost:
        end = _LOST
        raise
    finally:
        processes.tell(_CLOSED, end)


def _ends_all(end: BaseException) -> bool:
    """Whether what ends this process ends the main one too. Otherwise that one may be waiting for this one."""
    cause = end.__context__ if isinstance(end, SystemExit) else end  # of the exit code
    return isinstance(cause, Interrupted | EvaluationInterrupted | NonFiniteLoss | OtherProcessFailed)


class Store:
    """The folder of one address; `open` it before and `close` it after it is worked in."""

    def __init__(self, url: str, interrupt: Interrupt | None = None) -> None:
        self.url = url.rstrip("/")
        self._place = places.cache() / "runs" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = self._place / (posixpath.basename(self.url) or "run")
        self._interrupt = interrupt or Interrupt()
        self._files: Any = None
        self._root = ""
        self._lock: Any = None
        self._session = ""
        self._copied: dict[str, Facts] = {}  # what lies at the address, as it was here
        self._copying = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="diffdistill-store", daemon=True)

    def open(self) -> None:
        """Fetches the run, where there is one that this machine has not, and begins to copy."""
        self._files, self._root, found = remote.connect(self.url)
        with self._explained(f"{self.url} cannot be opened"):
            self._place.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            sessions, self._copied = _read(self._place / ".record.json")
            at_address = self._read_session()
            was_last = bool(at_address) and at_address in sessions and self.folder.is_dir()
            self._check(found, was_last)
            session = uuid.uuid4().hex
            if was_last:  # whichever of the two is found there next time, nobody else was there in between
                self._record([at_address, session])
            # From here on nobody else begins to copy.
            self._files.pipe_file(self._address(_SESSION), session.encode())
            self._session = session
            self._bring(was_last)
            self._record([session])
        self._thread.start()

    def _bring(self, was_last: bool) -> None:
        """Makes the folder hold what is at the address; again where another program was still copying."""
        for attempt in range(ATTEMPTS):
            found = {name: size for name, (size, *_) in remote.connect(self.url)[2].items() if name != _SESSION}
            try:
                return self._fetch_missing(found) if was_last else self._fetch(found)
            except OSError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(2.0**attempt)

    def close(self, say: Callable[[str], Any] = print) -> None:
        """Copies what is new a last time."""
        self._stop.set()
        self._thread.join()
        try:
            for attempt in range(ATTEMPTS):
                try:
                    self.copy()
                    break
                except StoreError as error:
                    if isinstance(error, Lost) or attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(2.0**attempt)
            if not self._copied:  # no run was begun
                with contextlib.suppress(Exception):
                    self._files.rm_file(self._address(_SESSION))
        finally:
            self._lock.close()
        say(f"{self.url}: everything is copied")

    def copy(self) -> None:
        """Makes the address hold what the folder holds; of two threads one after the other. Raises StoreError."""
        with self._copying, self._explained(f"The run cannot be copied to {self.url}"):
            self._check_session()
            here, checkpoints = _files_of(self.folder)
            if "config.json" not in here and "config.json" in self._copied:
                raise StoreError(
                    f"{self.folder} has lost its config.json, so that nothing more is copied to {self.url}, where the "
                    "run is whole. Delete that folder and start the same command again, which fetches it."
                )
            changed = [name for name, facts in here.items() if self._copied.get(name) != facts]
            # A checkpoint that is there is replaced only by one that was trained again, not by one that is damaged.
            there = {_checkpoint(name) for name, facts in self._copied.items() if _is_mark(name) and facts != _UNKNOWN}
            damaged = {
                checkpoint
                for checkpoint in there.intersection(map(_checkpoint, changed))
                if not checksums.are_right(self.folder / checkpoint)
            }
            changed = [name for name in changed if _checkpoint(name) not in damaged]
            # A mark that goes up again belongs to another checkpoint than the one that is there.
            self._delete([name for name in changed if _is_mark(name) and name in self._copied])
            self._put(here, changed)
            self._delete(self._superfluous(here, checkpoints))

    def _superfluous(self, here: dict[str, Facts], checkpoints: set[str]) -> list[str]:
        """What is at the address and has been deleted here; of checkpoints only those that a newer one has replaced.

        A checkpoint that has lost a file is being deleted, or is damaged: nothing of it is touched.
        """
        newest: dict[str, int] = {}
        for stage, _, update in (_checkpoint(name).partition("/") for name in here if _is_mark(name)):
            newest[stage] = max(newest.get(stage, -1), int(update))

        def is_superfluous(name: str) -> bool:
            stage, _, update = _checkpoint(name).partition("/")
            if not stage or self._copied[name] == _UNKNOWN:
                return True
            return f"{stage}/{update}" not in checkpoints and int(update) < newest.get(stage, -1)

        return [name for name in self._copied.keys() - here.keys() if is_superfluous(name)]

    def _put(self, here: dict[str, Facts], changed: list[str]) -> None:
        """First what checkpoints may not be older than, then they, then their marks, the oldest first."""
        if not changed:
            return
        staged = self._place / ".staged"
        shutil.rmtree(staged, ignore_errors=True)
        marked = {_checkpoint(name) for name in changed if _is_mark(name)}
        broken = {checkpoint for checkpoint in marked if not self._is_whole(checkpoint, here)}
        for name in sorted(changed, key=lambda name: not _checkpoint(name)):  # checkpoints first: the rest is newer
            if not _stage(self.folder / name, staged / name, link=bool(_checkpoint(name))):
                broken.add(_checkpoint(name) or name)  # deleted meanwhile
        changed = [name for name in changed if (_checkpoint(name) or name) not in broken]
        for name in changed:
            self._copied.setdefault(name, _UNKNOWN)
        self._record([self._session])

        def put(name: str) -> None:
            self._files.put_file(str(staged / name), self._address(name))
            self._copied[name] = here[name]

        _in_parallel(put, [name for name in changed if not _checkpoint(name)])
        _in_parallel(put, [name for name in changed if _checkpoint(name) and not _is_mark(name)])
        self._check_session()
        for name in sorted((name for name in changed if _is_mark(name)), key=lambda name: here[name][1]):
            put(name)
        self._record([self._session])
        shutil.rmtree(staged, ignore_errors=True)

    def _is_whole(self, checkpoint: str, here: dict[str, Facts]) -> bool:
        """Whether every file with a checksum is there."""
        try:
            sums = json.loads((self.folder / checkpoint / checksums.FILE).read_text())["blake2b"]
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return all(f"{checkpoint}/{name}" in here for name in sums)

    def _delete(self, names: list[str]) -> None:
        if not names:
            return
        self._check_session()

        def delete(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._address(name))
            del self._copied[name]

        _in_parallel(delete, [name for name in names if _is_mark(name)])
        _in_parallel(delete, [name for name in names if not _is_mark(name)])
        self._record([self._session])

    def _check(self, found: Collection[str], was_last: bool) -> None:
        """Refuses files that are no run, and an empty address of a run that is here."""
        files = set(found) - {_SESSION}
        is_copied = any(facts != _UNKNOWN for facts in self._copied.values())
        if not files and (self.folder / "config.json").exists() and (is_copied or not was_last):
            raise StoreError(
                f"Nothing is at {self.url} any more, but {self.folder} holds the run that was copied there. Delete "
                "that folder to start anew, or go on in it with --workdir."
            )
        if files and "config.json" not in files:
            raise StoreError(
                f"{self.url} holds files, such as {min(files) or self.url}, but no run: there is no config.json among "
                "them. Give the address of a run, or one where nothing is."
            )

    def _fetch(self, found: dict[str, int | None]) -> None:
        """Replaces the folder by what lies at the address; what it had that was not copied is put aside."""
        whole = with_mark(found)
        fresh = self._place / ".fetched"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        _in_parallel(lambda name: remote.get(self._files, self._address(name), found[name], fresh / name), whole)
        if self.folder.exists():
            if any(self._copied.get(name) != facts for name, facts in _files_of(self.folder)[0].items()):
                aside = self.folder.with_name(f"{self.folder.name}-before-{self._session[:8]}")
                os.replace(self.folder, aside)
                _warn(f"Another program has worked on {self.url}: what {self.folder} had beyond that is in {aside}.")
            shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(fresh, self.folder)
        # What was copied in part goes with the first copy.
        self._copied = {name: _facts(self.folder / name) if name in whole else _UNKNOWN for name in found}

    def _fetch_missing(self, found: dict[str, int | None]) -> None:
        """Fetches what the folder has lost since it was copied: caches may be cleaned.

        What the address has lost goes up again with the next copy.
        """
        for name, facts in list(self._copied.items()):
            if name not in found:
                del self._copied[name]
            elif found[name] not in (None, facts[0]):
                self._copied[name] = _UNKNOWN
        whole = with_mark(found)
        lost = [name for name in self._copied if name in whole and not (self.folder / name).exists()]

        def get(name: str) -> None:
            remote.get(self._files, self._address(name), found[name], self.folder / name)
            self._copied[name] = _facts(self.folder / name)

        moved = {checkpoint for checkpoint in map(_checkpoint, lost) if not (self.folder / checkpoint).exists()}
        _in_parallel(get, [name for name in lost if not _is_mark(name)])
        _in_parallel(get, [name for name in lost if _is_mark(name)])
        for checkpoint in moved:
            if not checksums.are_right(self.folder / checkpoint):
                shutil.rmtree(self.folder / checkpoint)
                _warn(f"The checkpoint {checkpoint} at {self.url} is damaged, and is not used.")

    def _work(self) -> None:
        """Copies until it is told to stop; what cannot be copied now may be later."""
        said = ""
        while not self._stop.wait(PERIOD):
            try:
                self.copy()
                said = ""
            except Lost:
                self._interrupt.request(f"another program, which has opened {self.url},")
                return
            except StoreError as error:
                if str(error) != said:
                    _warn(str(error))
                said = str(error)

    def _check_session(self) -> None:
        if self._read_session() != self._session:
            raise Lost(
                f"Another program has opened {self.url}: nothing more is copied there from {self.folder}. Let only one "
                "of them work on it; started again, this one goes on from what is there."
            )

    def _take_lock(self) -> None:
        self._lock = (self._place / ".lock").open("w")
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
        write_atomically(self._place / ".record.json", lambda file: file.write(text.encode()))

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


def _read(path: Path) -> tuple[list[str], dict[str, Facts]]:
    """The sessions of a record, and what was copied; nothing where there is none."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        record = json.loads(path.read_text(encoding="utf-8"))
        copied = {name: (int(size), int(when)) for name, (size, when) in record["copied"].items()}
        return list(record["sessions"]), copied
    return [], {}


def with_mark(found: Iterable[str]) -> list[str]:
    """Those names of files of a run that do not belong to a checkpoint without its mark."""
    names = list(found)
    whole = {_checkpoint(name) for name in names if _is_mark(name)} | {""}
    return [name for name in names if _checkpoint(name) in whole]


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


def _warn(text: str) -> None:
    print(f"Warning: {text}", file=sys.stderr, flush=True)


def _in_parallel(function: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(function, names):
            pass
