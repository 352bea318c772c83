"""The files of a run in a folder and at an address: copied there, and fetched from there.

What lies at the address is at any moment a run that can be continued elsewhere: a checkpoint counts there, as here,
from the moment that its mark is there, which goes up last and is deleted first, and after everything that was written
before it.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffdistill.data import remote
from diffdistill.training import checksums
from diffdistill.training.checkpoints import COMMITTED

_THREADS = 8
_CHECKPOINT = re.compile(r"(?P<folder>[^/]+/\d+)/.+")

Facts = tuple[int, int]
"""Size and time of change (ns) of a file."""
UNKNOWN: Facts = (-1, -1)


class StoreError(RuntimeError):
    """A run that cannot be fetched from its address or copied there; the message says what to do."""


class Mirror:
    """The files of one run: in `folder`, beside which lies what is on its way, and below `root` in a store.

    Attributes:
      files: the store, as fsspec sees it.
      copied: what lies at the address, with the facts of the files here that it equals.

    Args:
      url: the address, for what is said.
      record: called when `copied` has changed.
      check: called before what counts is written or deleted there; raises where that must not be.
    """

    def __init__(
        self,
        url: str,
        files: Any,
        root: str,
        folder: Path,
        copied: dict[str, Facts],
        *,
        record: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        self.url, self.files, self._root = url, files, root
        self.folder, self.copied = folder, copied
        self._record, self._check = record, check

    def address(self, name: str) -> str:
        """Where a file of the run lies in the store."""
        return posixpath.join(self._root, name)

    def copy(self) -> None:
        """Makes the address hold what the folder holds."""
        self._check()
        here, checkpoints = files_of(self.folder)
        if "config.json" not in here and "config.json" in self.copied:
            raise StoreError(
                f"{self.folder} has lost its config.json, so that nothing more is copied to {self.url}, where the "
                "run is whole. Delete that folder and start the same command again, which fetches it."
            )
        changed = [name for name, facts in here.items() if self.copied.get(name) != facts]
        # A checkpoint that is there is replaced only by one that was trained again, not by one that is damaged.
        there = {checkpoint_of(name) for name, facts in self.copied.items() if is_mark(name) and facts != UNKNOWN}
        damaged = {
            checkpoint
            for checkpoint in there.intersection(map(checkpoint_of, changed))
            if not checksums.are_right(self.folder / checkpoint)
        }
        changed = [name for name in changed if checkpoint_of(name) not in damaged]
        # A mark that goes up again belongs to another checkpoint than the one that is there.
        self._delete([name for name in changed if is_mark(name) and name in self.copied])
        self._put(here, changed)
        self._delete(self._superfluous(here, checkpoints))

    def _superfluous(self, here: dict[str, Facts], checkpoints: set[str]) -> list[str]:
        """What is at the address and has been deleted here; of checkpoints only those that a newer one has replaced.

        A checkpoint that has lost a file is being deleted, or is damaged: nothing of it is touched.
        """
        newest: dict[str, int] = {}
        for stage, _, update in (checkpoint_of(name).partition("/") for name in here if is_mark(name)):
            newest[stage] = max(newest.get(stage, -1), int(update))

        def is_superfluous(name: str) -> bool:
            stage, _, update = checkpoint_of(name).partition("/")
            if not stage or self.copied[name] == UNKNOWN:
                return True
            return f"{stage}/{update}" not in checkpoints and int(update) < newest.get(stage, -1)

        return [name for name in self.copied.keys() - here.keys() if is_superfluous(name)]

    def _put(self, here: dict[str, Facts], changed: list[str]) -> None:
        """First what checkpoints may not be older than, then they, then their marks, the oldest first."""
        if not changed:
            return
        staged = self.folder.parent / ".staged"
        shutil.rmtree(staged, ignore_errors=True)
        marked = {checkpoint_of(name) for name in changed if is_mark(name)}
        broken = {checkpoint for checkpoint in marked if not self._is_whole(checkpoint, here)}
        for name in sorted(changed, key=lambda name: not checkpoint_of(name)):  # checkpoints first: the rest is newer
            if not staged_copy(self.folder / name, staged / name, link=bool(checkpoint_of(name))):
                broken.add(checkpoint_of(name) or name)  # deleted meanwhile
        changed = [name for name in changed if (checkpoint_of(name) or name) not in broken]
        for name in changed:
            self.copied.setdefault(name, UNKNOWN)
        self._record()

        def put(name: str) -> None:
            self.files.put_file(str(staged / name), self.address(name))
            self.copied[name] = here[name]

        _in_parallel(put, [name for name in changed if not checkpoint_of(name)])
        _in_parallel(put, [name for name in changed if checkpoint_of(name) and not is_mark(name)])
        self._check()
        for name in sorted((name for name in changed if is_mark(name)), key=lambda name: here[name][1]):
            put(name)
        self._record()
        shutil.rmtree(staged, ignore_errors=True)

    def _is_whole(self, checkpoint: str, here: dict[str, Facts]) -> bool:
        """Whether every file with a checksum is there."""
        try:
            sums = checksums.read(self.folder / checkpoint)
        except (OSError, checksums.Damaged):
            return False
        return all(f"{checkpoint}/{name}" in here for name in sums)

    def _delete(self, names: list[str]) -> None:
        if not names:
            return
        self._check()

        def delete(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(self.address(name))
            del self.copied[name]

        _in_parallel(delete, [name for name in names if is_mark(name)])
        _in_parallel(delete, [name for name in names if not is_mark(name)])
        self._record()

    def fetch(self, found: dict[str, int | None]) -> None:
        """Replaces the folder by what lies at the address; what it had that was not copied is put aside."""
        whole = with_mark(found)
        fresh = self.folder.parent / ".fetched"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        _in_parallel(lambda name: remote.get(self.files, self.address(name), found[name], fresh / name), whole)
        if self.folder.exists():
            if any(self.copied.get(name) != facts for name, facts in files_of(self.folder)[0].items()):
                aside = self.folder.with_name(f"{self.folder.name}-before-{uuid.uuid4().hex[:8]}")
                os.replace(self.folder, aside)
                warn(f"Another program has worked on {self.url}: what {self.folder} had beyond that is in {aside}.")
            shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(fresh, self.folder)
        # What was copied in part goes with the first copy.
        self.copied = {name: facts_of(self.folder / name) if name in whole else UNKNOWN for name in found}

    def fetch_missing(self, found: dict[str, int | None]) -> None:
        """Fetches what the folder has lost since it was copied: caches may be cleaned.

        What the address has lost goes up again with the next copy.
        """
        for name, facts in list(self.copied.items()):
            if name not in found:
                del self.copied[name]
            elif found[name] not in (None, facts[0]):
                self.copied[name] = UNKNOWN
        whole = with_mark(found)
        lost = [name for name in self.copied if name in whole and not (self.folder / name).exists()]

        def get(name: str) -> None:
            remote.get(self.files, self.address(name), found[name], self.folder / name)
            self.copied[name] = facts_of(self.folder / name)

        moved = {checkpoint for checkpoint in map(checkpoint_of, lost) if not (self.folder / checkpoint).exists()}
        _in_parallel(get, [name for name in lost if not is_mark(name)])
        _in_parallel(get, [name for name in lost if is_mark(name)])
        for checkpoint in moved:
            if not checksums.are_right(self.folder / checkpoint):
                shutil.rmtree(self.folder / checkpoint)
                warn(f"The checkpoint {checkpoint} at {self.url} is damaged, and is not used.")


def with_mark(found: Iterable[str]) -> list[str]:
    """Those names of files of a run that do not belong to a checkpoint without its mark."""
    names = list(found)
    whole = {checkpoint_of(name) for name in names if is_mark(name)} | {""}
    return [name for name in names if checkpoint_of(name) in whole]


def files_of(folder: Path) -> tuple[dict[str, Facts], set[str]]:
    """(facts of the files of a run by name, but for those of checkpoints without their mark; all checkpoints).

    What is hidden, and Orbax's checkpoints in the making, are not of the run. Raises OSError where a folder cannot be
    listed: what is not seen has not been deleted.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found: dict[str, Facts] = {}
    for path, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and ".orbax-checkpoint-tmp" not in name]
        for name in names:
            if not name.startswith(".") and not name.endswith(".tmp"):
                file = Path(path) / name
                with contextlib.suppress(FileNotFoundError):
                    found[file.relative_to(folder).as_posix()] = facts_of(file)
    there = {checkpoint_of(name) for name in found} - {""}
    torn = there - {checkpoint_of(name) for name in found if is_mark(name)}
    return {name: facts for name, facts in found.items() if checkpoint_of(name) not in torn}, there


def facts_of(path: Path) -> Facts:
    """Those of a file here."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def checkpoint_of(name: str) -> str:
    """stage/update of a file of a checkpoint; empty for any other."""
    match = _CHECKPOINT.fullmatch(name)
    return match["folder"] if match else ""


def is_mark(name: str) -> bool:
    """Whether a file is the one with which a checkpoint counts."""
    return name == f"{checkpoint_of(name)}/{COMMITTED}"


def staged_copy(file: Path, copy: Path, *, link: bool) -> bool:
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


def warn(text: str) -> None:
    """Tells what went wrong while the program goes on."""
    print(f"Warning: {text}", file=sys.stderr, flush=True)


def _in_parallel(function: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(function, names):
            pass
