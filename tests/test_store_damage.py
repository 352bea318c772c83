"""A run at an address: what is lost, damaged or unreadable here or there does not spread."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from machines import (
    BUCKET,
    URL,
    at_address,
    in_folder,
    opened,
    say_nothing,
    train,
    write,
)

from diffdistill import store, workdir
from diffdistill.store import StoreError
from diffdistill.training.checkpoints import COMMITTED


def test_what_a_cleaned_cache_has_lost_comes_back(machine):
    with store.kept(URL, say=say_nothing) as path:
        train(Path(path), range(1, 4))
    there = at_address()
    for lost in ("teacher", "metrics.jsonl", "config.json"):
        victim = Path(path) / lost
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        with store.kept(URL, say=say_nothing):
            assert in_folder(Path(path)) == there
        assert at_address() == there


def test_a_checkpoint_is_deleted_there_only_for_a_newer_one(machine):
    one = opened()
    train(one.folder, range(1, 4))
    one.copy()
    there = at_address()
    shutil.rmtree(one.folder / "teacher" / "3")  # moved away since it was damaged here
    one.copy()
    assert at_address() == there
    train(one.folder, range(4, 5))
    one.copy()
    assert {name.split("/")[1] for name in at_address() if name.startswith("teacher")} == {"4"}
    one.close(say_nothing)


def test_a_checkpoint_that_is_being_deleted_is_not_copied(machine):
    one = opened()
    train(one.folder, range(1, 4))
    (one.folder / "teacher/2/params/d/array").unlink()
    one.copy()
    assert {name.split("/")[1] for name in at_address() if name.startswith("teacher")} == {"3"}
    one.close(say_nothing)


def test_a_checkpoint_that_is_damaged_here_replaces_no_good_one(machine, capsys):
    one = opened()
    train(one.folder, range(1, 4))
    one.copy()
    there = at_address()
    write(one.folder, "teacher/3/params/d/array", "")
    one.close(say_nothing)
    assert at_address() == there
    shutil.rmtree(one.folder / "teacher" / "3")  # moved away, as the message of the damage says
    with store.kept(URL, say=say_nothing):
        assert in_folder(one.folder) == there  # the good one has come back
    assert capsys.readouterr().err == ""

    BUCKET.pipe_file("/bucket/run/teacher/3/params/d/array", b"damaged there!")  # as long as it was
    shutil.rmtree(one.folder / "teacher" / "3")
    with store.kept(URL, say=say_nothing):
        assert not (one.folder / "teacher" / "3").exists()
    assert "The checkpoint teacher/3 at memory://bucket/run is damaged" in capsys.readouterr().err


def test_what_cannot_be_listed_here_is_not_deleted_there(machine, monkeypatch):
    one, original = opened(), os.scandir
    train(one.folder, range(1, 4))
    write(one.folder, "evaluation/results.jsonl", "{}")
    one.copy()
    there = at_address()

    def scandir(path):
        if Path(path).name == "evaluation":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(StoreError, match="Input/output error"):
            one.copy()
    assert at_address() == there
    one.close(say_nothing)


def test_what_the_address_has_lost_goes_up_again(machine):
    with store.kept(URL, say=say_nothing) as path:
        train(Path(path), range(1, 4))
    there = at_address()
    BUCKET.rm("/bucket/run/teacher", recursive=True)
    with store.kept(URL, say=say_nothing):
        pass
    assert at_address() == there


def test_files_that_change_while_they_are_fetched_are_fetched_again(machine, monkeypatch):
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    with store.kept(URL, say=say_nothing) as path:
        train(Path(path), range(1, 4))
    honest, changes = type(BUCKET).get_file, [b"longer\n" * 30, b"short\n"]

    def get(self, path, to, **more):
        if path.endswith("metrics.jsonl") and changes:
            BUCKET.pipe_file(path, changes.pop())
        honest(self, path, to, **more)

    monkeypatch.setattr(type(BUCKET), "get_file", get)
    machine(2)
    with store.kept(URL, say=say_nothing) as path:
        assert (Path(path) / "metrics.jsonl").read_bytes() == b"longer\n" * 30
    changes.append(b"read while it grows\n")
    assert (workdir.remote.local(URL) / "metrics.jsonl").read_bytes() == b"read while it grows\n"


def test_damage_here_does_not_reach_the_address(machine):
    one = opened()
    train(one.folder, range(1, 4))
    one.copy()
    there = at_address()
    (one.folder / "teacher/3" / COMMITTED).unlink()
    (one.folder / "teacher/2/params/d/array").unlink()
    one.copy()
    assert at_address() == there
    (one.folder / "config.json").unlink()
    with pytest.raises(StoreError, match=r"has lost its config\.json"):
        one.copy()
    assert at_address() == there
    one._lock.close()


def test_files_that_are_no_run_are_left_alone(machine):
    BUCKET.pipe_file("/bucket/run/thesis.pdf", b"years of work")
    with (
        pytest.raises(StoreError, match=r"memory://bucket/run holds files, such as thesis\.pdf, but no run"),
        store.kept(URL, say=say_nothing),
    ):
        raise AssertionError
    assert at_address() == {"thesis.pdf": b"years of work"}


def test_a_run_that_is_gone_from_its_address_stays_here(machine):
    with store.kept(URL, say=say_nothing) as path:
        train(Path(path), range(1, 2))
    BUCKET.rm("/bucket/run", recursive=True)
    with (
        pytest.raises(StoreError, match="Nothing is at memory://bucket/run any more, but"),
        store.kept(URL, say=say_nothing),
    ):
        raise AssertionError
    assert (Path(path) / "config.json").exists()


def test_a_store_that_fails_is_tried_again_and_named(machine, monkeypatch, capsys):
    monkeypatch.setattr(store, "PERIOD", 0.01)
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    honest = type(BUCKET).put_file

    def broken(self, *arguments, **more):
        raise ConnectionError("no route to host")

    one = opened()
    monkeypatch.setattr(type(BUCKET), "put_file", broken)
    train(one.folder, range(1, 2))
    one._thread.join(0.5)  # many copies
    assert capsys.readouterr().err.count("Warning: The run cannot be copied") == 1
    with pytest.raises(StoreError, match=r"copied to memory://bucket/run \(ConnectionError: no route to host\)"):
        one.close(say_nothing)
    monkeypatch.setattr(type(BUCKET), "put_file", honest)
    with store.kept(URL, say=say_nothing):
        pass
    assert at_address() == in_folder(one.folder)

    monkeypatch.setattr(type(BUCKET), "put_file", broken)

    def fail() -> None:
        with store.kept(URL, say=say_nothing) as path:
            write(Path(path), "metrics.jsonl", "more")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # what went wrong first is said
        fail()
    assert "Warning: The run cannot be copied to memory://bucket/run" in capsys.readouterr().err
