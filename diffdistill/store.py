"""A run at an address such as gs://bucket/run: a workdir on this machine, copied there while it grows.

Programs work in the folder; a thread copies what is new, every half minute and at the end. Of programs that open the
same address the last one counts: it leaves its session there, and the others stop when they find it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import posixpath
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from diffdistill import places
from diffdistill.data import remote
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.stream import EvaluationInterrupted
from diffdistill.mirror import UNKNOWN, Facts, Mirror, StoreError, warn
from diffdistill.training import processes
from diffdistill.training.errors import Interrupted, NonFiniteLoss, OtherProcessFailed, ProcessesDisagree
from diffdistill.training.interrupt import Interrupt

PERIOD = 30.0  # seconds between two copies
ATTEMPTS = 3  # at the last copy
_SESSION = ".diffdistill-session"
_CLOSED, _LOST = "the store is closed", "lost"


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
                warn(str(error))  # what went wrong before is what ends the program
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
    return isinstance(
        cause, Interrupted | EvaluationInterrupted | NonFiniteLoss | OtherProcessFailed | ProcessesDisagree
    )


class Store:
    """The folder of one address; `open` it before and `close` it after it is worked in."""

    def __init__(self, url: str, interrupt: Interrupt | None = None) -> None:
        self.url = url.rstrip("/")
        self._place = places.cache() / "runs" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = self._place / (posixpath.basename(self.url) or "run")
        self._interrupt = interrupt or Interrupt()
        self._mirror: Any = None
        self._lock: Any = None
        self._session = ""
        self._copying = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="diffdistill-store", daemon=True)

    def open(self) -> None:
        """Fetches the run, where there is one that this machine has not, and begins to copy."""
        files, root, found = remote.connect(self.url)
        with self._explained(f"{self.url} cannot be opened"):
            self._place.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            sessions, copied = _read(self._place / ".record.json")
            record, check = self._record, self._check_session
            self._mirror = Mirror(self.url, files, root, self.folder, copied, record=record, check=check)
            at_address = self._read_session()
            was_last = bool(at_address) and at_address in sessions and self.folder.is_dir()
            self._check(found, was_last)
            session = uuid.uuid4().hex
            if was_last:  # whichever of the two is found there next time, nobody else was there in between
                self._record(at_address, session)
            # From here on nobody else begins to copy.
            self._mirror.files.pipe_file(self._mirror.address(_SESSION), session.encode())
            self._session = session
            self._bring(was_last)
            self._record()
        self._thread.start()

    def _bring(self, was_last: bool) -> None:
        """Makes the folder hold what is at the address; again where another program was still copying."""
        for attempt in range(ATTEMPTS):
            found = {name: size for name, (size, *_) in remote.connect(self.url)[2].items() if name != _SESSION}
            try:
                return self._mirror.fetch_missing(found) if was_last else self._mirror.fetch(found)
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
            if not self._mirror.copied:  # no run was begun
                with contextlib.suppress(Exception):
                    self._mirror.files.rm_file(self._mirror.address(_SESSION))
        finally:
            self._lock.close()
        say(f"{self.url}: everything is copied")

    def copy(self) -> None:
        """Makes the address hold what the folder holds; of two threads one after the other. Raises StoreError."""
        with self._copying, self._explained(f"The run cannot be copied to {self.url}"):
            self._mirror.copy()

    def _check(self, found: Collection[str], was_last: bool) -> None:
        """Refuses files that are no run, and an empty address of a run that is here."""
        files = set(found) - {_SESSION}
        is_copied = any(facts != UNKNOWN for facts in self._mirror.copied.values())
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
                    warn(str(error))
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
            return self._mirror.files.cat_file(self._mirror.address(_SESSION)).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _record(self, *sessions: str) -> None:
        """Keeps what was copied, and in which session: by default this one."""
        text = json.dumps({"sessions": sessions or [self._session], "copied": self._mirror.copied})
        write_atomically(self._place / ".record.json", lambda file: file.write(text.encode()))

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
