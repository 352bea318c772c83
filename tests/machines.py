"""Machines that work on a run at an address: fsspec's memory:// is an object store, a cache folder a machine."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from diffdistill import store
from diffdistill.store import Store
from diffdistill.training import checksums
from diffdistill.training.checkpoints import COMMITTED
from diffdistill.training.interrupt import Interrupt

BUCKET = fsspec.filesystem("memory")
URL = "memory://bucket/run"


def opened() -> Store:
    opened = Store(URL)
    opened.open()
    return opened


def say_nothing(text: str) -> None:
    pass


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def train(folder: Path, updates: range) -> None:
    """A run that saves at every update, and keeps two checkpoints."""
    write(folder, "config.json", f'{{"starts": {len(updates)}}}')
    for update in updates:
        lines = [json.dumps({"step": step}) for step in range(1, update + 1)]
        write(folder, "metrics.jsonl", "\n".join(lines))
        checkpoint = folder / "teacher" / str(update)
        for item in ("params", "ema"):
            write(checkpoint, f"{item}/d/array", f"{item} after {update}")
        checksums.write(checkpoint)
        write(checkpoint, COMMITTED, "complete")
        shutil.rmtree(folder / "teacher" / str(update - 2), ignore_errors=True)


def at_address() -> dict[str, bytes]:
    prefix = "/bucket/run/"
    names = {path: path.removeprefix(prefix) for path in BUCKET.find("/bucket/run")}
    return {name: BUCKET.cat_file(path) for path, name in names.items() if name != ".diffdistill-session"}


def in_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def see_that_the_later_machine_counts(url, at_address, machine, monkeypatch, capsys):
    """The earlier one is asked to stop; what it had that was not copied is put aside when it is started again."""
    monkeypatch.setattr(store, "PERIOD", 0.01)
    interrupt = Interrupt()
    one = Store(url, interrupt)
    one.open()
    train(one.folder, range(1, 3))
    one.copy()
    machine(2)
    with store.kept(url, say=say_nothing) as path:
        train(Path(path), range(3, 4))
    there = at_address()
    train(one.folder, range(3, 5))
    one._thread.join(60)
    assert interrupt.reason == f"another program, which has opened {url},"
    with pytest.raises(store.Lost, match=f"Another program has opened {url}"):
        one.close(say_nothing)
    assert at_address() == there
    machine(1)
    with store.kept(url, say=say_nothing) as path:
        assert in_folder(Path(path)) == there
    (aside,) = Path(path).parent.glob("run-before-*")
    assert (aside / "teacher" / "4").is_dir()
    assert f"beyond that is in {aside}" in capsys.readouterr().err
